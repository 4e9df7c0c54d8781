"""Networks as AOTInductor packages: the tools that they need, building one, and opening one."""

from __future__ import annotations

import hashlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.engines import machine
from fastgen.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fastgen.engines.doctor.diagnosis import Machine, Problem

PACKAGE, CONSTANTS = "network.pt2", "constants.safetensors"
MIN_TORCH = 2, 8  # the first with packages for `cuda:N` and weights that a package uses in place
BF16, FP16 = {"avx512_bf16", "amx_bf16", "bf16"}, {"avx512_fp16", "amx_fp16", "fphp"}  # of a CPU's instruction sets


def check_torch(version: str) -> None:
    """InputError for a torch without what this engine uses."""
    if machine.version(version) < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        raise InputError(f"engine compile needs torch {needed} or newer, found {version}: pip install -U torch")


def cpu_dtypes() -> list[str]:
    """What this CPU multiplies natively, the default first."""
    isa = set(machine.cpu().isa)
    return [*(["bf16"] if isa & BF16 else []), "fp32", *(["fp16"] if isa & FP16 else [])]


def options(on_gpu: bool) -> dict[str, Any]:
    """Inductor's settings. CPU: weights are folded and laid out for oneDNN, in the package. GPU: the package holds code only;
    inductor makes no CUDA graphs, as the caller records one."""
    if on_gpu:
        return {"aot_inductor.package_constants_in_so": False, "triton.cudagraphs": False}
    return {"freezing": True, "aot_inductor.precompile_headers": False}  # headers would be compiled for each package


def hardware(device: torch.device) -> dict[str, Any]:
    """Fields of the hardware in a package's cache key. Code for a CPU depends on its instruction sets and number of threads."""
    import torch

    if device.type == "cpu":
        threads = torch.get_num_threads()
        return {"device": "cpu", "cpu": machine.cpu().name, "cpu_flags": _cpu_flags(), "threads": threads}
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "device": "cuda",
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def check_tools(on_gpu: bool) -> None:
    """InputError when a compiler is missing: C++ for the package, and on a GPU triton and CUDA's headers."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise InputError(
            "engine compile needs a C++ compiler, and none runs here: apt-get install g++, or set CXX to yours"
        ) from None
    if not on_gpu:
        return
    from torch.utils import cpp_extension
    from torch.utils._triton import has_triton

    if not has_triton():
        raise InputError(
            "engine compile needs triton for this GPU (compute capability 7.0 or newer): pip install triton"
        )
    if cpp_extension.CUDA_HOME is None:
        raise InputError(
            "engine compile needs CUDA's headers, and no CUDA toolkit was found: install one, or set CUDA_HOME to yours"
        )


def tool_problems(there: Machine) -> Iterator[Problem]:
    """Tools that a machine lacks: torch.compile writes C++ for CPUs, and for the launchers of GPU kernels."""
    from fastgen.engines.doctor.diagnosis import Problem

    if there.compiler is None:
        name = os.environ.get("CXX") or "g++"
        yield Problem(f"no C++ compiler ({name} is not on the PATH)", "apt-get install g++, or set CXX to yours")
    if not there.headers:
        yield Problem("no Python headers (Python.h), which compiled kernels include", "apt-get install python3-dev")
    torch = there.library("torch")
    if torch.version and machine.version(torch.version) < MIN_TORCH:
        yield Problem(
            f"torch is {torch.version}, {'.'.join(map(str, MIN_TORCH))} or newer is needed", "pip install -U torch"
        )
    if there.gpus and torch.facts.get("available"):
        if not torch.facts.get("triton"):
            yield Problem("triton, which compiles GPU kernels, is not installed", "pip install triton", "gpu")
        if not torch.facts.get("toolkit"):
            what = "no CUDA toolkit, whose headers compiled networks include"
            yield Problem(what, "install one, or set CUDA_HOME to yours", "gpu")


def build(module: nn.Module, inputs: Sequence[Tensor], settings: dict[str, Any], folder: Path) -> None:
    """Export `module` at the shapes of `inputs`, compile it, and write the package into `folder`.

    Constants of the exported graph that are no weights of the module are written to a file beside it. Temporary files of the
    compilers are deleted.
    """
    import torch
    from safetensors.torch import save_file
    from torch._inductor.utils import fresh_cache

    logging.getLogger("torch._inductor.utils").setLevel(logging.ERROR)  # it names files that are deleted
    with warnings.catch_warnings(), fresh_cache(dir=str(folder)), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's own deprecations
        program = torch.export.export(module, tuple(inputs), strict=False)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(folder / PACKAGE), inductor_configs=dict(settings)
        )
    weights = named_weights(module)
    extra = {
        k: v.contiguous() for k, v in program.constants.items() if isinstance(v, torch.Tensor) and k not in weights
    }
    if extra:
        save_file(extra, folder / CONSTANTS, metadata={k: v.device.type for k, v in extra.items()})


@dataclass(frozen=True)
class Package:
    """A network that is ready to run. `weights`: those that it uses, if the package holds none."""

    loader: Any
    weights: Mapping[str, Tensor] | None

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Contiguous inputs of the shapes it was built for -> outputs, new tensors."""
        return tuple(self.loader.run(list(inputs)))


def open_package(folder: Path, device: torch.device, weights: Mapping[str, Tensor] | None) -> Package:
    """Load a package. `weights`: those of its module on the device, for a package that holds none; it uses them in place.

    On a GPU a package does not synchronise, so that it can be captured: only one thread at a time may run it.
    """
    import torch

    on_gpu = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else -1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch._inductor.aoti_load_package(
            str(folder / PACKAGE), run_single_threaded=on_gpu, device_index=index
        )
    if weights is None:
        return Package(loaded.loader, None)
    tensors = {**weights, **_constants(folder / CONSTANTS, device)}
    used = {name: tensors[name] for name in loaded.get_constant_fqns()}
    loaded.load_constants(used, check_full_update=True, user_managed=True)
    return Package(loaded.loader, used)


def _constants(path: Path, device: torch.device) -> dict[str, Tensor]:
    """The constants in a file, each on the kind of device that it was compiled for."""
    from safetensors import safe_open

    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        kinds = file.metadata()
        return {k: file.get_tensor(k).to("cpu" if kinds[k] == "cpu" else device) for k in file.keys()}  # noqa: SIM118


def named_weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under the names that a package knows them by."""
    return {k: v.detach() for k, v in (*module.named_parameters(), *module.named_buffers())}


def _cpu_flags() -> str:
    """SHA-256 of the CPU's instruction sets as Linux lists them; elsewhere of its name."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), machine.cpu().name)
    return hashlib.sha256(" ".join(sorted(flags.split())).encode()).hexdigest()
