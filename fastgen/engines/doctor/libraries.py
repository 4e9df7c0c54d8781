"""The installed libraries: each is imported in its own process, so that one that crashes or hangs gives a line, not an end.

Run as a script with a library's name, it prints one line of JSON. It imports nothing of this package.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

TIMEOUT = 120.0  # seconds; a cold disk takes 30 to import torch
# y = Identity(x), float32 (1,), opset 17: enough to see whether a provider can be loaded
IDENTITY = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


@dataclass(frozen=True)
class Library:
    """A library of this environment. `version` is None when it is not installed; `error`: why its import fails."""

    name: str
    version: str | None = None
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        return self.version is not None and self.error is None


def inspect_all(names: Iterable[str]) -> dict[str, Library]:
    """Import each library in a process of its own, several at once."""
    chosen = list(names)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return dict(zip(chosen, pool.map(inspect, chosen), strict=True))


def inspect(name: str) -> Library:
    """Import a library in a process of its own and tell what it is."""
    if importlib.util.find_spec(name) is None:
        return Library(name)
    command = [sys.executable, "-P", __file__, name]  # by path, and -P keeps the modules beside it from hiding others
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        return Library(name, "?", f"import {name} hangs: no answer within {TIMEOUT:.0f} s")
    return read_answer(name, done.returncode, done.stdout, done.stderr)


def read_answer(name: str, status: int, stdout: str, stderr: str) -> Library:
    """The answer of the process of `inspect`, or how it ended without one."""
    lines = stdout.splitlines()
    if status == 0 and lines and lines[-1].startswith("{"):
        library = Library(name, **json.loads(lines[-1]))
        lacks = re.search(r"(lib[\w.+-]+): cannot open shared object", stderr)
        return replace(library, facts={**library.facts, "missing_library": lacks[1]}) if lacks else library
    last = next((line.strip() for line in reversed(stderr.splitlines()) if line.strip()), "no message")
    ended = f"killed by {_signal_name(-status)}" if status < 0 else last
    return Library(name, "?", f"import {name} fails: {ended}")


def distributions(found: Iterable[importlib.metadata.Distribution] | None = None) -> dict[str, str]:
    """Normalised name -> version of everything that pip installed."""
    names: dict[str, str] = {}
    for distribution in importlib.metadata.distributions() if found is None else found:
        name = distribution.metadata["Name"]
        if name:  # a half-removed one has none
            names.setdefault(re.sub(r"[-_.]+", "-", name).lower(), distribution.version)
    return names


def examine(name: str) -> dict[str, Any]:
    """In this process: version, error and facts of a library."""
    try:
        module = importlib.import_module(name)
    except (ImportError, OSError) as error:
        return {"version": "?", "error": f"import {name} fails: {type(error).__name__}: {_one_line(error)}"}
    told = getattr(module, "__version__", None)
    facts = FACTS.get(name, lambda module: {})(module)
    return {"version": str(told) if told else "?", "error": facts.pop("error", None), "facts": facts}


def torch_facts(torch: ModuleType) -> dict[str, Any]:
    """The CUDA that torch was built for, the GPUs that it sees, and whether a kernel runs on the first."""
    cuda = torch.cuda
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "available": cuda.is_available(), "gpus": [], "failure": None}
    facts["architectures"] = cuda.get_arch_list()
    facts["triton"] = importlib.util.find_spec("triton") is not None
    if torch.version.cuda:
        from torch.utils import cpp_extension

        facts["toolkit"] = cpp_extension.CUDA_HOME
    try:
        if torch.version.cuda and not cuda.is_available():
            cuda.init()
        for index in range(cuda.device_count() if cuda.is_available() else 0):
            one = cuda.get_device_properties(index)
            memory = one.total_memory // 2**20
            facts["gpus"].append({"name": one.name, "memory_mib": memory, "capability": f"{one.major}.{one.minor}"})
        if facts["gpus"]:
            (torch.ones(1, device="cuda") + 1).item()
    except (RuntimeError, AssertionError) as error:  # torch raises AssertionError where it was built without CUDA
        facts["failure"] = _one_line(error)
    return facts


def onnxruntime_facts(ort: ModuleType) -> dict[str, Any]:
    """Its providers, and those that can really be loaded: a listed one may lack its libraries."""
    if not hasattr(ort, "InferenceSession"):
        return {"error": "import onnxruntime gives an empty folder: a removed package left it half deleted"}
    listed = ort.get_available_providers()
    facts: dict[str, Any] = {"providers": listed, "cuda_loads": None}
    if "CUDAExecutionProvider" in listed:
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        session = ort.InferenceSession(IDENTITY, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
        facts["cuda_loads"] = "CUDAExecutionProvider" in session.get_providers()
    return facts


def tensorrt_facts(trt: ModuleType) -> dict[str, Any]:
    """The library that the bindings loaded (`libnvinfer.so.N`), and whether it is the real one: it can make a runtime."""
    facts: dict[str, Any] = {"loaded": loaded_nvinfer(_maps()), "runtime": True}
    try:
        trt.Runtime(trt.Logger(trt.Logger.ERROR))
    except (TypeError, RuntimeError, AttributeError):  # a null pointer is a TypeError; stubs lack the class
        facts["runtime"] = False
    return facts


def openvino_facts(openvino: ModuleType) -> dict[str, Any]:
    """Devices, and the precisions that the CPU executes."""
    core = openvino.Core()
    return {"devices": core.available_devices, "dtypes": core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")}


FACTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "torch": torch_facts,
    "onnxruntime": onnxruntime_facts,
    "tensorrt": tensorrt_facts,
    "tensorrt_rtx": tensorrt_facts,
    "openvino": openvino_facts,
}


def loaded_nvinfer(maps: str) -> int | None:
    """The N of the libnvinfer.so.N in the text of /proc/self/maps."""
    match = re.search(r"/libnvinfer\.so\.(\d+)", maps)
    return int(match[1]) if match else None


def _maps() -> str:
    try:
        return Path("/proc/self/maps").read_text()
    except OSError:  # not Linux
        return ""


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    print(json.dumps(examine(sys.argv[1])))
