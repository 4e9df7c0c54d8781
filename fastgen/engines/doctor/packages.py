"""Which packages of an engine are missing, or cannot be imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastgen.engines.doctor.diagnosis import Machine, Problem, both_onnxruntimes, owner
from fastgen.engines.trt.problems import incomplete, tensorrt_parts
from fastgen.engines.trt.product import PRODUCTS

if TYPE_CHECKING:
    from fastgen.engines.base import Engine


def package_problems(engine: type[Engine], machine: Machine) -> Iterator[Problem]:
    """Packages that are missing, and those whose import fails."""
    needed = [machine.library(package) for package in engine.packages]
    broken = [x for x in needed if x.name in PRODUCTS and not x.works]
    tensorrt = [x for x in broken if tensorrt_parts(PRODUCTS[x.name], machine.distributions)]
    if missing := [x.name for x in needed if x.version is None and x not in tensorrt]:
        yield Problem(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed", engine.install)
    for library in needed:
        if library in tensorrt:
            yield incomplete(PRODUCTS[library.name], machine, library)
        elif library.error:
            yield from both_onnxruntimes(machine, "engine") if library.name == "onnxruntime" else ()
            yield Problem(library.error, f"pip install --force-reinstall {owner(machine, library.name)}")
