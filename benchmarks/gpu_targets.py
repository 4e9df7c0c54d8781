"""The targets of a GPU run against what was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.sides import Side

# Sections of rows, of one model each.
COMPARED = (("job", "one", "growth", "compiled-job", "compiled-one", "bundles"), ("labels", "compiled-labels"))
GREY_LEVELS, PSNR_DB, EAGER_DB = 2, 30.0, 3.5  # 3.5 dB is a factor of 1.5
TARGETS = (
    # name, how it is measured, wanted, whether less is better
    ("whole job, s", "job_s", 40.0, True),
    ("against diffusers fp16, its best batch", "over_best", 1.6, False),
    ("against diffusers fp16, batch 1", "over_one", 5.0, False),
    ("against a loop by hand, fp32, batch 1", "over_loop", 60.0, False),
    ("guided step at batch 1, ms", "step_ms", 3.0, True),
    ("32 label images, DDPM 1000, s", "labels_s", 4.0, True),
    ("share of the floor, whole job, %", "floor_percent", 35.0, False),
)


def targets(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per target; what was not measured says so."""
    found = measured(results)
    rows = []
    for name, key, wanted, less in TARGETS:
        value = found.get(key)
        met = None if value is None else (value <= wanted if less else value >= wanted)
        verdict = {None: "not measured", True: "met", False: "MISSED"}[met]
        rows.append(
            {"target": name, "wanted": f"{'<=' if less else '>='} {wanted:g}", "measured": value, "verdict": verdict}
        )
    judged = checks(results)
    failed = [check for check in judged if not check["passed"]]
    names = "; ".join(check["what"] for check in failed) or None
    rows.append(
        {
            "target": "correctness",
            "wanted": "none fails",
            "measured": f"{len(judged) - len(failed)} passed, {len(failed)} failed" + (f": {names}" if names else ""),
            "verdict": "MISSED" if failed else "met" if judged else "not measured",
        }
    )
    return rows


def checks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything that was compared: the engines' rows of all sections, each beside eager's of the same model."""
    found = []
    for sections in COMPARED:
        rows = [row for section in sections for row in results.get(section, [])]
        own = [row for row in rows if row["max_abs_255"] is not None and not Side.parse(row["side"]).is_peer]
        found += [judge(row, own) for row in own if row["dtype"] == "fp32" or not is_yardstick(row)]
    return found


def is_yardstick(row: Mapping[str, Any]) -> bool:
    """Whether a row is eager without graphs: in lower precision it shows what rounding alone costs."""
    side = Side.parse(row["side"])
    return side.name == "eager" and side.graphs is not True


def judge(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A row against eager fp32: within 2/255 in fp32; in lower precision 30 dB, or, where rounding alone costs more than that,
    at most 1.5 times the distance that eager without graphs has in that precision among `rows`."""
    psnr = math.inf if row["psnr_db"] is None else row["psnr_db"]
    eager = [r["psnr_db"] for r in rows if is_yardstick(r) and r["dtype"] == row["dtype"] and r["psnr_db"]]
    needed = min([PSNR_DB, *(value - EAGER_DB for value in eager)])
    passed = row["max_abs_255"] <= GREY_LEVELS if row["dtype"] == "fp32" else psnr >= needed
    what = f"{row['side']} in {row['dtype']}, batch {row['batch']}, {row['steps']} steps"
    return {"what": what, "found": f"{psnr:.1f} dB, at most {row['max_abs_255']}/255", "passed": bool(passed)}


def best_job(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fastest of the jobs whose pictures are right."""
    jobs = [row for section in ("job", "compiled-job") for row in results.get(section, [])]
    rows = [row for section in COMPARED[0] for row in results.get(section, []) if row["max_abs_255"] is not None]
    right = [row for row in jobs if is_yardstick(row) or judge(row, rows)["passed"]]
    return min(right, key=lambda row: row["job_s"], default=None)


def measured(results: Mapping[str, Any]) -> dict[str, float]:
    """The figures that TARGETS names, as far as they were measured."""
    job = best_job(results)
    found: dict[str, float] = {}
    rate = job["images_per_s"] if job else None
    peers = _timed(results, "peers")
    loops = [row for row in _timed(results, "slow") if row["side"].startswith("two-calls")]
    if job:
        found |= {"job_s": job["job_s"], "floor_percent": job["floor_percent"]}
    if rate and peers:
        found["over_best"] = rate / max(row["images_per_s"] for row in peers)
        single = [row["images_per_s"] for row in peers if row["batch"] == 1]
        found |= {"over_one": rate / single[0]} if single else {}
    if rate and loops:
        found["over_loop"] = rate / loops[0]["images_per_s"]
    steps = [row["step_ms"] for row in _own(results, "one", "compiled-one") if row["step_ms"] is not None]
    if steps:
        found["step_ms"] = min(steps)
    labels = [row["batch"] / row["images_per_s"] for row in _own(results, "labels", "compiled-labels")]
    if labels:
        found["labels_s"] = min(labels)
    return found


def _timed(results: Mapping[str, Any], *sections: str) -> list[Mapping[str, Any]]:
    return [row for section in sections for row in results.get(section, []) if row["images_per_s"]]


def _own(results: Mapping[str, Any], *sections: str) -> list[Mapping[str, Any]]:
    """This package's rows, which have a speed."""
    return [row for row in _timed(results, *sections) if not Side.parse(row["side"]).is_peer]
