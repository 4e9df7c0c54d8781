"""What keeps a TensorRT product from running: parts that are missing or mixed, another CUDA, cards that it does not know."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from fastgen.engines.doctor.diagnosis import Machine, Problem, driver_too_old, update_driver
from fastgen.engines.doctor.libraries import Library
from fastgen.engines.machine import version
from fastgen.engines.trt.product import TENSORRT, Product


def hardware_problem(product: Product, machine: Machine) -> Problem | None:
    """Why no GPU that is here can run the product's plans: then nothing else matters."""
    if not machine.gpus:
        build = "; `fastgen export --rtx` builds plans for one here all the same" if product.capabilities else ""
        reason = machine.driver.error or "none found"
        return Problem(f"{product.title} needs an NVIDIA GPU: {reason}", f"use a machine that has one{build}")
    refusals = [product.refusal(gpu.compute_capability) for gpu in machine.gpus if gpu.compute_capability]
    if refusals and all(refusals):
        return Problem(f"{machine.gpus[0].name}: {refusals[0]}", f"use engine {TENSORRT.engine}")
    return None


def tensorrt_problems(product: Product, machine: Machine) -> Iterator[Problem]:
    """Mixed builds, mixed versions, a library of another major, a driver too old, libraries that are stubs."""
    library, parts = machine.library(product.module), tensorrt_parts(product, machine.distributions)
    if not library.works:
        return
    cudas = sorted({part[0] for part in parts.values() if part[0]})
    name = f"{product.title} {library.version}"
    if version(library.version or "0")[:2] < product.minimum:
        needed, wheel = ".".join(map(str, product.minimum)), _unpinned(product, machine)
        yield Problem(f"{name} is too old, {needed} or newer is needed", f"pip install --upgrade {wheel}")
    if len(cudas) > 1:
        fix = f"pip uninstall -y {' '.join(parts)} && pip install {product.wheel(_cuda_major(machine, cudas[-1]))}"
        yield Problem(
            f"builds for CUDA {' and '.join(map(str, cudas))} are installed together: {', '.join(parts)}", fix
        )
    if len({machine.distributions[part] for part in parts}) > 1:
        versions = ", ".join(f"{part} {machine.distributions[part]}" for part in parts)
        fix = f"pip install {_pinned(product, machine)}"
        yield Problem(f"{product.title}'s parts are of different versions: {versions}", fix)
    loaded, major = library.facts.get("loaded"), version(library.version or "0")[0]
    if loaded is not None and loaded != major:
        fix = (
            f"take the other library off LD_LIBRARY_PATH, or pip install --force-reinstall {_pinned(product, machine)}"
        )
        yield Problem(f"{name} has loaded libnvinfer.so.{loaded}, of another major version", fix)
    if len(cudas) == 1 and (too_old := driver_too_old(machine.driver, str(cudas[0]))):
        fix = update_driver(machine.driver, f"pip uninstall -y {' '.join(parts)} && pip install {product.wheel(12)}")
        yield Problem(f"{too_old}; {name} is built for CUDA {cudas[0]}", fix)
    elif machine.gpus and library.facts.get("runtime") is False:
        fix = f"pip install --force-reinstall {_pinned(product, machine)}"
        yield Problem(f"{name} cannot make a runtime: its libraries are stubs, or do not fit the driver", fix)


def incomplete(product: Product, machine: Machine, library: Library) -> Problem:
    """Some of a product's distributions are there, but it cannot be imported."""
    parts = ", ".join(f"{p} {machine.distributions[p]}" for p in tensorrt_parts(product, machine.distributions))
    why = library.error or f"`import {product.module}` finds nothing"
    fix = f"pip install --force-reinstall {_pinned(product, machine)}"
    return Problem(f"{product.title} is incomplete ({parts}): {why}", fix)


def tensorrt_parts(product: Product, installed: Mapping[str, str]) -> dict[str, tuple[int | None, str]]:
    """Distributions of a product -> (CUDA major in the name, "" | "bindings" | "libs")."""
    pattern = rf"{product.wheels}(?:-cu(\d+))?(?:-(bindings|libs))?"
    matches = {name: re.fullmatch(pattern, name) for name in sorted(installed)}
    return {name: (int(m[1]) if m[1] else None, m[2] or "") for name, m in matches.items() if m}


def _unpinned(product: Product, machine: Machine) -> str:
    return _pinned(product, machine).partition("==")[0]


def _pinned(product: Product, machine: Machine) -> str:
    """What pip installs to complete the bindings that are here: `tensorrt-cu13==11.4.0`."""
    parts = tensorrt_parts(product, machine.distributions)
    bindings = [name for name, part in parts.items() if part[1] == "bindings"] or list(parts)
    if not bindings:
        return product.wheels
    return f"{bindings[0].removesuffix('-bindings').removesuffix('-libs')}=={machine.distributions[bindings[0]]}"


def _cuda_major(machine: Machine, newest: int) -> int:
    return min(newest, version(machine.driver.cuda)[0]) if machine.driver.cuda else newest
