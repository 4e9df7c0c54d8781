"""An engine is a folder: `engines/<name>/engine.py` defines a class `Engine`; `trt_rtx/` is engine `trt-rtx`."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.errors import InputError, unknown

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.models.spec import Source


def engine_names() -> list[str]:
    """Names of all engines of this package, installed or not."""
    folders = (file.parent.name for file in Path(__file__).parent.glob("*/engine.py"))
    return sorted(name.replace("_", "-") for name in folders)


def engine_class(name: str) -> type[Engine]:
    """The engine's class, importing none of its packages. Raises InputError for an unknown name."""
    if name not in engine_names():
        raise unknown("engine", name, engine_names())
    return importlib.import_module(f"fastgen.engines.{name.replace('-', '_')}.engine").Engine


def source_kind(name: str | None) -> str | None:
    """What an engine runs, "bundle" or "model"; None for no engine in particular. Raises InputError for an unknown name."""
    return None if name is None else engine_class(name).source_kind


def built_by(name: str | None) -> str | None:
    """The option of `fastgen export` that builds what an engine runs; None for an engine that needs nothing built beforehand,
    and for no engine in particular. Raises InputError for an unknown name."""
    return None if name is None else engine_class(name).built_by


def missing_packages(name: str) -> list[str]:
    """The packages that the engine needs and that are not installed."""
    return [package for package in engine_class(name).packages if importlib.util.find_spec(package) is None]


def bundle_engines() -> list[type[Engine]]:
    """The engines that run bundles and whose packages are installed."""
    return [e for e in map(engine_class, engine_names()) if e.source_kind == "bundle" and not missing_packages(e.name)]


def no_engine() -> InputError:
    """The error for a machine without engines for bundles, with the command that installs some that need no build."""
    classes = [e for e in map(engine_class, engine_names()) if e.source_kind == "bundle" and e.built_by is None]
    return InputError(f"no engine for bundles is installed: {classes[0].install}")


def has_distribution(name: str) -> bool:
    """Whether a distribution is installed: `onnxruntime-gpu` and `onnxruntime` are imported under one name."""
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def check_installed(name: str) -> None:
    """InputError, with the command that installs them, when packages of the engine are missing."""
    if missing := missing_packages(name):
        raise InputError(f"engine {name} needs {', '.join(missing)}, not installed here: {engine_class(name).install}")


def create_engine(
    name: str, source: Source, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
) -> Engine:
    """Build an engine over a model folder or bundle.

    Raises InputError for an unknown engine, a missing package (with the command that installs it), or a precision or
    device that the engine does not have.
    """
    check_installed(name)
    if threads is not None and threads < 1:
        raise InputError(f"threads is {threads}, expected at least 1")
    from fastgen.engines.base import announce_slow
    from fastgen.engines.machine import cpu

    engine = engine_class(name).open(source, device=device, dtype=dtype, threads=threads)
    announce_slow(engine, cpu())
    return engine
