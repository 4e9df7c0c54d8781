"""Solver tables: a sampler compiled to numbers, and the file that stores many of them. NumPy only."""

from __future__ import annotations

import difflib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from fastgen.errors import InputError
from fastgen.files.arrays import ArrayFile
from fastgen.files.installing import hint
from fastgen.files.jsonfiles import brief, located, parse_json, write_bytes
from fastgen.files.records import MAX_STEPS, Count, Name, Record, Steps, to_record

FORMAT = 1
MAX_ROWS = 4 * MAX_STEPS  # network evaluations of a table; solvers of a higher order take several per step
MAX_TABLES_BYTES = 2**26  # of a file's arrays together; an export stores 2 MB
LARGEST = 1e30  # of a coefficient: network and loop compute in float32
COLUMNS = ("timesteps", "scale", "p", "q", "r", "x0_p", "x0_q", "a", "d", "c", "streams")
META = ("name", "num_inference_steps", "noise_steps", "prediction_type", "basis", "clip", "init_alpha", "init_sigma")

Coefficient = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Basis = Literal["net", "solver", "x0", "eps"]
MetaValues = tuple[Name, Steps, Steps | None, Name, Basis, Coefficient | None, Coefficient, Coefficient]  # as META
# Of a table: where it begins in its solver's array, its columns, its rows, and the values of META.
Entry = tuple[
    Count,
    Annotated[int, Meta(ge=len(COLUMNS) + 1, le=len(COLUMNS) + 100)],
    Annotated[int, Meta(ge=1, le=MAX_ROWS)],
    MetaValues,
]


_KEY = re.compile(r"([^:\s\x00-\x1f]{1,100}):(0*[1-9][0-9]{0,11})(?::(0*[1-9][0-9]{0,11}))?")


class TablesIndex(Record, frozen=True):
    """The array `index` of a file of tables, which is JSON: an entry by key."""

    format: Literal[1]
    tables: Annotated[dict[str, Entry], Meta(min_length=1, max_length=100_000)]

    def __post_init__(self) -> None:
        for key, (_, _, _, (name, steps, noise_steps, *_)) in self.tables.items():
            if parse_key(key) != (name, steps, noise_steps):
                raise InputError(f"tables[{key!r}]: holds {format_key(name, steps, noise_steps)}")


@dataclass(frozen=True, eq=False)
class SolverTable:
    """A sampler as numbers: row i is the i-th network evaluation, R in all; arrays are float64 (R,) unless noted.

    With x the state, net = network(scale * x, timesteps) and m the newest H predictions, m[0] this row's:

        x0 = clip(x0_p * x + x0_q * net)            only when `clip` is set, to [-clip, clip]
        m[0] = p * x + q * net + r * x0
        x <- a * x + sum_h b[h] * m[h] + d * x0 + c * z

    z is noise of stream `streams[i]` (int64: 1 + the row's index in the full schedule). A run starts from
    `init_alpha * clean + init_sigma * noise`; a full start has init_alpha 0. `basis` says what m[0] is: "net" the
    network's output, "solver" the scheduler's own conversion of it (to clean sample or noise), "x0" the clean sample,
    "eps" the noise up to a factor. Raises InputError if the arrays do not fit together or are not finite.
    """

    timesteps: np.ndarray
    scale: np.ndarray
    p: np.ndarray
    q: np.ndarray
    r: np.ndarray
    x0_p: np.ndarray
    x0_q: np.ndarray
    a: np.ndarray
    b: np.ndarray  # (R, H)
    d: np.ndarray
    c: np.ndarray
    streams: np.ndarray  # (R,) int64
    clip: float | None
    init_alpha: float
    init_sigma: float
    name: str
    num_inference_steps: int
    noise_steps: int | None
    prediction_type: str
    basis: str

    def __post_init__(self) -> None:
        rows = len(self.timesteps)
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, np.ndarray):
                continue
            if value.shape[:1] != (rows,) or value.ndim != (2 if field.name == "b" else 1):
                raise InputError(
                    f"solver table {self.name}: {field.name} has shape {value.shape}, expected {rows} rows"
                )
            if not np.isfinite(value).all():
                raise InputError(f"solver table {self.name}: {field.name} is not finite")
            if not (np.abs(value) <= LARGEST).all():
                raise InputError(f"solver table {self.name}: {field.name} holds a number above {LARGEST:g}")
            value.setflags(write=False)

    def __len__(self) -> int:
        """Network evaluations R."""
        return len(self.timesteps)

    @property
    def depth(self) -> int:
        """H, how many predictions a step uses, the newest included."""
        return self.b.shape[1]

    @property
    def key(self) -> str:
        return format_key(self.name, self.num_inference_steps, self.noise_steps)


def format_key(name: str, num_inference_steps: int, noise_steps: int | None = None) -> str:
    """`NAME:STEPS` or `NAME:STEPS:NOISE_STEPS`."""
    return f"{name}:{num_inference_steps}" + ("" if noise_steps is None else f":{noise_steps}")


def parse_key(key: str) -> tuple[str, int, int | None]:
    """`NAME:STEPS[:NOISE_STEPS]` -> (name, num_inference_steps, noise_steps or None). Raises InputError."""
    match = _KEY.fullmatch(key)
    if match is None:
        raise InputError(f"solver {brief(key)} is not NAME:STEPS[:NOISE_STEPS], for example ddim:50 or ddim:50:30")
    name, steps, noise_steps = match[1], int(match[2]), None if match[3] is None else int(match[3])
    if steps > MAX_STEPS:
        raise InputError(f"solver {brief(key)}: found {steps} steps, expected 1 to {MAX_STEPS}")
    if noise_steps is not None and noise_steps > steps:
        raise InputError(f"solver {key!r}: {noise_steps} noise steps of {steps}, expected 1 to {steps}")
    return name, steps, noise_steps


def nearest_key(key: str, keys: Iterable[str]) -> str | None:
    """The key of the same solver with the nearest number of steps, else of the solver with the nearest name."""
    name, steps, noise_steps = parse_key(key)
    parsed = [(parse_key(other), other) for other in keys]
    names = difflib.get_close_matches(name, {other_name for (other_name, _, _), _ in parsed}, n=1, cutoff=0)
    if not names:
        return None

    def distance(steps_there: int, noise_there: int | None) -> tuple[bool, int, int]:
        late = (noise_there is None) != (noise_steps is None)
        return late, abs(steps_there - steps), abs((noise_there or 0) - (noise_steps or 0))

    return min((distance(*other[1:]), text) for other, text in parsed if other[0] == names[0])[1]


def save_tables(path: str | Path, tables: Mapping[str, SolverTable]) -> None:
    """Write tables, by key, as one compressed .npz without pickle: an array per solver name and a JSON index."""
    index: dict[str, list] = {}
    groups: dict[str, list[np.ndarray]] = {}
    for key, table in tables.items():
        group = groups.setdefault(parse_key(key)[0], [])
        matrix = np.concatenate([np.stack([getattr(table, column) for column in COLUMNS]), table.b.T])  # (11 + H, R)
        index[key] = [sum(map(len, group)), *matrix.shape, [getattr(table, name) for name in META]]
        group.append(matrix.astype("<f8").ravel())
    header = json.dumps({"format": FORMAT, "tables": index}, separators=(",", ":"))
    arrays = {f"solver_{name}": np.concatenate(group) for name, group in groups.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, index=np.frombuffer(header.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    write_bytes(path, buffer.getvalue())


class TableStore:
    """The tables of one file by key; a table is read when it is asked for. Raises InputError for a damaged file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._arrays = ArrayFile(self.path, MAX_TABLES_BYTES, "export the bundle again")
        text = self._arrays.read("index", np.uint8).tobytes()
        index = to_record(parse_json(text, f"{self.path}: index"), TablesIndex, f"{self.path}: index")
        self._index: dict[str, Entry] = index.tables

    def names(self) -> list[str]:
        """The stored keys."""
        return list(self._index)

    def __contains__(self, key: str) -> bool:
        return key in self._index

    def get(self, key: str) -> SolverTable:
        """The table stored under `key`. Raises InputError, naming the nearest key, if there is none."""
        if key not in self._index:
            nearest = nearest_key(key, self._index)
            raise InputError(
                f"solver {key} is not stored in {self.path} (nearest: {nearest or 'none'}); export it with `--solver {key}`, "
                f"or install diffusers, which compiles it: {hint('train')}"
            )
        offset, height, rows, meta = self._index[key]
        values = self._arrays.read(f"solver_{parse_key(key)[0]}", np.float64)[offset : offset + height * rows]
        if values.size != height * rows:
            raise InputError(f"{self.path}: the table {key!r} is cut off; export the bundle again")
        matrix = values.reshape(height, rows)
        columns: dict[str, Any] = dict(zip(COLUMNS, matrix, strict=False)) | dict(zip(META, meta, strict=True))
        columns["streams"] = self._streams(key, columns["streams"])
        with located(self.path):
            return SolverTable(**columns, b=matrix[len(COLUMNS) :].T.copy())

    def _streams(self, key: str, values: np.ndarray) -> np.ndarray:
        """(R,) int64. Raises InputError for numbers that are no streams."""
        if not ((values >= 1) & (values <= MAX_ROWS)).all() or (values % 1).any():
            raise InputError(f"{self.path}: the table {key!r}: streams: expected whole numbers from 1 to {MAX_ROWS}")
        return values.astype(np.int64)
