"""A job writes every file that it promises, records how, and never touches another job's folder."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastgen.errors import FastgenError, InputError
from fastgen.files.png import read_metadata
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request, read_requests
from fastgen.generate.run import Run
from fastgen.generate.shards import Shard

KINDS = ["text", "labels"]


@pytest.fixture(scope="module")
def pipelines(text_bundle, label_bundle):
    return {"text": load(text_bundle, "ort"), "labels": load(label_bundle, "ort")}


def start(pipeline, requests, out, *, batch_size=2, seed=0, **settings):
    return run_job(Run(pipeline, requests, pipeline.settings(seed=seed, **settings)), out, batch_size=batch_size)


def manifest(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def files(out):
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_writes_all_its_files_and_its_manifest_in_request_order(pipelines, requests_files, tmp_path, kind):
    pipeline, requests = pipelines[kind], read_requests(requests_files[kind])
    report = start(pipeline, requests, tmp_path / "out")
    out = tmp_path / "out"
    names = [r.image_name for r in requests]
    assert sorted(files(out)) == sorted([*names, "manifest.jsonl", "job.json", "contact_sheet.png"])
    lines = manifest(out)
    assert [line["image_name"] for line in lines] == names
    assert (report.images, report.generated, report.errors) == (len(names), len(names), {})
    for request, line in zip(requests, lines, strict=True):
        with Image.open(out / request.image_name) as image:
            assert image.size == pipeline.spec.space.image[:0:-1]
            assert image.mode == "RGB"
        assert read_metadata(out / request.image_name) == line
        assert line["id"] == request.id
        assert line.get("prompt") == request.prompt
        assert tuple(line.get("labels", ())) == (request.labels or ())
        assert (line["engine"], line["dtype"], line["device"]) == ("ort", "fp32", "cpu")
        assert line["model_sha256"] == pipeline.spec.sha256
        assert line["scheduler"] == pipeline.spec.sampling.scheduler
        assert line["guidance_scale"] == pipeline.spec.sampling.guidance_scale
    (run,) = json.loads((out / "job.json").read_text())["runs"]
    assert run["images"] == len(names)
    assert run["seconds"] > 0


def test_the_manifest_holds_nothing_that_differs_between_two_runs(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["text"])
    for name in ("first", "second"):
        start(pipelines["text"], requests, tmp_path / name)
    first, second = files(tmp_path / "first"), files(tmp_path / "second")
    del first["job.json"], second["job.json"]  # holds the times
    assert first == second


def test_seeds_are_a_request_s_own_or_follow_from_the_name_and_are_recorded(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["text"])
    start(pipelines["text"], requests, tmp_path / "a", seed=5)
    for line in manifest(tmp_path / "a"):
        digest = hashlib.sha256(f"5:{line['image_name']}".encode()).hexdigest()
        assert line["seed"] == (0 if line["id"] == "2_main" else int(digest, 16) % 2**63)
    start(pipelines["text"], requests, tmp_path / "b", seed=6)
    pairs = [[np.asarray(Image.open(tmp_path / folder / r.image_name)) for folder in "ab"] for r in requests]
    same = [np.array_equal(a, b) for a, b in pairs]
    assert same == [r.seed == 0 for r in requests]


def test_the_python_api_gives_the_pixels_of_the_job(pipelines, requests_files, tmp_path):
    pipeline, requests = pipelines["text"], read_requests(requests_files["text"])
    start(pipeline, requests, tmp_path / "out", batch_size=3)
    seeds = [line["seed"] for line in manifest(tmp_path / "out")]
    images = pipeline.generate([r.prompt for r in requests], seeds=seeds, batch_size=3)
    for request, image in zip(requests, images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(tmp_path / "out" / request.image_name)))


@pytest.mark.parametrize("kind", KINDS)
def test_min_max_stretches_every_image_and_is_recorded(pipelines, requests_files, tmp_path, kind):
    start(pipelines[kind], read_requests(requests_files[kind]), tmp_path, normalize="min-max")
    for line in manifest(tmp_path):
        pixels = np.asarray(Image.open(tmp_path / line["image_name"]))
        assert (pixels.min(), pixels.max()) == (0, 255)
        assert line["normalize"] == read_metadata(tmp_path / line["image_name"])["normalize"] == "min-max"
    with pytest.raises(InputError, match="unknown normalize 'minmax'; did you mean 'min-max'"):
        pipelines[kind].settings(normalize="minmax")


def test_a_long_prompt_is_truncated_reported_and_recorded(pipelines, tmp_path):
    long = "a red dragon " * 60
    requests = [Request("0", "0.png", prompt=long), Request("1", "1.png", prompt="short")]
    report = start(pipelines["text"], requests, tmp_path / "out")
    tokens = len(pipelines["text"].tokenizers[0]._backend.encode(long).ids)
    assert report.truncated == {long: tokens}
    first, second = manifest(tmp_path / "out")
    assert (first["prompt"], first["truncated_from_tokens"]) == (long, tokens)
    assert "truncated_from_tokens" not in second


def test_images_in_subfolders_and_with_unicode_names(pipelines, tmp_path):
    names = ["deep/er/red.png", "deep/blue.png", "ドラゴン 🐉.png"]
    requests = [Request(str(i), name, labels=("red cube",), seed=i) for i, name in enumerate(names)]
    start(pipelines["labels"], requests, tmp_path / "out")
    assert all((tmp_path / "out" / name).is_file() for name in names)
    assert read_metadata(tmp_path / "out" / names[2])["image_name"] == names[2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_job_generates_nothing_again(pipelines, requests_files, tmp_path, kind):
    requests = read_requests(requests_files[kind])
    start(pipelines[kind], requests, tmp_path)
    before = files(tmp_path)
    report = start(pipelines[kind], requests, tmp_path)
    assert report.generated == 0
    assert files(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_job_writes_the_same_bytes_batch_by_batch(pipelines, requests_files, tmp_path, kind):
    requests = read_requests(requests_files[kind])
    start(pipelines[kind], requests, tmp_path)
    before = files(tmp_path)
    (tmp_path / requests[2].image_name).unlink()
    (tmp_path / "manifest.jsonl").unlink()
    (tmp_path / "contact_sheet.png").unlink()
    report = start(pipelines[kind], requests, tmp_path)
    assert report.generated == 2  # the batch of the missing file
    after = files(tmp_path)
    assert after.pop("job.json") != before.pop("job.json")
    assert after == before


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "seed is 0 there and 1 now"),
        ({"num_inference_steps": 3}, "num_inference_steps is 5 there and 3 now"),
        ({"scheduler": "ddim"}, "scheduler is 'ddpm' there and 'ddim' now"),
        ({"guidance_scale": 2.0}, "guidance_scale is 1.5 there and 2.0 now"),
        ({"guidance_interval": (0, 2)}, "guidance_interval is None there"),
        ({"normalize": "min-max"}, "normalize is 'clamp' there and 'min-max' now"),
    ],
)
def test_another_job_s_folder_is_refused_and_left_alone(pipelines, requests_files, tmp_path, change, field):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path)
    before = files(tmp_path)
    with pytest.raises(InputError, match=f"holds another job: {field}.*choose another --out"):
        start(pipelines["labels"], requests, tmp_path, **change)
    assert files(tmp_path) == before


def test_a_job_goes_on_in_other_batches_where_bytes_do_not_depend_on_them(
    pipelines, label_model, requests_files, tmp_path
):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path / "ort", batch_size=2)
    before = files(tmp_path / "ort")
    (tmp_path / "ort" / "2.png").unlink()
    assert start(pipelines["labels"], requests, tmp_path / "ort", batch_size=1).generated == 1
    after = files(tmp_path / "ort")
    assert {f: b for f, b in after.items() if f != "job.json"} == {f: b for f, b in before.items() if f != "job.json"}
    eager = load(label_model, "eager")
    start(eager, requests, tmp_path / "eager", batch_size=2)
    with pytest.raises(InputError, match="holds another job: batch_size is 2 there and 3 now; choose another --out"):
        start(eager, requests, tmp_path / "eager", batch_size=3)


def test_shards_of_other_batches_are_refused(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    run = Run(pipelines["labels"], requests, pipelines["labels"].settings())
    run_job(run, tmp_path, batch_size=2, shard=Shard(1, 2))
    with pytest.raises(InputError, match="batch_size is 2 there and 3 now"):
        run_job(run, tmp_path, batch_size=3, shard=Shard(2, 2))


def test_other_requests_and_other_engines_are_another_job(pipelines, label_bundle, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path)
    with pytest.raises(InputError, match="requests_sha256"):
        start(pipelines["labels"], requests[:3], tmp_path)
    with pytest.raises(InputError, match="engine is 'ort' there and 'openvino' now"):
        start(load(label_bundle, "openvino"), requests, tmp_path)


@pytest.mark.parametrize("taken", ["0.png", "manifest.jsonl", "contact_sheet.png"])
def test_files_that_no_job_wrote_are_not_overwritten(pipelines, requests_files, tmp_path, taken):
    (tmp_path / taken).write_text("mine")
    with pytest.raises(InputError, match=rf"exist already, such as {taken}, but no job\.json"):
        start(pipelines["labels"], read_requests(requests_files["labels"]), tmp_path)
    assert files(tmp_path) == {taken: b"mine"}


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"job": 3}', '{"job": {}, "runs": 3}', '{"job": {}}'])
def test_a_job_json_that_is_none_of_ours_is_one_line(pipelines, requests_files, tmp_path, content):
    (tmp_path / "job.json").write_text(content)
    with pytest.raises(InputError, match=r"job\.json") as error:
        start(pipelines["labels"], read_requests(requests_files["labels"]), tmp_path)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == {"job.json": content.encode()}


def test_odd_output_folders_are_one_line(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder" / "job.json").mkdir(parents=True)
    for out, words in (
        ("file", "is not a folder"),
        ("file/below", "is not a folder"),
        ("dangling", "is not a folder"),
        ("folder", "is a folder, expected a JSON file"),
    ):
        with pytest.raises(InputError, match=words):
            start(pipelines["labels"], requests, tmp_path / out)
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system that refuses new folders")
def test_a_folder_that_cannot_be_made_is_one_line(pipelines, requests_files):
    with pytest.raises(FastgenError, match="/proc/generated: the folder cannot be made: No such file") as error:
        start(pipelines["labels"], read_requests(requests_files["labels"]), Path("/proc/generated"))
    assert "\n" not in str(error.value)


def test_an_output_folder_may_be_a_symlink_but_nothing_below_it(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    start(pipelines["labels"], requests, tmp_path / "link")
    assert (tmp_path / "real" / "3.png").is_file()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="sub is a symlink"):
        start(pipelines["labels"], [Request("0", "sub/x.png", labels=("red cube",))], tmp_path / "out")
    assert not (tmp_path / "real" / "x.png").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"guidance_interval": (3, 2)}, "guidance_interval is 3 2"), ({"scheduler": "nope"}, "unknown scheduler 'nope'")],
)
def test_a_refused_job_leaves_no_folder(pipelines, requests_files, tmp_path, settings, words):
    with pytest.raises(InputError, match=words):
        start(pipelines["labels"], read_requests(requests_files["labels"]), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


def break_images(monkeypatch, broken):
    """Make the images of the requests at the positions of `broken` become those values."""
    steps, seen = Run.steps, []

    def replaced(run, batch):
        for row, x in steps(run, batch):
            if row == len(run.table) - 1:  # of a label model: the images themselves
                for request, image in zip(run.requests[batch.rows], x, strict=True):
                    seen.append(request.id)
                    if int(request.id) in broken:
                        image[...] = broken[int(request.id)]
            yield row, x

    monkeypatch.setattr(Run, "steps", replaced)
    return seen


def test_broken_images_are_lines_of_the_manifest_and_no_files_and_are_tried_again(
    pipelines, requests_files, tmp_path, monkeypatch
):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path / "whole")
    with monkeypatch.context() as patch:
        break_images(patch, {1: math.nan, 3: 0.5})
        report = start(pipelines["labels"], requests, tmp_path / "out")
    assert set(report.errors) == {"1.png", "3.png"}
    assert {f.name for f in (tmp_path / "out").glob("?.png")} == {"0.png", "2.png"}
    errors = [line.get("error") for line in manifest(tmp_path / "out")]
    assert errors[0] is errors[2] is None
    assert "not finite" in errors[1]
    assert "flat" in errors[3]
    assert (tmp_path / "out" / "contact_sheet.png").is_file()

    seen = break_images(monkeypatch, {})
    assert start(pipelines["labels"], requests, tmp_path / "out").errors == {}
    assert seen == ["0", "1", "2", "3"]
    first, second = files(tmp_path / "whole"), files(tmp_path / "out")
    del first["job.json"], second["job.json"]
    assert first == second


def test_a_job_whose_images_are_all_broken_has_a_manifest_and_no_pictures(
    pipelines, requests_files, tmp_path, monkeypatch
):
    requests = read_requests(requests_files["labels"])
    break_images(monkeypatch, dict.fromkeys(range(4), math.inf))
    assert len(start(pipelines["labels"], requests, tmp_path).errors) == 4
    assert sorted(files(tmp_path)) == ["job.json", "manifest.jsonl"]


def test_a_file_that_cannot_be_written_stops_the_job_at_the_next_step(pipelines, requests_files, tmp_path, monkeypatch):
    """Not after the whole of the next batch, which may take minutes."""
    steps, run = [], pipelines["labels"].engine.run

    def counted(*arguments):
        steps.append(arguments)
        return run(*arguments)

    def full(path, data):
        raise FastgenError(f"{path}: cannot be written: No space left on device")

    monkeypatch.setattr(pipelines["labels"].engine, "run", counted)
    monkeypatch.setattr("fastgen.files.store.write_bytes", full)
    with pytest.raises(FastgenError, match=r"0\.png: cannot be written: No space left"):
        start(pipelines["labels"], read_requests(requests_files["labels"]), tmp_path, num_inference_steps=150)
    assert 150 <= len(steps) < 300


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX modes")
def test_files_have_the_modes_of_the_user_s_umask(pipelines, requests_files, tmp_path):
    before = os.umask(0o022)
    try:
        start(pipelines["labels"], read_requests(requests_files["labels"]), tmp_path)
    finally:
        os.umask(before)
    assert {f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {0o644}
