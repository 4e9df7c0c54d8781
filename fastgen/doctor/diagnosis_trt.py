"""What keeps TensorRT from running: parts that are missing, mixed or made for another CUDA."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from fastgen.doctor.diagnosis import Machine, Problem, driver_too_old, update_driver
from fastgen.doctor.installed import Library
from fastgen.engines.base_trt_product import TENSORRT
from fastgen.machine import version


def tensorrt_problems(machine: Machine) -> Iterator[Problem]:
    """Mixed builds, mixed versions, a library of another major, a driver too old, libraries that are stubs."""
    library, parts = machine.library("tensorrt"), tensorrt_parts(machine.distributions)
    cudas = sorted({part[0] for part in parts.values() if part[0]})
    name = f"TensorRT {library.version}"
    if version(library.version or "0")[:2] < TENSORRT.minimum:
        needed = ".".join(map(str, TENSORRT.minimum))
        yield Problem(f"{name} is too old, {needed} or newer is needed", f"pip install --upgrade {_unpinned(machine)}")
    if len(cudas) > 1:
        fix = f"pip uninstall -y {' '.join(parts)} && pip install tensorrt-cu{_cuda_major(machine, cudas[-1])}"
        yield Problem(
            f"builds for CUDA {' and '.join(map(str, cudas))} are installed together: {', '.join(parts)}", fix
        )
    if len({machine.distributions[part] for part in parts}) > 1:
        versions = ", ".join(f"{part} {machine.distributions[part]}" for part in parts)
        yield Problem(f"TensorRT's parts are of different versions: {versions}", f"pip install {_pinned(machine)}")
    loaded, major = library.facts.get("loaded"), version(library.version or "0")[0]
    if loaded is not None and loaded != major:
        fix = f"take the other library off LD_LIBRARY_PATH, or pip install --force-reinstall {_pinned(machine)}"
        yield Problem(f"{name} has loaded libnvinfer.so.{loaded}, of another major version", fix)
    if len(cudas) == 1 and (too_old := driver_too_old(machine.driver, str(cudas[0]))):
        fix = update_driver(machine.driver, f"pip uninstall -y {' '.join(parts)} && pip install tensorrt-cu12")
        yield Problem(f"{too_old}; {name} is built for CUDA {cudas[0]}", fix)
    elif machine.gpus and library.facts.get("runtime") is False:
        fix = f"pip install --force-reinstall {_pinned(machine)}"
        yield Problem(f"{name} cannot make a runtime: its libraries are stubs, or do not fit the driver", fix)


def incomplete(machine: Machine, library: Library) -> Problem:
    """Some of TensorRT's distributions are there, but it cannot be imported."""
    parts = ", ".join(f"{p} {machine.distributions[p]}" for p in tensorrt_parts(machine.distributions))
    why = library.error or "`import tensorrt` finds nothing"
    return Problem(f"TensorRT is incomplete ({parts}): {why}", f"pip install --force-reinstall {_pinned(machine)}")


def tensorrt_parts(installed: Mapping[str, str]) -> dict[str, tuple[int | None, str]]:
    """Distributions of TensorRT -> (CUDA major in the name, "" | "bindings" | "libs")."""
    found = {name: re.fullmatch(r"tensorrt(?:-cu(\d+))?(?:-(bindings|libs))?", name) for name in sorted(installed)}
    return {name: (int(m[1]) if m[1] else None, m[2] or "") for name, m in found.items() if m}


def _unpinned(machine: Machine) -> str:
    return _pinned(machine).partition("==")[0]


def _pinned(machine: Machine) -> str:
    """What pip installs to complete the bindings that are here: `tensorrt-cu13==11.4.0`."""
    parts = tensorrt_parts(machine.distributions)
    bindings = [name for name, part in parts.items() if part[1] == "bindings"] or list(parts)
    if not bindings:
        return "tensorrt"
    return f"{bindings[0].removesuffix('-bindings').removesuffix('-libs')}=={machine.distributions[bindings[0]]}"


def _cuda_major(machine: Machine, newest: int) -> int:
    return min(newest, version(machine.driver.cuda)[0]) if machine.driver.cuda else newest
