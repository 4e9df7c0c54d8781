"""One HTML page over a demo's results: `python -m benchmarks.page FOLDER` writes FOLDER/index.html."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import click

from benchmarks.table import cells, notes

TASKS = "monsters", "iclevr"  # the order on the page; names of other tasks come behind, sorted
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2rem auto; padding: 0 1rem; color: #222 }
img { max-width: 100%; border: 1px solid #ddd } table { border-collapse: collapse; margin: .5rem 0 1.5rem }
td, th { padding: .2rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left } .miss { color: #b00; font-weight: bold }
summary { cursor: pointer; margin: .5rem 0 }
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one shape as an HTML table; floats with three significant digits."""
    if not rows:
        return "<p>not measured</p>"

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:.3g}"
        return html.escape(str(value))

    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{cell(v)}</td>" for v in row.values()) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def certificates(bundle: Path) -> Iterator[dict[str, Any]]:
    """One row per engine and comparison of a bundle's certificates."""
    for file in sorted((bundle / "certificates").glob("*.json")):
        certificate = json.loads(file.read_text())
        for row in certificate["rows"]:
            yield {
                "engine": f"{certificate['engine']} {certificate['dtype']}",
                "compared": row["what"],
                "max_abs": row["max_abs"],
                "cosine": f"{row['cosine']:.6f}",
                "PSNR_dB": "" if row["psnr_db"] is None else round(row["psnr_db"], 1),
                "allowed": row["allowed"],
                "verdict": "ok" if row["passed"] else "MISSED",
            }


def figures(score: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per metric of what `fastgen score` wrote."""
    for figure in score["metrics"].values():
        error = figure["standard_error"]
        yield {
            "metric": figure["label"],
            "value": round(figure["value"], 4),
            "standard_error": "unknown" if error is None else round(error, 4),
            "over": figure["over"],
        }


def files(folder: Path, pattern: str) -> list[Path]:
    """The files of a demo by task, then by name; numbers in names by their value: seed 2 stands before seed 10."""

    def order(file: Path) -> tuple[int, list[str | int]]:
        name = file.relative_to(folder).as_posix()
        task = next((i for i, task in enumerate(TASKS) if task in name), len(TASKS))
        return task, [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]

    return sorted(folder.glob(pattern), key=order)


def sheet(file: Path, folder: Path) -> str:
    """A run's contact sheet below its name, its size and what made it."""
    job = json.loads((file.parent / "job.json").read_text())
    settings, runs = job["job"], job["runs"]
    seconds, count = sum(r["seconds"] for r in runs), sum(r["images"] for r in runs)
    return (
        f"<h2>{html.escape(file.parent.name)}</h2>\n"
        f"<p>{count} images in {seconds:.1f} s: {settings['engine']} {settings['dtype']}, {settings['scheduler']} "
        f"{settings['num_inference_steps']} steps, guidance {settings['guidance_scale']}</p>\n"
        f'<img src="{file.relative_to(folder).as_posix()}">'
    )


def sheets(folder: Path) -> Iterator[str]:
    """For each task the contact sheet of its first run; those of its other runs, which differ in the seed, behind a fold."""
    runs = files(folder, "generated/*/contact_sheet.png")
    for task, of_task in groupby(runs, lambda file: file.parent.name.rpartition("-")[0]):
        first, *others = of_task
        yield sheet(first, folder)
        if others:
            seeds = "1 other seed" if len(others) == 1 else f"{len(others)} other seeds"
            inside = "\n".join(sheet(file, folder) for file in others)
            yield f"<details><summary>{html.escape(task)}: {seeds}</summary>\n{inside}\n</details>"


def sections(folder: Path) -> Iterator[str]:
    """The page's parts for whatever the folder holds."""
    for image in files(folder, "*.png"):
        yield f'<img src="{image.name}" width="192">'
    yield from sheets(folder)
    for file in files(folder, "scores/*.json"):
        score = json.loads(file.read_text())
        yield f"<h2>Scores: {html.escape(file.stem)}</h2>"
        yield table(list(figures(score)))
    for file in files(folder, "engines-*.json"):
        yield f"<h2>Engines: {html.escape(file.stem.removeprefix('engines-'))}</h2>"
        rows = json.loads(file.read_text())["rows"]
        yield table(cells(rows))
        yield from (f"<p>{html.escape(note)}</p>" for note in notes(rows))
    for bundle in files(folder, "*-bundle"):
        yield f"<h2>Certificate: {html.escape(bundle.name)}</h2>"
        yield table(list(certificates(bundle))).replace("<td>MISSED", '<td class="miss">MISSED')
    for preview in files(folder, "*/previews"):
        newest = sorted(preview.glob("*.png"))[-1:]
        for image in newest:
            yield f"<h2>Training preview: {html.escape(preview.parent.name)}</h2>"
            yield f'<img src="{image.relative_to(folder).as_posix()}">'


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folder: Path) -> None:
    """Write FOLDER/index.html over the generated images, scores, timings and certificates below FOLDER."""
    body = "\n".join(sections(folder))
    page = f"<!doctype html><meta charset=utf-8><title>fastgen demo</title><style>{STYLE}</style><h1>fastgen demo</h1>{body}"
    (folder / "index.html").write_text(page, encoding="utf-8")
    click.echo(f"page: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
