"""The hardware: GPUs and driver as nvidia-smi prints them, CPU, memory. The parsers take text, so that tests need no GPU."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

X86 = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16", "amx_fp16")
ARM = ("asimd", "asimddp", "fphp", "i8mm", "bf16", "sve", "sve2")
INT8 = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
# What torch computes in 16 bits without a detour; bf16 in any AVX-512 too.
HALF = {"bf16": {"avx512f", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "fphp"}}
ISA = (*X86, *ARM)  # kernels are chosen by these
UNLIMITED = 2**60  # version 1 of control groups says a larger number where there is no limit
QUERIES = ("name,memory.total,driver_version,compute_cap", "name,memory.total,driver_version")  # drivers before 510
Smi = Callable[..., tuple[int, str]]  # nvidia-smi's arguments -> (exit status, stdout and stderr)


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU. `memory_mib` and `compute_capability` ("9.0") are None where nvidia-smi does not print them."""

    name: str
    memory_mib: int | None
    compute_capability: str | None


@dataclass(frozen=True)
class Driver:
    """The NVIDIA driver. `cuda`: the newest CUDA version it supports; `error`: why nothing is known."""

    version: str | None
    cuda: str | None
    error: str | None = None


@dataclass(frozen=True)
class Cpu:
    """`cores`: those that this process may use; `isa`: its instruction sets among `ISA`; memory in bytes: the
    machine's, or less where a container or a job has a limit; None if unknown."""

    name: str
    cores: int
    isa: tuple[str, ...]
    memory: int | None
    memory_free: int | None


def nvidia_smi(*arguments: str) -> tuple[int, str]:
    """Run nvidia-smi -> (exit status, output). Raises FileNotFoundError where there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        raise FileNotFoundError("nvidia-smi")
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, errors="replace", timeout=20)
    except subprocess.TimeoutExpired:
        return 124, "no answer within 20 s"
    except OSError as error:
        return 126, error.strerror or str(error)
    return done.returncode, done.stdout + done.stderr


def gpus(smi: Smi = nvidia_smi) -> tuple[list[Gpu], Driver]:
    """The NVIDIA GPUs of this machine and their driver."""
    status, text, first_failure = 0, "", ""
    for query in QUERIES:
        try:
            status, text = smi(f"--query-gpu={query}", "--format=csv,noheader")
        except FileNotFoundError:
            return [], Driver(None, None, "no NVIDIA driver (nvidia-smi is not there)")
        if status == 0:
            break
        first_failure = first_failure or f"nvidia-smi fails with status {status}: {_first_line(text)}"
    if status != 0:
        return [], Driver(None, None, first_failure)
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines() if line.count(",") >= 2]
    if not rows:
        return [], Driver(None, None, f"nvidia-smi lists no GPU: {_first_line(text)}")
    cards = [Gpu(name, _mib(memory), _capability(rest)) for name, memory, _, *rest in rows]
    return cards, Driver(rows[0][2], _driver_cuda(smi))


def cpu(cpuinfo: str | None = None, meminfo: str | None = None) -> Cpu:
    """The CPU and the memory, from the text of /proc/cpuinfo and /proc/meminfo, and from this process's control groups where
    no text is given."""
    info = _pairs(_read("/proc/cpuinfo") if cpuinfo is None else cpuinfo)
    memory = _pairs(_read("/proc/meminfo") if meminfo is None else meminfo)
    flags = set((info.get("flags") or info.get("Features") or "").split())
    name = info.get("model name") or info.get("Model") or platform.processor() or platform.machine()
    isa = tuple(flag for flag in ISA if flag in flags)
    total, free = _kib(memory, "MemTotal"), _kib(memory, "MemAvailable")
    if meminfo is None:
        for limit, left in memory_limits():
            total, free = (x if y is None else min(x, y) for x, y in ((limit, total), (left, free)))
    return Cpu(name, usable_cores(), isa, total, free)


def memory_limits(groups: str | None = None, root: Path = Path("/sys/fs/cgroup")) -> Iterator[tuple[int, int]]:
    """(limit, bytes that are still free) of each control group of this process that has a limit; containers and Slurm set them.
    The cache of files counts as free. `groups`: the text of /proc/self/cgroup; `root`: where versions 2 and 1 are mounted."""
    for line in (_read("/proc/self/cgroup") if groups is None else groups).splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers == "":
            base, names, prefix = root, ("memory.max", "memory.current"), ""
        elif "memory" in controllers.split(","):
            base, names, prefix = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        else:
            continue
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            limit, used = (_read(str(folder / name)).strip() for name in names)
            if limit.isdecimal() and used.isdecimal() and int(limit) < UNLIMITED:
                lines = _read(str(folder / "memory.stat")).splitlines()
                pairs = {name: value for name, _, value in (line.partition(" ") for line in lines)}
                files = sum(int(pairs.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(limit), max(0, int(limit) - int(used) + files)
            if folder == base:
                break


def has_int8(cpu: Cpu) -> bool:
    """Whether a CPU multiplies 8-bit integers in instructions of their own, faster than fp32."""
    return not INT8.isdisjoint(cpu.isa)


def has_half(cpu: Cpu, dtype: str) -> bool:
    """Whether torch computes "bf16" or "fp16" on this CPU about as fast as fp32 or faster, not many times slower."""
    return not HALF[dtype].isdisjoint(cpu.isa)


def slow_precisions(cpu: Cpu) -> dict[str, str]:
    """Precision -> what to say of it, where this CPU lacks instructions for it; empty where its instructions are unknown."""
    lines = {}
    for dtype in HALF:
        if not has_half(cpu, dtype):
            lines[dtype] = f"no instructions for {dtype}: engines take fp32, and torch in {dtype} is many times slower"
    if not has_int8(cpu):
        lines["int8"] = "no instructions for int8 (VNNI, AMX or i8mm): it runs, but may be slower than fp32"
    return lines if cpu.isa else {}


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def version(text: str) -> tuple[int, ...]:
    """`12.4` -> (12, 4): the leading numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def _driver_cuda(smi: Smi) -> str | None:
    status, text = smi()
    match = re.search(r"CUDA (?:UMD )?Version\s*:\s*(\d+\.\d+)", text)
    return match[1] if status == 0 and match else None


def _mib(text: str) -> int | None:
    match = re.fullmatch(r"(\d+) MiB", text)
    return int(match[1]) if match else None


def _capability(cells: list[str]) -> str | None:
    return cells[0] if cells and re.fullmatch(r"\d+\.\d+", cells[0]) else None


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no output")


def _pairs(text: str) -> dict[str, str]:
    """`key : value` lines, the first of each key."""
    pairs: dict[str, str] = {}
    for line in text.splitlines():
        key, separator, value = line.partition(":")
        if separator:
            pairs.setdefault(key.strip(), value.strip())
    return pairs


def _kib(pairs: Mapping[str, str], key: str) -> int | None:
    match = re.fullmatch(r"(\d+) kB", pairs.get(key, ""))
    return int(match[1]) * 1024 if match else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:  # not Linux
        return ""
