"""What all benchmarks share: interleaved timing, parity beside every figure, and the machine they were taken on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("numpy", "torch", "diffusers", "transformers", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Opened:
    """A side that is loaded. `generate` makes one batch, uint8 (B, H, W, 3)."""

    generate: Callable[[], np.ndarray]
    dtype: str


@dataclass(frozen=True)
class Side:
    """One way to generate the same images; `open` imports and loads what it needs."""

    name: str
    open: Callable[[], Opened]


def compare(sides: Sequence[Side], *, rounds: int, seconds: float = float("inf")) -> list[dict[str, Any]]:
    """Time the sides in turn, `rounds` times after a first batch each, and compare their images with the first side's.

    No new round begins after `seconds`. Rows: `first_s` is loading and the first batch (compilation included), the ratios
    are of batches of one round, so that a busy machine slows both; spreads are minimum and maximum.
    """
    start = time.perf_counter()
    opened, images, first = [], [], []
    for side in sides:
        began = time.perf_counter()
        opened.append(side.open())
        images.append(opened[-1].generate())
        first.append(time.perf_counter() - began)
    times: list[list[float]] = [[] for _ in sides]
    for done in range(rounds):
        if done and time.perf_counter() - start > seconds:
            break
        for one, taken in zip(opened, times, strict=True):
            taken.append(timed(one.generate))
    return [
        {"side": side.name, "dtype": opened[i].dtype}
        | _speed(times[i], times[0], len(images[i]))
        | {"first_s": first[i]}
        | parity(images[0], images[i])
        for i, side in enumerate(sides)
    ]


def timed(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def _speed(times: Sequence[float], reference: Sequence[float], count: int) -> dict[str, Any]:
    ratios = [r / t for r, t in zip(reference, times, strict=True)]
    median = statistics.median(times)
    return {
        "seconds": median,
        "spread_s": spread(times),
        "images_per_s": count / median,
        "ratio": statistics.median(ratios),
        "ratio_spread": spread(ratios),
        "rounds": len(times),
    }


def parity(expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """PSNR in dB (None where nothing differs) and the largest difference in grey levels, of uint8 images."""
    difference = expected.astype(np.int16) - found
    error = float(np.mean(np.square(difference, dtype=np.float64)))
    return {
        "psnr_db": 10 * np.log10(255**2 / error) if error else None,
        "max_abs_255": int(np.abs(difference).max()),
    }


def environment() -> dict[str, Any]:
    """Hardware, versions, commit, and how busy the machine is (load average over a minute)."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {p: v for p in PACKAGES if (v := _version(p))},
        "commit": _commit(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    name = names[0] if names else platform.processor() or platform.machine()
    return name + "".join(f" {f}" for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        command = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def report(out: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the JSON and print the table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    value = {"settings": dict(settings), "environment": environment(), "rows": rows}
    out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()))
    print(table(rows))


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys, aligned; floats with three digits."""
    cells = [[key.replace("_", " ") for key in rows[0]], *([_cell(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
