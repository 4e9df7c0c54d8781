"""Tables of metadata: JSONL, CSV and Parquet, read as the same rows."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.errors import InputError, first_line
from fastgen.files.installing import hint
from fastgen.files.jsonfiles import MAX_DATA_BYTES, brief, located, read_bytes, read_jsonl, read_text

MAX_ROWS, MAX_UNPACKED = 10_000_000, 2**32  # of a Parquet file: rows, and bytes
Row = tuple[str, Any]  # where it stands, "line 3"; and the row, a dict where the file is well-formed


Lists = Mapping[str, str | None]  # column -> the separator of its items in a cell of CSV, None where it has one item


def read_table(path: Path, lists: Lists) -> list[Row]:
    """The rows of a .jsonl, .csv or .parquet file. `lists`: the columns that hold lists. CSV has none, so there a cell of such
    a column is JSON, `["red cube", "blue sphere"]`, or items with a separator. Raises InputError with file and line."""
    if path.suffix == ".csv":
        return _read_csv(path, lists)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    return [(f"line {line}", row) for line, row in read_jsonl(path, MAX_DATA_BYTES)]


def _read_csv(path: Path, lists: Lists) -> list[Row]:
    """Rows as RFC 4180 has them: a quoted cell may hold commas, quotes (doubled) and line ends. Empty lines do not count."""
    reader = csv.reader(io.StringIO(read_text(path, "a CSV file", MAX_DATA_BYTES), newline=""), strict=True)
    columns: list[str] = []
    rows: list[Row] = []
    line = 1
    try:
        for cells in reader:
            place = f"line {line}"
            line = reader.line_num + 1
            if not any(cells):
                continue
            with located(f"{path}: {place}"):
                if columns:
                    rows.append((place, _row(columns, cells, lists)))
                else:
                    columns = _header(cells)
    except csv.Error as error:
        raise InputError(
            f"{path}: line {line}: malformed CSV: {error}; quotes inside a quoted text are doubled"
        ) from None
    return rows


def _header(cells: list[str]) -> list[str]:
    columns = [cell.strip() for cell in cells]
    for name in columns:
        if name and columns.count(name) > 1:
            raise InputError(f"column {brief(name)} occurs twice")
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        raise InputError(f"found {brief(columns[0])}, expected the names of columns, separated by commas")
    return columns


def _row(columns: list[str], cells: list[str], lists: Lists) -> dict[str, Any]:
    if len(cells) != len(columns):
        counts = f"found {len(cells)} cells, expected {len(columns)} ({', '.join(columns)})"
        raise InputError(f"{counts}; a text with a comma stands in double quotes")
    row: dict[str, Any] = dict(zip(columns, cells, strict=True))
    return row | {name: _list(name, row[name], lists[name]) for name in columns if name in lists}


def _list(name: str, cell: str, separator: str | None) -> Any:
    if not cell.lstrip().startswith("["):
        return [item.strip() for item in cell.split(separator)] if separator and cell.strip() else cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        raise InputError(f'{name}: found {brief(cell)}, expected a list as JSON, such as ["a", "b"]') from None


def _read_parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError:
        raise InputError(f"{path}: needs pyarrow, not installed here: {hint('parquet')}") from None
    # Not by its path: in a folder such as split=train/, pyarrow would add the folder's name as a column.
    data = io.BytesIO(read_bytes(path, "a Parquet file", MAX_DATA_BYTES))
    try:
        file = parquet.ParquetFile(data)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        size, count = sum(group.total_byte_size for group in groups), file.metadata.num_rows
        if size > MAX_UNPACKED or count > MAX_ROWS:
            found = f"holds {count:,} rows, {size / 2**20:,.0f} MiB unpacked"
            raise InputError(f"{path}: {found}, expected at most {MAX_ROWS:,} and {MAX_UNPACKED // 2**20:,} MiB")
        rows = file.read().to_pylist()
    except (OSError, ValueError, ArrowException) as error:
        raise InputError(f"{path}: cannot be read as Parquet: {first_line(error)}") from None
    return [(f"row {number}", row) for number, row in enumerate(rows, start=1)]
