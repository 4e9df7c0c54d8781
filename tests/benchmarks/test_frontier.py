"""The frontier of speed and quality: what the search narrows down, what it names, and what it keeps when it is interrupted."""

from __future__ import annotations

import json
import math
import shutil
import tomllib

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scoring_helpers import make_evaluator

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from benchmarks import frontier, frontier_plot
from benchmarks.frontier import machine_state, pool, record, reference_sampling, toml
from benchmarks.frontier_search import COARSE, FINE, Bench, Effort, cheaper, climb, finalists, named
from fastgen.errors import InputError
from fastgen.generate.requests import read_requests
from fastgen.models.bundle_record import sealed
from fastgen.sampling.defaults import Sampling
from fastgen.scoring import Scorer
from fastgen.scoring.result import Figure
from fastgen.sweep import Point, ScoredPoint

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def row(point, evaluations, value, error=0.01, **others):
    figures = {"attributes": Figure(value, error, "seeds", "higher", "attributes", "", {})}
    figures |= {name: Figure(v, error, "seeds", "higher", name, "", {}) for name, v in others.items()}
    return ScoredPoint(point, (), evaluations, 0.1, {} if math.isnan(value) else figures, ())


REFERENCE = Point("ddpm", 1000, 2.0)


def rows(*taken):
    """(steps, value) of ddim, and the reference at 0.9 with a standard error of 0.01."""
    points = [row(Point("ddim", n, 1.0), n, value) for n, value in taken]
    return {r.point: r for r in [*points, row(REFERENCE, 2000, 0.9)]}


@pytest.mark.parametrize(
    ("taken", "steps"),
    [
        (((5, 0.85), (10, 0.881), (20, 0.95)), 10),  # within 2 standard errors of the reference
        (((5, 0.879), (10, 0.87), (20, 0.89)), 20),
        (((5, 0.95), (10, 0.96)), 5),
        (((5, 0.5), (10, 0.6)), 1000),  # nothing is: the reference itself
        (((5, math.nan), (10, 0.9)), 10),  # broken images have no score
    ],
)
def test_the_fewest_evaluations_within_the_noise_of_the_reference_are_named(taken, steps):
    assert named(rows(*taken), "attributes", REFERENCE, 2.0).num_inference_steps == steps


def bench(found, size=2):
    """A bench that has measured `found`, without a model."""
    made = Bench.__new__(Bench)
    made.metric, made.effort, made.rows = "attributes", Effort(finalists=size), {COARSE: found}
    return made


def test_finalists_are_the_coarse_frontier_and_what_is_not_clearly_worse_than_the_reference():
    found = rows((5, 0.7), (8, 0.6), (10, 0.885), (20, 0.87), (30, 0.95), (50, 0.9), (60, math.nan))
    frontier_, good = finalists(bench(found), REFERENCE)
    assert [p.num_inference_steps for p in frontier_] == [5, 10, 30]
    assert [p.num_inference_steps for p in good] == [10, 30, 50]


def test_a_point_is_named_for_good_only_when_no_cheaper_one_is_left_unmeasured():
    found = rows((10, 0.9), (15, 0.9), (20, 0.9), (30, 0.9))
    ten, fifteen, twenty, thirty = (p for p in found if p != REFERENCE)
    made = bench(found)
    made.rows[FINE] = {p: found[p] for p in (ten, thirty, REFERENCE)}
    good = [ten, fifteen, twenty, thirty]
    assert cheaper(made, good, thirty) == [fifteen, twenty]
    assert cheaper(made, good, ten) == []
    assert cheaper(made, good, REFERENCE) == [fifteen, twenty]


@given(st.sampled_from(SCALES), st.sampled_from(SCALES))
def test_a_climb_finds_the_only_summit_and_measures_nothing_twice(start, summit):
    asked = []

    def loss(value):
        asked.append(value)
        return abs(SCALES.index(value) - SCALES.index(summit))

    assert climb(SCALES, start, loss) == summit
    assert len(asked) == len(set(asked))


def test_a_climb_stays_where_neighbours_are_as_good():
    assert climb(SCALES, 2.0, lambda value: 0.0) == 2.0


def test_fine_figures_come_from_seeds_that_chose_nothing():
    with pytest.raises(InputError, match="seed 3 is both"):
        Effort(coarse_seeds=(3,), seeds=(1, 2, 3))
    with pytest.raises(InputError, match="one seed has no standard error"):
        Effort(seeds=(1,))


def test_several_request_files_become_one_with_names_that_say_which(tmp_path):
    for folder, name in (("a", "test.json"), ("b", "new_test.json")):
        (tmp_path / folder).mkdir()
        prompts = {f"{i}_main": {"image_name": f"{i}_main.png", "text_prompt": f"monster {i}"} for i in range(3)}
        (tmp_path / folder / name).write_text(json.dumps(prompts))
        wanted = {f"{i}_main": {"colour": folder} for i in range(3)}
        (tmp_path / folder / "attributes.json").write_text(json.dumps(wanted))
    files = [tmp_path / "a" / "test.json", tmp_path / "b" / "new_test.json"]
    pooled = pool(files, tmp_path / "pool", None, 2)
    requests = read_requests(pooled)
    assert [r.id for r in requests] == ["test-0_main", "test-1_main", "new_test-0_main", "new_test-1_main"]
    assert requests[3].image_name == "new_test-1_main.png"
    attributes = json.loads((tmp_path / "pool" / "attributes.json").read_text())
    assert [attributes[r.id]["colour"] for r in requests] == ["a", "a", "b", "b"]
    alone = pool(files[:1], tmp_path / "alone", None, None)
    assert read_requests(alone) == read_requests(files[0])
    with pytest.raises(InputError, match=r"test\.json is given twice"):
        pool([files[0], files[0]], tmp_path / "twice", None, None)


def test_the_lowest_attribute_stands_beside_the_mean():
    judged = "attributes", ("colour", "body", "action")
    found = record(COARSE, row(REFERENCE, 2000, 0.9, colour=0.95, body=0.7, action=0.8), *judged)
    assert (found["score"], found["lowest"], found["lowest_score"]) == (0.9, "body", 0.7)
    assert found["attributes"]["colour"] == [0.95, 0.01]
    assert record(COARSE, row(REFERENCE, 2000, math.nan), *judged)["score"] is None


def test_the_named_point_is_a_table_of_a_preset():
    written = tomllib.loads(toml({"solver": "dpmpp-2m", "steps": 10, "guidance": 1.5}))["sampling"]
    assert Sampling(**written) == Sampling("dpmpp-2m", 10, 1.5)


def test_a_machine_counts_as_idle_only_if_it_was_in_every_run():
    assert machine_state([{"load_average_before": 0.1}]).startswith("idle")
    assert machine_state([{"load_average_before": 0.1}, {"load_average_before": 1.5}]).startswith("other work")
    assert "not known" in machine_state([{"load_average_before": None}])


@pytest.fixture(scope="module")
def searches(label_bundle, requests_files, tmp_path_factory):
    """A search on the tiny label model that ran out of time, then to its end, then again: (printed, JSON, images) of each."""
    folder = tmp_path_factory.mktemp("search")
    words = [requests_files["labels"], "--model", label_bundle, "--engine", "ort", "--name", "tiny"]
    words += ["--evaluator", make_evaluator(folder / "judge"), "--seeds", "0,1", "--reference-solver", "ddpm:5"]
    words += ["--solver", "ddim,heun", "--steps", "2,3", "--guidance", "1,2"]
    words += ["--work", folder / "work", "--out", folder / "out.json"]
    found = []
    for options in (["--minutes", "1e-9"], [], []):
        done = CliRunner().invoke(frontier.main, [str(word) for word in [*words, *options]])
        assert done.exit_code == 0, done.output
        images = {f: f.stat().st_mtime_ns for f in (folder / "work").rglob("seed-*/[0-9]*.png")}
        found.append((done.output, json.loads((folder / "out.json").read_text()), images))
    return found


def test_a_search_that_ran_out_of_time_continues_and_one_that_ended_generates_nothing_again(searches):
    (early, cut, none), (printed, value, images), (again, same, kept) = searches
    assert "incomplete after 0 points: the same command continues" in early
    assert (cut["complete"], cut["rows"], cut["chosen"], none) == (False, [], None, {})
    assert value["complete"]
    assert "already there" not in printed
    assert len(images) == 4 * sum(row["seeds"] for row in value["rows"])
    assert kept == images
    assert again.count("already there") == len(value["rows"])
    assert (same["rows"], same["chosen"]) == (value["rows"], value["chosen"])
    assert len(same["runs"]) == 3


def test_the_result_names_the_reference_the_point_and_what_they_were_measured_on(searches, tmp_path_factory):
    printed, value, _ = searches[1]
    fine = [r for r in value["rows"] if r["pass"] == "fine"]
    assert {r["seeds"] for r in fine} == {2}
    assert {r["seeds"] for r in value["rows"] if r["pass"] == "coarse"} == {1}
    for found in value["rows"]:
        rows = 2 * found["steps"] - 1 if found["solver"] == "heun" else found["steps"]
        assert found["evaluations_per_image"] == rows * (1 if found["guidance"] == 1 else 2)
        assert found["seconds_per_image"] > 0
    by_setting = {tuple(frontier_plot.setting(r).values()): r for r in fine}
    reference, chosen = (by_setting[tuple(value[key].values())] for key in ("reference", "chosen"))
    assert (reference["solver"], reference["steps"]) == ("ddpm", 5)
    limit = reference["score"] - 2 * reference["standard_error"] - 1e-9
    good = [r for r in fine if r["score"] >= limit]
    assert chosen["evaluations_per_image"] == min(r["evaluations_per_image"] for r in good)
    settings = value["settings"]
    assert (settings["engine"], settings["dtype"], settings["metric"]) == ("ort", "fp32", "label_accuracy")
    assert str(tmp_path_factory.getbasetemp()) not in json.dumps(value)
    assert toml(value["chosen"]) in printed
    assert any(line.startswith("chosen") for line in printed.splitlines())


def test_results_of_two_models_are_two_panels(searches, tmp_path):
    pytest.importorskip("matplotlib")
    _, value, _ = searches[1]
    (tmp_path / "out.json").write_text(json.dumps(value))
    (tmp_path / "other.json").write_text(json.dumps(value | {"chosen": None, "reference": None, "complete": False}))
    words = [tmp_path / "out.json", tmp_path / "other.json", "--out", tmp_path / "plot.png"]
    done = CliRunner().invoke(frontier_plot.main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    assert Image.open(tmp_path / "plot.png").width == 1000


def test_a_line_is_a_solver_at_its_best_guidance_with_the_fine_figure_where_there_is_one():
    def point(stage, steps, guidance, score):
        return {"pass": stage, "solver": "ddim", "steps": steps, "guidance": guidance} | {
            "evaluations_per_image": steps,
            "score": score,
        }

    taken = [
        point("coarse", 4, 1, 0.5),
        point("coarse", 8, 1, 0.9),
        point("coarse", 4, 2, 0.6),
        point("coarse", 8, 2, 0.7),
    ]
    taken.append(point("fine", 8, 1, 0.65))
    value = {"rows": taken, "reference": None, "chosen": None, "settings": {"better": "higher"}}
    assert frontier_plot.best_rows(value) == {"ddim": [taken[2], taken[3]]}
    value["chosen"] = {"solver": "ddim", "steps": 8, "guidance": 1}
    assert frontier_plot.best_rows(value) == {"ddim": [taken[0], taken[4]]}


def test_the_reference_of_a_text_model_is_pndm_at_70_steps_or_says_why_not(
    text_bundle, requests_files, rehash, tmp_path
):
    from scoring_helpers import make_clip

    scorer = Scorer(clip=make_clip(tmp_path / "clip", 77))
    made = Bench(text_bundle, requests_files["text"], tmp_path / "work", scorer, Effort(), engine="ort")
    assert reference_sampling(made, None) == (("pndm-prk", 70), None)
    assert made.evaluations(Point("pndm-prk", 70, 3.0)) == 2 * 79
    assert reference_sampling(made, "ddim:20") == (("ddim", 20), None)
    with pytest.raises(InputError, match="--reference-solver dimm:20: unknown scheduler"):
        reference_sampling(made, "dimm:20")
    other = shutil.copytree(text_bundle, tmp_path / "other")
    manifest = json.loads((other / "bundle.json").read_text())
    manifest["scheduler_config"]["rescale_betas_zero_snr"] = True
    (other / "bundle.json").write_text(json.dumps(sealed(manifest)))
    (other / "scheduler" / "tables.npz").write_bytes((text_bundle / "scheduler" / "tables.npz").read_bytes())
    found, reason = reference_sampling(
        Bench(other, requests_files["text"], tmp_path / "w", scorer, Effort(), engine="ort"), None
    )
    assert found == ("ddim", 70)
    assert "rescale_betas_zero_snr" in reason
