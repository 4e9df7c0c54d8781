"""Output of a training run: log.jsonl, and messages beside the progress bar."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from tqdm import tqdm

from fastgen.files.jsonfiles import read_jsonl, write_bytes
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
        lines = self.path.read_bytes().splitlines(keepends=True)
        complete = [line for line in lines if line.endswith(b"\n")]
        past = [line for line in complete if (row := json.loads(line))["stage"] != stage or row["step"] <= step]
        if len(past) != len(lines):
            write_bytes(self.path, b"".join(past))

    def write(self, row: Mapping[str, str | int | float]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            stage, step = row["stage"], int(row["step"])
            self.tracker({f"{stage}/{k}": float(v) for k, v in row.items() if k not in ("stage", "step")}, step)

    def rows(self, stage: str) -> list[dict[str, float]]:
        return [row for _, row in read_jsonl(self.path) if row["stage"] == stage] if self.path.exists() else []
