"""Which engine runs a model when none was asked for."""

from __future__ import annotations

from pathlib import Path

from fastgen.engines import bundle_engines, engine_class, engine_names, no_engine
from fastgen.engines.base import Engine
from fastgen.models.bundle import is_bundle


def default_engine(folder: Path, device: str | None = None, *, built: bool = True) -> str:
    """For a model folder `eager`, the reference. For a bundle the installed engine of the highest `priority`:
    `trt` where plans were built from it, `trt-rtx` where it holds plans and an RTX card is here, on a GPU `ort`, on a CPU
    `openvino`. `built=False`: none that must be built beforehand.

    The choice looks at what is here, installed and built, imports nothing, and tries nothing out: if the engine then cannot
    run, that is an error. Raises InputError when no engine for bundles is installed.
    """
    if not is_bundle(folder):
        return next(name for name in engine_names() if engine_class(name).reference)

    def priority(engine: type[Engine]) -> int:
        return engine.priority(folder, device)

    engine = max((e for e in bundle_engines() if built or e.built_by is None), key=priority, default=None)
    if engine is None or priority(engine) == 0:
        raise no_engine()
    return engine.name
