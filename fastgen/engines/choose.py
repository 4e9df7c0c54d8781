"""The default engine of a model."""

from __future__ import annotations

from pathlib import Path

from fastgen.engines import bundle_engines, engine_class, engine_names, no_engine
from fastgen.engines.base import Engine
from fastgen.models.bundle import is_bundle


def default_engine(folder: Path, device: str | None = None, *, built: bool = True) -> str:
    """For a model folder `eager`, the reference. For a bundle the installed engine of the highest `priority`: `trt` if it has
    plans in the cache, `trt-rtx` if it holds plans and an RTX card is here, else `ort` on a GPU and `openvino` on a CPU.
    `built=False`: none that must be built beforehand.

    Nothing is imported or tried out: an engine that then cannot run is an error. Raises InputError when no engine for bundles
    is installed.
    """
    if not is_bundle(folder):
        return next(name for name in engine_names() if engine_class(name).reference)

    def priority(engine: type[Engine]) -> int:
        return engine.priority(folder, device)

    engine = max((e for e in bundle_engines() if built or e.built_by is None), key=priority, default=None)
    if engine is None or priority(engine) == 0:
        raise no_engine()
    return engine.name
