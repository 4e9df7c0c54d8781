"""Why an engine cannot run on a machine, and the command that changes that.

Pure functions of a `Machine`, so that machines we do not have can be judged too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastgen.engines.doctor.libraries import Library
from fastgen.engines.machine import Cpu, Driver, Gpu, version

MIN_DRIVER = {11: "450", 12: "525", 13: "580"}  # by CUDA major, from docs.nvidia.com/deploy/cuda-compatibility
TORCH_INDEX = {12: "https://download.pytorch.org/whl/cu126", 13: "https://download.pytorch.org/whl/cu130"}
ONNXRUNTIMES = ("onnxruntime", *(f"onnxruntime-{kind}" for kind in ("gpu", "directml", "openvino", "training")))


@dataclass(frozen=True)
class Cache:
    """The cache folder: size in bytes, compiled engines per engine; `error`: why it cannot be used."""

    folder: str | None
    bytes: int = 0
    engines: Mapping[str, int] = field(default_factory=dict)
    damaged: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Machine:
    """Everything that decides whether an engine can run. `compiler`: path of the C++ compiler; `headers`: Python.h is there;
    `visible`: $CUDA_VISIBLE_DEVICES."""

    cpu: Cpu
    gpus: list[Gpu]
    driver: Driver
    libraries: Mapping[str, Library]
    distributions: Mapping[str, str]
    cache: Cache
    compiler: str | None
    headers: bool
    visible: str | None = None

    def library(self, name: str) -> Library:
        return self.libraries.get(name) or Library(name)


@dataclass(frozen=True)
class Problem:
    """`scope`: "engine" (it cannot run), "gpu" (it runs on the CPU only), "warning". `fix`: the command, or what to do."""

    what: str
    fix: str
    scope: str = "engine"

    def __str__(self) -> str:
        return f"{self.what}: {self.fix}"


def torch_problems(machine: Machine) -> Iterator[Problem]:
    """Why torch does not reach the GPU that is here."""
    torch, driver = machine.library("torch"), machine.driver
    facts, name = torch.facts, f"torch {torch.version}"
    if not torch.works:
        return
    if facts.get("available"):
        if failure := facts.get("failure"):
            why = _architecture(machine) or failure
            yield Problem(f"{name} sees the GPU but cannot use it: {why}", _wheel(_fitting(machine)), "gpu")
        return
    built = facts.get("cuda")
    if not machine.gpus:
        if built and driver.error and driver.error.startswith("nvidia-smi"):
            yield Problem(driver.error, "reboot, or install the NVIDIA driver again", "gpu")
        return
    gpu = machine.gpus[0].name
    if not built:
        fix = _wheel(_fitting(machine))
        yield Problem(f"{name} is built without CUDA, although there is a GPU here ({gpu})", fix, "gpu")
    elif too_old := driver_too_old(driver, built):
        yield Problem(f"{too_old}; {name} is built for CUDA {built}", update_driver(driver, _wheel(12)), "gpu")
    elif machine.visible is not None and not re.match(r"\d|GPU-|MIG-", machine.visible):
        yield Problem(f"CUDA_VISIBLE_DEVICES is {machine.visible!r}, which hides the GPU ({gpu})", "unset it", "gpu")
    else:
        what = f"{name} does not see the GPU ({gpu}): {facts.get('failure') or 'no reason given'}"
        yield Problem(what, "reboot, or update the NVIDIA driver", "gpu")


def driver_too_old(driver: Driver, cuda: str) -> str | None:
    """Why a program built for this CUDA version cannot run on the driver; None when it can, or nothing is known."""
    major = version(cuda)[0]
    needed = MIN_DRIVER.get(major)
    if driver.version is None or needed is None:
        return None
    if driver.cuda is not None:
        old = version(driver.cuda)[0] < major  # within a major, drivers run newer minors
    else:
        old = version(driver.version) < version(needed)
    runs = f" (CUDA up to {driver.cuda})" if driver.cuda else ""
    return f"the driver {driver.version}{runs} is too old: CUDA {major} needs {needed} or newer" if old else None


def update_driver(driver: Driver, older: str) -> str:
    """Update the driver, or take what is built for CUDA 12 where the driver runs that."""
    return "update the NVIDIA driver" + ("" if driver_too_old(driver, "12") else f", or {older}")


def _fitting(machine: Machine) -> int:
    """The CUDA major of the torch wheels that suit the GPU and its driver: those for CUDA 13 have no kernels for Volta."""
    capability = machine.gpus[0].compute_capability if machine.gpus else None
    if driver_too_old(machine.driver, "13") or (capability and version(capability) < (7, 5)):
        return 12
    return 13


def _architecture(machine: Machine) -> str | None:
    """Why torch has no kernels for the first GPU: those of sm_XY run on X.Z with Z >= Y."""
    capability = machine.gpus[0].compute_capability if machine.gpus else None
    built = [a for a in machine.library("torch").facts.get("architectures", ()) if re.fullmatch(r"sm_\d+", a)]
    if capability is None or not built:
        return None
    major, minor = version(capability)
    if any(int(a[3:-1]) == major and int(a[-1]) <= minor for a in built):
        return None
    gpu = machine.gpus[0].name
    return f"the {gpu} has compute capability {capability}, its kernels are for {', '.join(built)}"


def _wheel(cuda: int) -> str:
    return f"pip install --force-reinstall torch --index-url {TORCH_INDEX[cuda]}"


def onnxruntime_problems(machine: Machine) -> Iterator[Problem]:
    """Two builds in one directory; a GPU that this build cannot use."""
    library = machine.library("onnxruntime")
    if not library.works:
        return
    useless = machine.gpus and "CUDAExecutionProvider" not in library.facts.get("providers", ())
    both = [*both_onnxruntimes(machine, "gpu" if useless else "warning")]
    yield from both
    if not machine.gpus or both:
        return
    name, gpu = f"onnxruntime {library.version}", machine.gpus[0].name
    if useless:
        fix = f"pip uninstall -y {owner(machine, 'onnxruntime')} && pip install onnxruntime-gpu"
        yield Problem(f"{name} has no CUDA provider, although there is a GPU here ({gpu})", fix, "gpu")
    elif library.facts.get("cuda_loads") is False:
        lacks = library.facts.get("missing_library")
        why = f"{lacks} is missing" if lacks else "no reason given"
        fix = 'pip install "onnxruntime-gpu[cuda,cudnn]"'
        yield Problem(f"{name} cannot load its CUDA provider: {why}", fix, "gpu")


def both_onnxruntimes(machine: Machine, scope: str) -> Iterator[Problem]:
    builds = [name for name in ONNXRUNTIMES if name in machine.distributions]
    if len(builds) > 1:
        keep = "onnxruntime-gpu" if machine.gpus or "onnxruntime" not in builds else "onnxruntime"
        what = f"{' and '.join(builds)} are installed together and overwrite each other's files"
        yield Problem(what, f"pip uninstall -y {' '.join(builds)} && pip install {keep}", scope)


def owner(machine: Machine, package: str) -> str:
    """The distribution to install again for an import name."""
    if package == "onnxruntime":
        return next((name for name in ONNXRUNTIMES if name in machine.distributions), package)
    return package
