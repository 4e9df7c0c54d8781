"""The published sweeps of `monsters-pndm-rag`, run with another model: `python -m benchmarks.reference_sweeps`.

Steps, guidance scale and RAG noise, over the first 36 prompts. Theirs are FID and CLIP-T under networks of their own; ours are
whatever the options ask for, so that trends can be compared, and values only where networks and reference are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.report import RESULTS, save
from benchmarks.report import cell as text
from fastgen.cli.score import scoring_options
from fastgen.errors import FastgenError, InputError
from fastgen.files.jsonfiles import read_json
from fastgen.generate.pipeline import load
from fastgen.retrieval.copies import check_copies
from fastgen.retrieval.index import Index, open_index
from fastgen.scoring import Scorer
from fastgen.sweep import Grid, Rule, Sweep, sweep
from fastgen.sweep.report import JSON

FOLDER = click.Path(path_type=Path)
PROMPTS = 36
STEPS, GUIDANCE = 70, 10.0  # of the points that a grid does not vary
CLASS_DEFAULT = "pndm-prk"  # PNDMScheduler with its Runge-Kutta warm-up, as the authors ran it
Row = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """One published sweep: the setting that varies, and (FID, CLIP-T) at each value."""

    varies: str
    published: Mapping[float, tuple[float, float]]

    def grid(self, scheduler: str) -> Grid:
        values = tuple(self.published)
        return Grid(
            schedulers=(scheduler,),
            num_inference_steps=tuple(map(int, values)) if self.varies == "steps" else (STEPS,),
            guidance_scales=values if self.varies == "guidance" else (GUIDANCE,),
            noise_steps=tuple(map(int, values)) if self.varies == "RAG noise" else None,
        )


REFERENCES = {
    "steps": Reference(
        "steps", {60: (261.0, 0.267), 70: (246.9, 0.266), 80: (250.7, 0.275), 90: (260.5, 0.271), 100: (263.8, 0.271)}
    ),
    "guidance": Reference(
        "guidance",
        {2.5: (279.1, 0.243), 5.0: (260.6, 0.269), 7.5: (249.8, 0.273), 10.0: (246.9, 0.267), 12.5: (264.2, 0.272)},
    ),
    "rag-noise": Reference(
        "RAG noise",
        {20: (317.4, 0.243), 30: (283.0, 0.255), 40: (260.6, 0.269), 50: (234.7, 0.272), 60: (222.3, 0.276)},
    ),
}


def solver_for(bundle: Path, engine: str | None) -> tuple[str, str | None]:
    """(the authors' solver, None), or where the model's noise schedule has no such table (ddim, the reason)."""
    try:
        load(bundle, engine).source.table(f"{CLASS_DEFAULT}:{STEPS}")
    except InputError as error:
        return "ddim", str(error)
    return CLASS_DEFAULT, None


def rows(reference: Reference, found: Sweep, index: Index | None) -> list[Row]:
    """A row per point: theirs, ours, and with an index how near the images are to the training set."""
    out = []
    for (value, (fid, clip_t)), row in zip(reference.published.items(), found.rows, strict=True):
        ours: Row = {"varies": reference.varies, "value": value, "their_fid": fid, "their_clip_t": clip_t}
        ours |= {"solver": row.point.scheduler, "evaluations_per_image": row.evaluations}
        for key, figure in row.figures.items():
            ours |= {key: figure.value, f"{key}_standard_error": figure.standard_error}
        if index is not None:
            (matches,) = check_copies(row.folders, index).folders.values()
            ours |= {"copy_distance": float(np.mean([m.distance for m in matches]))}
            ours |= {"near_copy_share": float(np.mean([bool(m.copy) for m in matches]))}
        out.append(ours)
    return out


def markdown(part: Sequence[Row]) -> str:
    """One sweep as a table."""
    metrics = [key.removesuffix("_standard_error") for key in part[0] if key.endswith("_standard_error")]
    copies = [key for key in ("copy_distance", "near_copy_share") if key in part[0]]
    names = [part[0]["varies"], "their FID", "their CLIP-T", "our evaluations"]
    lines = [[*names, *(f"our {key}" for key in metrics), *(key.replace("_", " ") for key in copies)]]
    lines += [["---"] * len(lines[0])]
    for row in part:
        ours = [f"{text(row[key])} ± {text(row[f'{key}_standard_error'])}" for key in metrics]
        theirs = [f"{row['value']:g}", f"{row['their_fid']:g}", f"{row['their_clip_t']:.3f}"]
        lines.append([*theirs, str(row["evaluations_per_image"]), *ours, *(text(row[key]) for key in copies)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finished(folder: Path) -> dict[str, Any]:
    """The table of any finished sweep."""
    value = read_json(folder / JSON)
    kept = ("name", "evaluations_per_image", "seconds_per_image")
    part = [
        {key: row[key] for key in kept}
        | {key: figure[key] for figure in [row["metrics"][value["metric"]]] for key in ("value", "standard_error")}
        for row in value["rows"]
    ]
    return {key: value[key] for key in ("metric", "rule", "chosen")} | {
        "model": Path(value["model"]).name,
        "rows": part,
    }


@click.command()
@click.argument("requests", type=FOLDER)
@click.option("--model", type=FOLDER, required=True, help="Bundle or model folder of a model of text.")
@click.option("--index", "index_folder", type=FOLDER, help="Of the training data (`fastgen index`), for the RAG noise.")
@click.option("--engine", help="[default: what is installed and fits]")
@click.option("--threads", type=int, help="[default: the engine's]")
@scoring_options
@click.option("--also", type=FOLDER, multiple=True, help="Folder of a finished sweep whose table is kept with these.")
@click.option("--work", type=FOLDER, required=True, help="Folder of the sweeps; the same command continues them.")
@click.option("--out", type=FOLDER, default=RESULTS / "reference_sweeps-cpu.json", show_default=True)
def main(
    requests: Path,
    model: Path,
    index_folder: Path | None,
    engine: str | None,
    threads: int | None,
    also: Sequence[Path],
    work: Path,
    out: Path,
    **scoring: Any,
) -> None:
    """Run the published sweeps' grids, print theirs beside ours, and write both as JSON."""
    try:
        scorer = Scorer(**scoring)
        solver, reason = solver_for(model, engine)
        index = None if index_folder is None else open_index(index_folder)
        parts: list[list[Row]] = []
        labels: dict[str, str] = {}
        for name, reference in REFERENCES.items():
            needs_index = reference.varies == "RAG noise"
            if needs_index and index is None:
                continue
            rag = index_folder if needs_index else None
            options: dict[str, Any] = {"engine": engine, "threads": threads, "rag": rag, "limit": PROMPTS}
            grid = reference.grid(solver)
            found = sweep(model, requests, work / name, grid, scorer=scorer, rule=Rule("best"), say=print, **options)
            parts.append(rows(reference, found, index if needs_index else None))
            labels |= {key: figure.label for key, figure in found.rows[0].figures.items()}
    except FastgenError as error:
        raise SystemExit(f"error: {error}") from None
    for path in (scoring[key] for key in ("evaluator", "clip") if scoring[key]):
        labels = {key: label.replace(str(path), Path(path).name) for key, label in labels.items()}
    others = {folder.name: finished(folder) for folder in also}
    settings = {"model": model.name, "engine": engine, "prompts": PROMPTS, "solver": solver, "solver_reason": reason}
    settings["reference_images"] = None if scorer.reference is None else len(scorer.reference.files)
    save(out, settings | {"metrics": labels}, [row for part in parts for row in part], **others)
    print("\n\n".join(["", *map(markdown, parts)]))
    print(f"\nsolver: {solver}{f' ({reason})' if reason else ''}\n" + "\n".join(f"{k}: {v}" for k, v in labels.items()))


if __name__ == "__main__":
    main()
