"""What the bytes of a picture depend on beside its job: engine, precision, versions, processor or card."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from fastgen import __version__
from fastgen.engines.machine import cpu
from fastgen.generate.job_record import NODE_FIELDS, Environment

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner

LIBRARIES = ("numpy", "pillow")


def environment_of(pipeline: ModelRunner) -> dict[str, str]:
    """The environment of a model on this machine's engine. Pictures of two machines can be compared byte by byte only where all
    fields are equal."""
    from PIL import features

    engine = pipeline.engine
    device = engine.device.partition(":")[0]
    found = {"fastgen": __version__, "engine": engine.name, "dtype": engine.dtype, "device": device}
    if device == "cuda":
        import torch

        found |= {"card": torch.cuda.get_device_name(engine.device), "graphs": str(pipeline.graphs)}
        found["cuda"] = str(torch.version.cuda)
    else:
        found["processor"] = " ".join(cpu().isa)
    found |= {name: _version(name) for name in sorted({*engine.packages, *LIBRARIES})}
    return found | {"zlib": f"{features.version('zlib')} {'ng' if features.check('zlib_ng') else ''}".strip()}


def _version(name: str) -> str:
    """Of a package that is imported, else of the installed distribution."""
    found = getattr(sys.modules.get(name), "__version__", None)
    if found is None:
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "none"
    return str(found)


def most_common(environments: Sequence[Environment]) -> Environment:
    """The environment of most machines; of several the first."""
    keys = [tuple(sorted(environment.items())) for environment in environments]
    return environments[keys.index(Counter(keys).most_common(1)[0][0])]


def node_fields(environment: Environment) -> dict[str, Any]:
    """The fields of a manifest line of an image that a machine of this kind made, in a job of several kinds."""
    return {name: environment[name] for name in NODE_FIELDS if name in environment} | {"node": dict(environment)}
