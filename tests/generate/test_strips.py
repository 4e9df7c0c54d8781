"""Denoising strips show the states that diffusers' own loop passes through, and a job resumes them like its images."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers_loop import run_diffusers
from PIL import Image

from fastgen.errors import InputError
from fastgen.files.png import image_grid, read_metadata, read_pixels
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import load
from fastgen.generate.quantise import quantised
from fastgen.generate.requests import Request, read_requests
from fastgen.generate.run import Run
from fastgen.generate.strips import StripPlan, parse_timesteps
from fastgen.models.folder import load_model
from fastgen.sampling.compile import TableCompiler
from fastgen.sampling.noise import normal
from fastgen.sampling.schedulers import make_scheduler

SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear"}
SEEDS = [3, 8]


@pytest.fixture(scope="module")
def models(label_model, text_model):
    return {"labels": label_model, "text": text_model}


@pytest.fixture(scope="module")
def pipelines(models):
    return {kind: load(folder, "eager") for kind, folder in models.items()}


def frames(strip, count):
    """The images (H, W, 3) that a strip holds side by side, 2 px apart."""
    size = strip.shape[0] - 4
    return [strip[2:-2, 2 + j * (size + 2) : 2 + j * (size + 2) + size] for j in range(count)]


def start(pipeline, requests, out, strip=(800, 400, 0), **options):
    settings = pipeline.settings(num_inference_steps=5, **options)
    return run_job(Run(pipeline, requests, settings, strip=strip), out, batch_size=2)


def files(out):
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}


@pytest.mark.parametrize("on_gpu", [False, True], ids=["loop", "device loop"])
@pytest.mark.parametrize(
    ("kind", "scheduler"),  # Heun not on cosine betas: from sigma 20,000 on its corrector amplifies rounding
    [
        ("labels", "ddim"),
        ("labels", "euler"),
        ("labels", "pndm"),
        ("text", "ddim"),
        ("text", "heun"),
        ("text", "euler"),
    ],
)
def test_frames_are_the_network_inputs_of_diffusers_own_loop(
    kind, scheduler, on_gpu, models, pipelines, tmp_path, monkeypatch
):
    pipeline, model = pipelines[kind], load_model(models[kind])
    monkeypatch.setattr(pipeline, "on_gpu", on_gpu)
    monkeypatch.setattr("fastgen.engines.memory.free_memory", lambda engine: 2**40)
    condition = {"prompt": "a red dragon"} if kind == "text" else {"labels": ["red cube"]}
    (tmp_path / "r.json").write_text(json.dumps([{**condition, "seed": seed} for seed in SEEDS]))
    requests = read_requests(tmp_path / "r.json", pipeline.spec.condition.labels)
    reference = make_scheduler(scheduler, model.scheduler_config)
    reference.set_timesteps(5)
    cond = Run(pipeline, requests, pipeline.settings(guidance_scale=1.0)).conditions(requests)
    seen = {}

    def network(x, t):
        seen[round(float(t))] = x  # the last one at a timestep: a corrector's
        return pipeline.engine.run("unet", x, torch.full((2,), float(t)), *cond)[0]

    x = reference.init_noise_sigma * torch.from_numpy(normal(SEEDS, 0, pipeline.spec.space.shape))
    with torch.no_grad():
        seen[0] = run_diffusers(reference, reference.timesteps, network, x, seeds=SEEDS)
    wanted = [t for t in dict.fromkeys(map(round, reference.timesteps.tolist())) if t] + [0]
    start(pipeline, requests, tmp_path / "out", wanted, scheduler=scheduler, guidance_scale=1.0)
    for i in range(2):
        found = frames(read_pixels(tmp_path / "out" / "strips" / f"{i}.png"), len(wanted))
        for timestep, frame in zip(wanted, found, strict=True):
            state = seen[timestep][i : i + 1]
            with torch.no_grad():
                image = model.vae.decode(model.space.to_vae(state)).sample if kind == "text" else state
            assert np.abs(frame.astype(int) - quantised(image)[0][0].numpy()).max() <= 1, timestep
        assert np.array_equal(found[-1], read_pixels(tmp_path / "out" / f"{i}.png"))


def test_a_strip_says_what_it_shows(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path, (900, 450, 0), scheduler="ddim")
    table = TableCompiler(pipelines["labels"].spec.scheduler_config).table("ddim:5")
    metadata = read_metadata(tmp_path / "strips" / "1.png")
    stands = [*table.timesteps.tolist(), 0.0]
    assert metadata["strip"] == {
        "timesteps": [900, 450, 0],
        "nearest": [min(stands, key=lambda t: abs(t - wanted)) for wanted in (900, 450, 0)],
        "state": "x_t",
    }
    assert metadata["labels"] == ["red cube", "blue sphere"]
    with Image.open(tmp_path / "strips.png") as sheet:
        assert sheet.width >= 3 * 16


@pytest.mark.parametrize("lost", ["strips/1.png", "1.png", "strips.png"])
def test_a_resumed_job_makes_what_is_missing_and_the_same_bytes(lost, pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path)
    before = files(tmp_path)
    (tmp_path / lost).unlink()
    report = start(pipelines["labels"], requests, tmp_path)
    assert report.generated == (0 if lost == "strips.png" else 2)
    after = files(tmp_path)
    for found in (before, after):
        found.pop("job.json")
    assert after == before


def test_strips_added_later_or_at_other_timesteps_are_made_and_the_images_stay(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path, None)
    plain = files(tmp_path)
    assert not (tmp_path / "strips").exists()
    assert start(pipelines["labels"], requests, tmp_path, (500, 0)).generated == 4
    assert {name: data for name, data in files(tmp_path).items() if name in plain and name != "job.json"} == {
        name: data for name, data in plain.items() if name != "job.json"
    }
    assert start(pipelines["labels"], requests, tmp_path, (600, 0)).generated == 4
    assert read_metadata(tmp_path / "strips" / "0.png")["strip"]["timesteps"] == [600, 0]
    assert start(pipelines["labels"], requests, tmp_path, (600, 0)).generated == 0


def test_strips_are_stretched_as_their_images_are(pipelines, requests_files, tmp_path):
    requests = read_requests(requests_files["labels"])
    start(pipelines["labels"], requests, tmp_path, normalize="min-max")
    for frame in frames(read_pixels(tmp_path / "strips" / "0.png"), 3):
        assert (frame.min(), frame.max()) == (0, 255)


@pytest.mark.parametrize(
    ("wanted", "word"),
    [
        ((1000,), "timestep 1000 is out of range, expected 0 .* to 999"),
        ((-1,), "out of range"),
        ((), "expected 1 to 64"),
    ],
)
def test_timesteps_that_training_never_saw_are_refused_before_anything_is_written(
    wanted, word, pipelines, requests_files, tmp_path
):
    with pytest.raises(InputError, match=word):
        start(pipelines["labels"], read_requests(requests_files["labels"]), tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "a", "900,", "1.5", "-3", "900;500", "9" * 12, "²"])
def test_what_is_no_list_of_timesteps_is_one_line(text):
    with pytest.raises(InputError, match="expected training timesteps"):
        parse_timesteps(text)
    assert parse_timesteps("900, 500,0") == [900, 500, 0]


def test_the_start_of_a_run_and_its_end_are_frames_too():
    table = TableCompiler(SCHEDULE).table("ddim:4")  # timesteps 750, 500, 250, 0
    plan = StripPlan.of(table, [999, 500, 130, 120, 0], 1000)
    assert plan.rows == (-1, 0, 1, 3, 3)
    assert plan.nearest == (750.0, 500.0, 250.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "name", ["strips/0.png", "grid.png", "Strips.png", "job.json/0.png", "shard-1-of-2.json/0.png"]
)
def test_images_named_like_what_a_job_writes_are_refused(pipelines, tmp_path, name):
    (tmp_path / "r.json").write_text(json.dumps([{"labels": ["red cube"], "image_name": name}]))
    with pytest.raises(InputError, match="is kept for what a job writes"):
        read_requests(tmp_path / "r.json", pipelines["labels"].spec.condition.labels)
    run = Run(pipelines["labels"], [Request("0", name, labels=("red cube",))], pipelines["labels"].settings())
    with pytest.raises(InputError, match="rename it"):
        run_job(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "columns"), [(["--grid"], 8), (["--grid", "3"], 3)])
def test_the_command_writes_strips_and_a_grid_of_all_images(
    arguments, columns, fastgen, label_model, requests_files, tmp_path
):
    out = tmp_path / "out"
    model = ["--model", label_model, "--num-inference-steps", 2, "--out", out]
    code, _, err = fastgen("generate", requests_files["labels"], *model, "--strip", "500,0", *arguments)
    assert (code, err) == (0, "")
    images = [read_pixels(out / f"{i}.png") for i in range(4)]
    assert np.array_equal(read_pixels(out / "grid.png"), image_grid(images, columns))
    assert sorted(f.name for f in (out / "strips").iterdir()) == [f"{i}.png" for i in range(4)]
    shutil.rmtree(out)
    code, _, err = fastgen("generate", requests_files["labels"], *model, "--strip", "5000,0")
    assert code == 2
    assert "out of range" in err
    assert not out.exists()


def test_shards_put_strips_and_grid_together(pipelines, requests_files, tmp_path):
    from fastgen.generate.shards import Shard

    pipeline, requests = pipelines["labels"], read_requests(requests_files["labels"])
    settings = pipeline.settings(num_inference_steps=2)
    options = {"batch_size": 2, "grid": 2}
    run_job(Run(pipeline, requests, settings, strip=(500, 0)), tmp_path / "whole", **options)
    for index in (1, 2):
        run_job(Run(pipeline, requests, settings, strip=(500, 0)), tmp_path / "parts", shard=Shard(index, 2), **options)
    whole, parts = files(tmp_path / "whole"), files(tmp_path / "parts")
    assert {k: v for k, v in whole.items() if k != "job.json"} == {k: v for k, v in parts.items() if k != "job.json"}
