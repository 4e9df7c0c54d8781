"""`fastgen doctor`: hardware, libraries and caches of this machine, and for each engine `ready` or its problems."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastgen import __version__
from fastgen.engines.cache.listing import folder_bytes, size_text
from fastgen.engines.doctor.diagnosis import Cache, Machine, Problem
from fastgen.engines.doctor.libraries import Library, distributions, inspect_all
from fastgen.engines.machine import Gpu, cpu, gpus, slow_precisions, version
from fastgen.engines.trt.platform import driver_cuda
from fastgen.engines.trt.problems import tensorrt_parts
from fastgen.engines.trt.product import PRODUCTS

KNOWN = ("torch", "onnxruntime", "tensorrt", "openvino")  # shown whether an engine needs them or not


@dataclass(frozen=True)
class Verdict:
    """Whether an engine can run here, and its problems."""

    engine: str
    problems: list[Problem]

    @property
    def ready(self) -> bool:
        return all(p.scope != "engine" for p in self.problems)

    @property
    def state(self) -> str:
        """`ready`, `ready on the CPU only` or `not ready`."""
        if not self.ready:
            return "not ready"
        return "ready on the CPU only" if any(p.scope == "gpu" for p in self.problems) else "ready"


@dataclass(frozen=True)
class MachineReport:
    """The result of `fastgen doctor`."""

    machine: Machine
    verdicts: list[Verdict]

    @property
    def ready(self) -> bool:
        """At least one engine can run."""
        return any(verdict.ready for verdict in self.verdicts)

    def lines(self) -> list[str]:
        width = 2 + max(map(len, [*self.machine.libraries, *(v.engine for v in self.verdicts), "compiler"]))
        rows = [*hardware(self.machine), *software(self.machine), ("", ""), *engine_rows(self.verdicts)]
        return [f"{name:{width}}{text}".rstrip() for name, text in rows]

    def to_json(self) -> dict[str, Any]:
        engines = {v.engine: {"ready": v.ready, "state": v.state, **asdict(v)} for v in self.verdicts}
        return {"fastgen": __version__, **asdict(self.machine), "engines": engines}


def examine(engines: Sequence[str] | None = None) -> MachineReport:
    """Probe this machine and judge these engines, by default every one. Takes about as long as importing their packages."""
    from fastgen.engines import engine_class, engine_names

    classes = {name: engine_class(name) for name in (engine_names() if engines is None else engines)}
    needed = [package for engine in classes.values() for package in engine.packages]
    machine = probe(list(dict.fromkeys([*(KNOWN if engines is None else ()), *needed])))
    return MachineReport(machine, [Verdict(name, engine.problems(machine)) for name, engine in classes.items()])


def probe(names: list[str]) -> Machine:
    """Everything about this machine; each of these libraries is imported in its own process."""
    cards, driver = gpus()
    imported = inspect_all(names)
    if not cards and (torch := imported.get("torch")):
        cards = [Gpu(g["name"], g["memory_mib"], g["capability"]) for g in torch.facts.get("gpus", ())]
    if driver.version and driver.cuda is None and (told := driver_cuda()):
        driver = replace(driver, cuda="{}.{}".format(*told))
    compiler = shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    headers = (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return Machine(cpu(), cards, driver, imported, distributions(), cache(), compiler, headers, visible)


def cache() -> Cache:
    """Where the cache is, whether it can be used, and what it holds."""
    from fastgen.engines.cache.artifacts import scan
    from fastgen.errors import InputError
    from fastgen.files.cachedir import cache_dir

    try:
        folder = cache_dir()
        sound, damaged = scan()
    except InputError as error:
        return Cache(None, error=str(error))
    counts = Counter(artifact.recipe.engine for artifact in sound)
    return Cache(str(folder), folder_bytes(folder), dict(counts), len(damaged))


def hardware(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "fastgen", f"{__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    for index, gpu in enumerate(machine.gpus):
        yield f"GPU {index}", _gpu_line(gpu)
    if not machine.gpus:
        yield "GPU", machine.driver.error or "none"
    elif machine.driver.version:
        cuda = f"CUDA up to {machine.driver.cuda}" if machine.driver.cuda else "CUDA version not told"
        yield "driver", f"{machine.driver.version}, {cuda}"
    one = machine.cpu
    cores = f"{one.cores} core{'' if one.cores == 1 else 's'}"
    yield "CPU", ", ".join([one.name, cores, *([" ".join(one.isa)] if one.isa else [])])
    slow = slow_precisions(one)  # fp16 is for GPUs
    yield from (("", slow[dtype]) for dtype in ("bf16", "int8") if dtype in slow)
    if one.memory:
        free = f", {one.memory_free / 2**30:.1f} GiB free" if one.memory_free else ""
        yield "memory", f"{one.memory / 2**30:.1f} GiB{free}"


def software(machine: Machine) -> Iterator[tuple[str, str]]:
    for library in machine.libraries.values():
        yield library.name, library_line(library, machine)
    yield "compiler", machine.compiler or "no C++ compiler"
    cache = machine.cache
    if cache.error:
        yield "cache", cache.error
        return
    engines = ", ".join(f"{count} {name}" for name, count in cache.engines.items()) or "none"
    damaged = f", {cache.damaged} damaged" if cache.damaged else ""
    yield "cache", f"{cache.folder}: private, {size_text(cache.bytes)}, compiled engines: {engines}{damaged}"


def library_line(library: Library, machine: Machine) -> str:
    """The version, and the facts that engines depend on: torch's CUDA, providers, TensorRT's ABI, the CPU's precisions."""
    facts = library.facts
    parts = tensorrt_parts(PRODUCTS[library.name], machine.distributions) if library.name in PRODUCTS else {}
    if library.version is None:
        return "not installed" + (f" (but {', '.join(parts)})" if parts else "")
    if library.error:
        return library.error
    text = library.version.partition("-")[0]
    if library.name == "torch":
        seen = f"{len(facts['gpus'])} GPU{'' if len(facts['gpus']) == 1 else 's'}"
        text += f", CUDA {facts['cuda']}, {seen}" if facts["cuda"] else ", no CUDA"
    elif library.name == "onnxruntime":
        text += f", {', '.join(p.removesuffix('ExecutionProvider') for p in facts['providers'])}"
    elif library.name in PRODUCTS:
        cudas = sorted({f"CUDA {part[0]}" for part in parts.values() if part[0]})
        abi = [f"libnvinfer.so.{facts['loaded']}"] if facts["loaded"] else []
        text += f" ({', '.join([*cudas, *abi, *parts])})"
    elif library.name == "openvino":
        text += f", CPU {', '.join(d for d in facts['dtypes'] if d in ('FP32', 'FP16', 'BF16', 'INT8'))}"
    return text


def engine_rows(verdicts: list[Verdict]) -> Iterator[tuple[str, str]]:
    for verdict in verdicts:
        if len(verdict.problems) == 1:
            joint = ", but " if verdict.state == "ready" else ": "
            yield verdict.engine, f"{verdict.state}{joint}{verdict.problems[0]}"
            continue
        yield verdict.engine, verdict.state
        for problem in verdict.problems:
            yield "", f"- {problem}"


def _gpu_line(gpu: Gpu) -> str:
    cells = [gpu.name]
    if gpu.memory_mib:
        cells.append(f"{gpu.memory_mib / 1024:.1f} GiB")
    if gpu.compute_capability:
        bf16 = version(gpu.compute_capability) >= (8, 0)
        cells += [f"compute capability {gpu.compute_capability}", "bf16 and fp16" if bf16 else "fp16, no bf16"]
    return ", ".join(cells)
