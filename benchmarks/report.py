"""What all benchmarks share: timing, parity, the JSON and the printed table."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.machine import environment

RESULTS = Path(__file__).parent / "results"


def timed(call: Callable[[], Any]) -> float:
    """Wall-clock seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of the values do not exceed, interpolated."""
    return float(np.percentile(np.asarray(values), percent))


def parity(expected: np.ndarray, found: np.ndarray) -> dict[str, Any]:
    """PSNR in dB (None where nothing differs) and the largest difference in grey levels, of uint8 images."""
    difference = expected.astype(np.int16) - found
    error = float(np.mean(np.square(difference, dtype=np.float64)))
    return {
        "psnr_db": 10 * np.log10(255**2 / error) if error else None,
        "max_abs_255": int(np.abs(difference).max()),
    }


def report(out: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the JSON and print the table."""
    save(out, settings, rows)
    print(", ".join(f"{key.replace('_', ' ')} {value}" for key, value in settings.items()))
    print(table(rows))


def save(out: Path, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], **more: Any) -> None:
    """{"settings", "environment", "rows"} as JSON."""
    out.parent.mkdir(parents=True, exist_ok=True)
    value = {"settings": dict(settings), "environment": environment(), "rows": rows, **more}
    out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same keys, aligned; floats with three digits."""
    cells = [[key.replace("_", " ") for key in rows[0]], *([cell(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in cells)


def cell(value: Any) -> str:
    """None as "-", a float with three digits and no exponent below a million."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"
    return str(value)


def replaced(text: str, begin: str, end: str, new: str) -> str:
    """A text with `new` between its marks `begin` and `end`. ValueError where it has not both."""
    before, found, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not (found and last):
        raise ValueError(f"no lines between {begin.strip()} and {end.strip()}")
    return before + begin + new + end + after
