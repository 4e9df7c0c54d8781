"""Output of a training run: log.jsonl, and messages beside the progress bar."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from tqdm import tqdm

from fastgen.errors import InputError
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief, read_bytes, write_bytes
from fastgen.training.processes import is_main

Tracker = Callable[[Mapping[str, float], int], None]


def say(text: str) -> None:
    """Print a line on stderr above the progress bar; only the main process prints."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


class TrainingLog:
    """log.jsonl: one row per interval of a stage. `tracker(values, step)` gets the numbers of each row too, as "stage/name"."""

    def __init__(self, path: Path, tracker: Tracker | None = None) -> None:
        self.path, self.tracker = path, tracker

    def rewind(self, stage: str, step: int) -> None:
        """Delete the rows of `stage` after `step`, which a resumed run writes again, and an incomplete last line."""
        if not self.path.exists():
            return
        past = [line for line, row in self._rows() if row["stage"] != stage or row["step"] <= step]
        content = b"".join(past)
        if content != read_bytes(self.path):
            write_bytes(self.path, content)

    def write(self, row: Mapping[str, str | int | float]) -> None:
        finite = {k: v for k, v in row.items() if isinstance(v, str) or math.isfinite(v)}  # fp16 may skip a step
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
        if self.tracker is not None:
            stage, step = row["stage"], int(row["step"])
            self.tracker({f"{stage}/{k}": float(v) for k, v in row.items() if k not in ("stage", "step")}, step)

    def rows(self, stage: str) -> list[dict[str, Any]]:
        """The rows of one stage."""
        return [row for _, row in self._rows() if row["stage"] == stage]

    def check(self) -> None:
        """InputError for a damaged log. An incomplete last line, of a killed process, is no damage."""
        self._rows()

    def _rows(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Each complete line, and what it says."""
        rows = []
        lines = read_bytes(self.path, limit=MAX_DATA_BYTES).splitlines(keepends=True) if self.path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n") or not line.strip():
                continue
            try:
                row = msgspec.json.decode(line, type=dict[str, str | int | float])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise InputError(f"{self.path}: line {number}: {error}, expected a row of the log") from None
            if not isinstance(row.get("stage"), str) or not isinstance(row.get("step"), int):
                raise InputError(f"{self.path}: line {number}: found {brief(row)}, expected a row with stage and step")
            rows.append((line, row))
        return rows
