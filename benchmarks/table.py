"""Results as markdown tables: `python -m benchmarks.table RESULTS.json...`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from benchmarks.report import cell
from benchmarks.sides import informed

Row = Mapping[str, Any]
COLUMNS: dict[str, Callable[[Row], Any]] = {
    "side": lambda r: _side(r),
    "batch": lambda r: r["batch"],
    "steps": lambda r: r["steps"],
    "images/s": lambda r: r["images_per_s"],
    "ratio": lambda r: _times(r["ratio"]),
    "ratio_informed": lambda r: _times(r.get("ratio_informed")),  # older files have none
    "ms per step": lambda r: r["step_ms"],
    "first image, s": lambda r: r["first_s"],
    "build, s": lambda r: r["build_s"],
    "repaid after": lambda r: r["repaid_after"],
    "job, s": lambda r: _job(r),
    "peak MiB": lambda r: r["peak_mib"],
    "of the floor": lambda r: None if r["floor_percent"] is None else f"{r['floor_percent']:.1f}%",
    "PSNR": lambda r: _psnr(r),
    "largest difference": lambda r: None if r["max_abs_255"] is None else f"{r['max_abs_255']}/255",
}
CONSTANT = ("batch", "steps")  # left out where all rows agree


def cells(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Column -> text, of the rows that have figures; columns without any, or where nothing differs, are left out. The first row
    is of the first side, which `ratio` is to."""
    full = [row for row in rows if row["images_per_s"] is not None]
    names = [n for n in COLUMNS if n not in CONSTANT or len({row[n] for row in rows}) > 1]
    names = [n for n in names if any(COLUMNS[n](row) is not None for row in full)]
    peer = informed(row["side"] for row in rows if row["side"] != rows[0]["side"]) or "the informed user"
    against = {"ratio": f"against {_side(rows[0])}", "ratio_informed": f"against {peer.replace(':', ' ')}"}
    return [
        {against.get(n, n): "" if (value := COLUMNS[n](row)) is None else cell(value) for n in names} for row in full
    ]


def notes(rows: Sequence[Row]) -> list[str]:
    """Why rows have no figures, and what else there is to know."""
    found = list(dict.fromkeys(f"{row['side']}: {row['note']}" for row in rows if row["note"]))
    measured = {row["extrapolated_from"] for row in rows if row["extrapolated_from"]}
    if measured:
        counts = ", ".join(map(str, sorted(measured)))
        found.append(f"the job's seconds are extrapolated from rounds of {counts} images")
    return found


def markdown(rows: Sequence[Row]) -> str:
    """A table of the rows that have figures, then the notes."""
    full = cells(rows)
    lines = ["| " + " | ".join(full[0]) + " |", "|" + "---|" * len(full[0])] if full else []
    lines += ["| " + " | ".join(row.values()) + " |" for row in full]
    return "\n".join([*lines, "", *(f"* {note}" for note in notes(rows))]).rstrip()


def _side(row: Row) -> str:
    name, *rest = row["side"].partition("@")[0].split(":")
    flags = [part for part in rest if part != row["dtype"]]
    return " ".join([name, row["dtype"] or "", *flags]).strip() + (
        f", batch {row['batch']}" if "@" in row["side"] else ""
    )


def _times(ratio: float | None) -> str | None:
    return None if ratio is None else f"{ratio:.2f} x"


def _job(row: Row) -> str | None:
    return None if row["job_s"] is None else cell(float(row["job_s"]))


def _psnr(row: Row) -> str | None:
    if row["max_abs_255"] is None:
        return None
    return "identical" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"


def heading(value: Mapping[str, Any]) -> str:
    """What was measured and where, in two lines."""
    settings, machine = value["settings"], value["environment"]
    hardware = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    what = ", ".join(
        f"{k.replace('_', ' ')} {v}" for k, v in settings.items() if not isinstance(v, dict) and v is not None
    )
    return f"{what}\n\n{hardware}; {versions}; commit {machine['commit']}"


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(files: Sequence[Path]) -> None:
    """Print each file's rows as a markdown table."""
    for file in files:
        value = json.loads(file.read_text())
        print(f"## {file.stem}\n\n{heading(value)}\n\n{markdown(value['rows'])}\n")


if __name__ == "__main__":
    main()
