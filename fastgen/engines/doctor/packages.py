"""Which packages of an engine are missing, or cannot be imported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastgen.engines.doctor.diagnosis import Machine, Problem, both_onnxruntimes, owner
from fastgen.engines.trt.problems import incomplete, tensorrt_parts
from fastgen.engines.trt.product import PRODUCTS


def package_problems(packages: Sequence[str], install: str, machine: Machine) -> Iterator[Problem]:
    """Packages of an engine that are missing, which the command `install` changes, and those whose import fails."""
    libraries = [machine.library(package) for package in packages]
    broken = [x for x in libraries if x.name in PRODUCTS and not x.works]
    tensorrt = [x for x in broken if tensorrt_parts(PRODUCTS[x.name], machine.distributions)]
    if missing := [x.name for x in libraries if x.version is None and x not in tensorrt]:
        yield Problem(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed", install)
    for library in libraries:
        if library in tensorrt:
            yield incomplete(PRODUCTS[library.name], machine, library)
        elif library.error:
            yield from both_onnxruntimes(machine, "engine") if library.name == "onnxruntime" else ()
            yield Problem(library.error, f"pip install --force-reinstall {owner(machine, library.name)}")
