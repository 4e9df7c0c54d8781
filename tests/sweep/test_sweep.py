"""A sweep from end to end with tiny models: what it writes, counts, keeps after a kill, and refuses before the first image."""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from killed import leftover
from PIL import Image
from scoring_helpers import make_attribute_evaluator, make_clip, make_evaluator

torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("torchmetrics")

from fastgen.files.temporary import is_temporary, temporary_path  # noqa: E402
from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.models.bundle_record import sealed  # noqa: E402
from fastgen.scoring import score  # noqa: E402
from fastgen.sweep import network_evaluations  # noqa: E402

GRID = ["--scheduler", "ddim,dpmpp-2m", "--num-inference-steps", "2,3", "--guidance-scale", "1,2"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return make_evaluator(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def arguments(label_bundle, requests_files, judge):
    """The command line of a sweep of the label model below `out`."""

    def build(out, *grid, model=None, engine="ort"):
        options = ["--model", model or label_bundle, "--engine", engine, "--evaluator", judge]
        return ["sweep", requests_files["labels"], "--out", out, *options, *(grid or GRID)]

    return build


def rows(out):
    """name -> row of sweep.json, without what depends on the machine."""
    value = json.loads((out / "sweep.json").read_text())
    left_out = ("seconds_per_image", "metrics")
    return {
        row["name"]: {k: v for k, v in row.items() if k not in left_out}
        | {key: (f["value"], f["standard_error"]) for key, f in row["metrics"].items()}
        for row in value["rows"]
    }


def stamps(folder, pattern):
    return {f.relative_to(folder): f.stat().st_mtime_ns for f in folder.rglob(pattern)}


def images(out):
    return stamps(out / "points", "[0-9]*.png")


def test_every_point_is_a_job_with_the_score_that_fastgen_score_gives(fastgen, arguments, judge, tmp_path):
    out = tmp_path / "out"
    code, text, err = fastgen(*arguments(out), "--seeds", "0,1")
    assert code == 0, err
    value = json.loads((out / "sweep.json").read_text())
    assert len(value["rows"]) == len(list((out / "points").iterdir())) == 8
    assert len(images(out)) == 8 * 2 * 4
    for row in value["rows"]:
        folders = [out / "points" / row["name"] / f"seed-{seed}" for seed in (0, 1)]
        found = score(folders, out / "requests.json", evaluator=judge).metrics["label_accuracy"]
        assert row["metrics"]["label_accuracy"]["value"] == found.value
        assert row["metrics"]["label_accuracy"]["over"] == "seeds"
        assert json.loads((folders[1] / "manifest.jsonl").read_text().splitlines()[0])["scheduler"] == row["scheduler"]
    progress = err.splitlines()
    assert progress[2].startswith("[3/8] ddim 2 steps, guidance 2: label_accuracy 0.")
    assert ", 4 evaluations/image, " in progress[2]
    assert len(progress) == 8
    chosen = next(row for row in value["rows"] if row["name"] == value["chosen"])
    assert any(line.startswith("*  ") and f" {chosen['evaluations_per_image']} " in line for line in text.splitlines())


def test_the_table_as_csv_and_the_pictures(fastgen, arguments, tmp_path):
    out = tmp_path / "out"
    assert fastgen(*arguments(out))[0] == 0
    with (out / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    value = json.loads((out / "sweep.json").read_text())
    assert [line["name"] for line in lines] == [row["name"] for row in value["rows"]]
    assert [float(line["label_accuracy"]) for line in lines] == [
        row["metrics"]["label_accuracy"]["value"] for row in value["rows"]
    ]
    assert [line["name"] for line in lines if line["chosen"] == "1"] == [value["chosen"]]
    sheet = np.asarray(Image.open(out / "contact_sheet.png"))
    tiles = [np.asarray(Image.open(out / "points" / row["name"] / "seed-0" / "2.png")) for row in value["rows"]]
    for i, tile in enumerate(tiles):  # the third request, one row per point, 16 px enlarged to 96
        corner = 6 + 15 + i * (15 + 96 + 6) + 15, 6 + 2 * (96 + 6)
        shown = sheet[corner[0] : corner[0] + 96 : 6, corner[1] : corner[1] + 96 : 6]
        assert np.array_equal(shown, tile)
    if (out / "plot.png").exists():
        assert Image.open(out / "plot.png").width > 500


def test_temporary_files_of_a_killed_sweep_go_and_others_stay(fastgen, arguments, tmp_path):
    out, grid = tmp_path / "out", ["--scheduler", "ddim", "--num-inference-steps", "2"]
    assert fastgen(*arguments(out, *grid))[0] == 0
    score = next((out / "points").iterdir()) / "score.json"
    score.unlink()  # so that it is written again
    left = [
        leftover(out / name) for name in ("sweep.json", "sweep.csv", "plot.png", "contact_sheet.png", "requests.json")
    ]
    kept = [leftover(out / "mine.json"), out / "sweep.json.tmp", temporary_path(out / "sweep.json")]
    for file in (*left, *kept, leftover(score)):
        file.write_text("x")
    code, _, err = fastgen(*arguments(out, *grid))
    assert code == 0, err
    assert {file for file in out.iterdir() if file in left or file in kept} == set(kept)
    assert not [file for file in score.parent.iterdir() if is_temporary(file.name)]


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        ("ddim", {"guidance_scale": 1.0}),
        ("ddim", {"guidance_scale": 2.0}),
        ("kdpm2", {"guidance_scale": 2.0}),
        ("ddim", {"guidance_scale": 2.0, "guidance_interval": (1, 3)}),
    ],
)
def test_evaluations_per_image_are_the_rows_that_the_network_really_runs(label_model, scheduler, options):
    pipeline = load(label_model, "eager")
    settings = pipeline.settings(scheduler=scheduler, num_inference_steps=5, **options)
    seen = []
    unet = pipeline.engine.source.unet if hasattr(pipeline.engine, "source") else pipeline.source.unet
    unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(len(args[0])), with_kwargs=True)
    pipeline.generate(labels=[["red cube"]], scheduler=scheduler, num_inference_steps=5, **options)
    assert sum(seen) == network_evaluations(pipeline.source.table(settings.solver), settings) > 0


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0, "cache_interval": 2},
        {"guidance_scale": 2.0, "cache_interval": 3},
        {"guidance_scale": 2.0, "guidance_interval": (1, 4), "cache_interval": 2},
    ],
)
def test_evaluations_with_a_cache_count_the_products_that_are_computed(label_model, options, monkeypatch):
    """Counted by hand: convolutions, linear layers, and both products of attention."""
    products = []

    def layer(module, inputs, output):
        per_output = module.weight[0].numel() if module.weight.ndim > 1 else 0
        products.append(output.numel() * per_output)

    def attention(query, key, value, *arguments, **options):
        products.append(2 * query.numel() * key.shape[-2])
        return real(query, key, value, *arguments, **options)

    def computed(**settings):
        products.clear()
        pipeline.generate(labels=[["red cube"]], scheduler="ddim", num_inference_steps=6, **settings)
        return sum(products)

    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", attention)
    pipeline = load(label_model, "eager")
    for module in pipeline.source.unet.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(layer)
    settings = pipeline.settings(scheduler="ddim", num_inference_steps=6, **options)
    counted = network_evaluations(pipeline.source.table(settings.solver), settings, pipeline.source.shallow_share())
    one = computed(guidance_scale=1.0) / 6
    assert counted == pytest.approx(computed(**options) / one, rel=1e-3)
    assert counted < computed(**options | {"cache_interval": 1}) / one


def test_cache_intervals_are_compared_by_score_and_cost(fastgen, arguments, label_model, tmp_path):
    grid = ["--scheduler", "ddim", "--num-inference-steps", "4", "--cache-interval", "1,2", "--guidance-scale", "2"]
    code, out, err = fastgen(*arguments(tmp_path / "out", *grid, model=label_model, engine="eager"))
    assert code == 0, err
    found = rows(tmp_path / "out")
    whole, cached = found["ddim-4steps-g2"], found["ddim-4steps-g2-c2"]
    assert (whole["cache_interval"], cached["cache_interval"]) == (1, 2)
    assert whole["evaluations_per_image"] == 8
    share = load(label_model, "eager").source.shallow_share()
    assert cached["evaluations_per_image"] == pytest.approx(4 + 4 * share)
    assert f"{4 + 4 * share:.1f}" in out
    pictures = [(tmp_path / f"out/points/{name}/seed-0/0.png").read_bytes() for name in found]
    assert pictures[0] != pictures[1]


def test_an_engine_that_cannot_cache_refuses_before_the_first_image(fastgen, arguments, label_model, tmp_path):
    grid = ["--scheduler", "ddim", "--num-inference-steps", "4", "--cache-interval", "1,2"]
    code, _, err = fastgen(*arguments(tmp_path / "out", *grid, model=label_model, engine="compile"))
    assert code == 2
    assert "--cache-interval: for engines eager, ort and openvino on a CPU, not compile" in err
    assert not (tmp_path / "out/points").exists()


def test_a_bundle_without_the_networks_of_a_cache_is_refused_before_the_first_image(fastgen, arguments, tmp_path):
    grid = ["--scheduler", "ddim", "--num-inference-steps", "4", "--cache-interval", "1,2"]
    code, _, err = fastgen(*arguments(tmp_path / "out", *grid))
    assert code == 2
    assert "has no graphs for --cache-interval" in err
    assert not (tmp_path / "out/points").exists()


@pytest.mark.parametrize(("scheduler", "rows"), [("pndm", 71), ("pndm-prk", 79)])
def test_pndm_at_70_steps_runs_the_network_71_or_79_times_and_guided_on_two_inputs(label_model, scheduler, rows):
    pipeline = load(label_model, "eager")
    run_guided, sizes = pipeline.engine.run_guided, []

    def counted(sample, timesteps, conditions):
        sizes.append((len(sample), len(conditions)))
        return run_guided(sample, timesteps, conditions)

    pipeline.engine.run_guided = counted
    pipeline.generate(labels=[["red cube"]] * 3, scheduler=scheduler, num_inference_steps=70, guidance_scale=2.0)
    settings = pipeline.settings(scheduler=scheduler, num_inference_steps=70, guidance_scale=2.0)
    assert sizes == [(3, 6)] * rows
    assert network_evaluations(pipeline.source.table(settings.solver), settings) == 2 * rows


def test_a_sweep_whose_time_is_up_continues_to_the_same_result(
    fastgen, arguments, label_bundle, requests_files, judge, tmp_path
):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    options = ["--seeds", "0,1", "--against", "ddim-3steps-g2"]
    code, text, err = fastgen(*arguments(out), *options, "--minutes", "1e-9")
    assert (code, images(out)) == (0, {})
    assert "8 points are unfinished after 1e-09 minutes; the same command continues" in err
    assert "ddim-3steps-g2 has no score" in text
    assert len(json.loads((out / "sweep.json").read_text())["unfinished"]) == 8
    found = fastgen(*arguments(out), *options, "--minutes", "60")
    assert found[0] == 0, found[2]
    assert fastgen(*arguments(undisturbed), *options)[0] == 0
    assert rows(out) == rows(undisturbed)
    held = json.loads((out / "sweep.json").read_text())
    assert held["unfinished"] == []
    assert "2% of ddim-3steps-g2" in held["reason"]


def test_a_point_to_hold_the_others_against_must_be_of_the_grid(fastgen, arguments, tmp_path):
    (line,) = one_line_each(fastgen(*arguments(tmp_path / "out"), "--against", "ddim-4steps-g2"))
    assert "unknown --against 'ddim-4steps-g2'; did you mean 'ddim-" in line
    assert not (tmp_path / "out").exists()


def test_a_killed_sweep_continues_to_the_same_result_and_keeps_what_is_there(command, fastgen, arguments, tmp_path):
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    line, environment = command(*arguments(out), "--batch-size", "2")
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 60
    while len(images(out) if out.exists() else ()) < 4 * 2 + 2 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    there, scored = images(out), stamps(out, "score.json")
    assert len(scored) >= 2
    assert 10 <= len(there) < 8 * 4

    code, _, err = fastgen(*arguments(out), "--batch-size", "2")
    assert code == 0, err
    assert sum(line.endswith("already there") for line in err.splitlines()) >= 2
    now = images(out)
    assert sum(now[name] == stamp for name, stamp in there.items()) >= len(there) // 2 * 2
    assert {name: stamp for name, stamp in stamps(out, "score.json").items() if name in scored} == scored
    assert fastgen(*arguments(undisturbed), "--batch-size", "2")[0] == 0
    assert rows(out) == rows(undisturbed)
    for name in now:
        assert (out / "points" / name).read_bytes() == (undisturbed / "points" / name).read_bytes()


def test_a_finished_sweep_generates_and_scores_nothing_again(fastgen, arguments, tmp_path):
    out = tmp_path / "out"
    fastgen(*arguments(out))
    before, decoder, scores = rows(out), images(out), stamps(out, "score.json")
    code, _, err = fastgen(*arguments(out))
    assert code == 0
    assert (rows(out), images(out), stamps(out, "score.json")) == (before, decoder, scores)
    assert all(line.endswith("already there") for line in err.splitlines())


def test_another_grid_keeps_the_points_that_it_shares(fastgen, arguments, tmp_path):
    out = tmp_path / "out"
    fastgen(*arguments(out, "--num-inference-steps", "2,3"))
    before = images(out)
    code, _, err = fastgen(*arguments(out, "--num-inference-steps", "3,5", "--rule", "best"))
    assert code == 0, err
    assert [line.endswith("already there") for line in err.splitlines()] == [True, False]
    assert before.items() <= images(out).items()
    assert [row["num_inference_steps"] for row in rows(out).values()] == [3, 5]


def test_another_scorer_scores_again_and_generates_nothing(fastgen, arguments, tmp_path):
    out = tmp_path / "out"
    fastgen(*arguments(out))
    before, decoder, scores = rows(out), images(out), stamps(out, "score.json")
    code, _, err = fastgen(*arguments(out), "--evaluator", make_evaluator(tmp_path / "other", seed=7))
    assert code == 0, err
    assert images(out) == decoder
    assert not set(stamps(out, "score.json").items()) & set(scores.items())
    assert rows(out) != before


def test_images_made_again_from_other_weights_are_scored_again(
    fastgen, arguments, label_bundle, scaled_weights, tmp_path
):
    out = tmp_path / "out"
    grid = ["--num-inference-steps", "2"]
    fastgen(*arguments(out, *grid))
    held = next(out.rglob("score.json"))
    before = held.read_bytes()
    shutil.rmtree(held.parent / "seed-0")
    other = scaled_weights(label_bundle, tmp_path / "other", 3.0)
    manifest = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps(sealed(manifest | {"source_sha256": "0" * 64})))
    assert fastgen(*arguments(out, *grid, model=other))[0] == 0
    assert held.read_bytes() != before


def one_line_each(result):
    code, text, err = result
    assert (code, text) == (2, ""), err
    assert all(line.startswith("fastgen: error: ") for line in err.splitlines())
    return [line.removeprefix("fastgen: error: ") for line in err.splitlines()]


def test_every_bad_item_is_a_line_and_nothing_is_written(fastgen, arguments, tmp_path):
    out = tmp_path / "out"
    bad = ["--scheduler", "ddim,", "--num-inference-steps", "x,0", "--within", "2", "--seeds", "a"]
    lines = one_line_each(fastgen(*arguments(out, *bad)))
    assert [line.partition(":")[0] for line in lines] == [
        "--scheduler",
        "--num-inference-steps",
        "--num-inference-steps",
        "--seeds",
        "--within",
    ]
    bad = ["--scheduler", "dimm,ddim", "--num-inference-steps", "3,2000", "--metric", "fid", "--noise-steps", "2"]
    lines = one_line_each(fastgen(*arguments(out, *bad)))
    assert len(lines) == 4
    for line, words in zip(
        lines,
        ["unknown --metric 'fid'", "give --rag INDEX too", "--scheduler dimm: unknown", "expected 1 to 1000"],
        strict=True,
    ):
        assert words in line
    assert not out.exists()


def test_a_checkpoint_that_a_bundle_is_not_of_is_refused_before_anything_runs(fastgen, arguments, tmp_path):
    (first, second) = one_line_each(fastgen(*arguments(tmp_path / "out", "--checkpoint", "best,200")))
    assert first.startswith("--checkpoint best: ")
    assert second.startswith("--checkpoint 200: ")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_requests_or_files_is_refused(fastgen, arguments, requests_files, tmp_path):
    out = tmp_path / "out"
    assert fastgen(*arguments(out, "--num-inference-steps", "2"))[0] == 0
    assert "holds a sweep over other requests" in one_line_each(fastgen(*arguments(out), "--limit", "2"))[0]
    mine = tmp_path / "mine"
    mine.mkdir()
    shutil.copy(requests_files["labels"], mine / "requests.json")
    before = (mine / "requests.json").read_bytes()
    assert "holds requests.json already" in one_line_each(fastgen(*arguments(mine)))[0]
    assert (mine / "requests.json").read_bytes() == before


def test_a_point_of_another_model_is_refused_before_a_new_point_is_generated(
    fastgen, arguments, label_bundle, tmp_path
):
    out = tmp_path / "out"
    assert fastgen(*arguments(out, "--num-inference-steps", "3"))[0] == 0
    before = images(out)
    other = shutil.copytree(label_bundle, tmp_path / "other")
    manifest = json.loads((other / "bundle.json").read_text())
    (other / "bundle.json").write_text(json.dumps(sealed(manifest | {"source_sha256": "0" * 64})))
    (line,) = one_line_each(fastgen(*arguments(out, "--num-inference-steps", "2,3", model=other)))
    assert "holds another job: model_sha256" in line
    assert images(out) == before


def test_seeds_that_change_nothing_are_refused(fastgen, arguments, tmp_path):
    file = tmp_path / "seeded.json"
    file.write_text(json.dumps([{"labels": ["red cube"], "seed": 3}, {"labels": ["gray cube"], "seed": 4}]))
    words = arguments(tmp_path / "out", "--seeds", "0,1")
    words[1] = file
    assert "every request has a seed of its own" in one_line_each(fastgen(*words))[0]


def test_a_text_model_is_swept_over_noise_steps_of_an_index(
    fastgen, text_bundle, requests_files, tmp_path, tmp_path_factory
):
    data = tmp_path / "data"
    data.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(data / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"monster number {i}"}) + "\n")
    (data / "metadata.jsonl").write_text("".join(lines))
    index, clip, out = tmp_path / "index", make_clip(tmp_path_factory.mktemp("clip"), 77), tmp_path / "out"
    assert fastgen("index", data, "--model", text_bundle, "--engine", "ort", "--out", index)[0] == 0
    options = ["--model", text_bundle, "--engine", "ort", "--rag", index, "--clip", clip, "--guidance-scale", "1"]
    options += ["--num-inference-steps", "5", "--noise-steps", "none,2,5"]
    code, _, err = fastgen("sweep", requests_files["text"], "--out", out, *options, "--limit", "3")
    assert code == 0, err
    found = rows(out)
    assert [row["evaluations_per_image"] for row in found.values()] == [5, 2, 5]
    assert list(found) == ["ddim-5steps-g1", "ddim-5steps-g1-noise2", "ddim-5steps-g1-noise5"]
    manifest = (out / "points" / "ddim-5steps-g1-noise2" / "seed-0" / "manifest.jsonl").read_text().splitlines()
    assert len(manifest) == 3
    assert json.loads(manifest[0])["noise_steps"] == 2
    jobs = [json.loads((out / "points" / name / "seed-0" / "job.json").read_text())["job"] for name in found]
    assert [job["rag_sha256"] is None for job in jobs] == [True, False, False]  # `none` starts from noise
    assert "clip_t" in next(iter(found.values()))


def test_a_text_model_is_swept_by_the_attributes_of_its_images(fastgen, text_model, requests_files, tmp_path):
    requests, out = tmp_path / "test.json", tmp_path / "out"
    requests.write_bytes(requests_files["text"].read_bytes())
    asked = {key: {"body": "cat", "colour": "red"} for key in json.loads(requests.read_text())}
    (tmp_path / "attributes.json").write_text(json.dumps(asked))
    options = ["--model", text_model, "--engine", "eager", "--evaluator", make_attribute_evaluator(tmp_path / "judge")]
    options += ["--num-inference-steps", "1,2", "--guidance-scale", "1", "--seeds", "0,1"]
    sweep = ["sweep", requests, "--out", out, *options]
    assert fastgen(*sweep)[0] == 0
    value = json.loads((out / "sweep.json").read_text())
    assert value["metric"] == "attributes"
    assert [list(row["metrics"]) for row in value["rows"]] == [["attributes", "body", "colour"]] * 2
    assert value["rows"][0]["metrics"]["body"]["over"] == "seeds"
    decoder, scores = images(out), stamps(out, "score.json")
    assert fastgen(*sweep)[0] == 0
    assert stamps(out, "score.json") == scores
    (tmp_path / "attributes.json").write_text(json.dumps(asked).replace("cat", "slime"))
    assert fastgen(*sweep)[0] == 0
    again = json.loads((out / "sweep.json").read_text())
    for row, other in zip(value["rows"], again["rows"], strict=True):
        assert row["metrics"]["body"]["value"] == pytest.approx(1 - other["metrics"]["body"]["value"])
    assert images(out) == decoder


def test_broken_images_leave_their_point_without_a_score_and_the_others_with_one(
    fastgen, arguments, monkeypatch, tmp_path
):
    from fastgen.generate import decoder

    calls = []

    def problem_of(*values):
        calls.append(values)
        return "flat: on purpose" if len(calls) == 2 else None

    monkeypatch.setattr(decoder, "problem_of", problem_of)
    code, _, err = fastgen(*arguments(tmp_path / "out", "--num-inference-steps", "2,3"))
    assert code == 1
    assert err.splitlines()[-1].startswith(
        "fastgen: error: 1 points failed: ddpm 2 steps, guidance 1.5: 1 images failed"
    )
    first, second = rows(tmp_path / "out").values()
    assert first["error"] == "1 images failed, such as seed-0/1.png: flat: on purpose"
    assert second["error"] is None
    assert "label_accuracy" in second
    monkeypatch.undo()


def test_without_matplotlib_everything_but_the_plot_is_written(fastgen_process, arguments, tmp_path):
    out = tmp_path / "out"
    done = fastgen_process(*arguments(out, "--num-inference-steps", "2"), blocked=["matplotlib"])
    assert done.returncode == 0, done.stderr
    assert 'no plot.png: it needs matplotlib, pip install "matplotlib>=3.8"' in done.stderr
    assert not (out / "plot.png").exists()
    assert (out / "contact_sheet.png").exists()


def test_an_engine_that_is_not_certified_on_this_card_generates_nothing(fastgen, arguments, tmp_path, monkeypatch):
    from fastgen.errors import FastgenError

    seen = []

    def refuse(pipeline):
        seen.append(pipeline.engine.name)
        raise FastgenError("not certified: engine ort")

    monkeypatch.setattr(importlib.import_module("fastgen.cli.sweep"), "ensure_certified", refuse)
    code, _, err = fastgen(*arguments(tmp_path))
    assert (code, seen) == (1, ["ort"])
    assert "not certified: engine ort" in err
    assert images(tmp_path) == {}
