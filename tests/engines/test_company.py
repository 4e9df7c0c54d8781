"""An image does not depend on its company: the same request gives the same bytes at every batch size and place."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from PIL import Image

from fastgen.generate.job import run_job
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.models.find import find_folder

SIZES, MOST = (1, 2, 3, 5), 16
ALL_SIZES = (1, 2, 3, 4, 6, 7, 8, MOST)  # odd and even ones, powers of two and not; every job's batches are among them
STEPS = {"num_inference_steps": 1}  # a second one would run the same networks in the same company
ENGINES = [("ort", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")]
COLORS = ("red", "blue", "green", "yellow", "purple", "gray", "brown", "cyan")


@pytest.fixture(params=ENGINES, ids="-".join)
def options(request) -> dict[str, Any]:
    """Engine and precision, as arguments of `load`; openvino with two threads, hence two lanes."""
    name, dtype = request.param
    pytest.importorskip("onnxruntime" if name == "ort" else name)
    if dtype == "bf16":
        from fastgen.engines.openvino.engine import shared_core

        if "BF16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            pytest.skip("this CPU has no bf16")
    return {"engine": name, "dtype": dtype, "threads": 1 if name == "ort" else 2}


@pytest.fixture(scope="module")
def sd_model(tmp_path_factory) -> Path:
    """Stable Diffusion's networks with random weights, narrow: 4 levels, 8 heads, 40 channels, no multiple of AMX's tile."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from fastgen.models.build import build_text_encoder
    from fastgen.models.folder import Model
    from fastgen.models.saving import save_model
    from fastgen.sampling.defaults import Sampling
    from fastgen.training.bpe import train_tokenizer

    torch.manual_seed(2)
    text = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2}
    tokenizer = train_tokenizer([conditions("text", 16)[i] for i in range(16)], vocab_size=600)
    levels = {"layers_per_block": 2, "norm_num_groups": 8}
    unet: Any = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(40, 80, 160, 160),
        cross_attention_dim=64,
        attention_head_dim=8,  # heads, in diffusers
        **levels,
    )
    vae: Any = AutoencoderKL(
        block_out_channels=(8, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=128,
        **levels,
    )
    schedule = {
        "_class_name": "PNDMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "skip_prk_steps": True,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    model = Model(None, unet.eval(), schedule, Sampling("pndm", 5, 7.5), tokenizers=[tokenizer])
    model.text_encoders, model.vae = [build_text_encoder(text | {"vocab_size": 600}, tokenizer, 3)], vae.eval()
    folder = tmp_path_factory.mktemp("models") / "sd"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def large_bundle(sd_model, export_few, graph_once, tmp_path_factory):
    """Name ("sd", or a shipped model's) -> its bundle, exported once."""
    done: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in done:
            done[name] = tmp_path_factory.mktemp("bundles") / name
            with mock.patch("export.onnx.export_onnx", graph_once):
                export_few(sd_model if name == "sd" else find_folder(name), done[name], engines=["ort"])
        return done[name]

    return get


def conditions(kind: str, count: int) -> Any:
    if kind == "text":
        return [f"A {COLORS[i % 8]} monster, number {i}{', with horns' * (i % 3)}." for i in range(count)]
    return [[f"{COLORS[i % 8]} cube", "red sphere"][: 1 + i % 2] for i in range(count)]


def generated(pipeline, rows, guidance, **options) -> list[bytes]:
    """The images' bytes of the requests with these numbers, in one batch."""
    kind = pipeline.spec.condition.kind
    every = conditions(kind, max(rows) + 1)
    key = "prompts" if kind == "text" else "labels"
    asked = {key: [every[i] for i in rows], "seeds": [100 + i for i in rows], **STEPS, **options}
    return [image.tobytes() for image in pipeline.generate(**asked, guidance_scale=guidance, batch_size=MOST)]


def written(pipeline, count, batch_size, guidance, out, lost=()) -> list[bytes]:
    """The images' bytes of a job; files of the requests `lost` are deleted first, so that it goes on."""
    text = pipeline.spec.condition.kind == "text"
    requests = [
        Request(str(i), f"{i}.png", prompt=c if text else None, labels=None if text else tuple(c), seed=100 + i)
        for i, c in enumerate(conditions(pipeline.spec.condition.kind, count))
    ]
    for i in lost:
        (out / f"{i}.png").unlink()
    settings = pipeline.settings(guidance_scale=guidance, **STEPS)
    report = run_job(Run(pipeline, requests, settings), out, batch_size=batch_size, progress=False)
    assert report.errors == {}
    assert len(lost) <= report.generated <= count if lost else report.generated == count
    images = []
    for request in requests:
        with Image.open(out / request.image_name) as image:
            images.append(image.tobytes())
    return images


def check(pipeline, sizes, jobs, guidance, tmp_path) -> None:
    """`generate` in batches of these sizes, and jobs, whole and resumed, in batches of some: what every request gives alone."""
    most = max(sizes)
    count = min(most, max(jobs) + 1)  # of requests in a job: its last batch is another than the others
    alone = [generated(pipeline, [i], guidance)[0] for i in range(most)]
    assert len(set(alone)) == most  # requests matter
    for size in sizes:
        rows = list(reversed(range(size)))  # each at another place than in the job
        assert generated(pipeline, rows, guidance) == [alone[i] for i in rows], f"generate, batch of {size}"
        if size not in jobs:
            continue
        out = tmp_path / f"{guidance}-{size}"
        assert written(pipeline, count, size, guidance, out) == alone[:count], f"job, batches of {size}"
        other = size % (count - 1) + 1  # the job goes on in other batches
        assert written(pipeline, count, other, guidance, out, lost=[0, count - 1]) == alone[:count], (
            f"resumed in batches of {other}"
        )


@pytest.mark.parametrize(
    ("kind", "guidance"),
    [
        ("text", 3.0),
        ("labels", 1.0),
        pytest.param("text", 1.0, marks=pytest.mark.slow),
        pytest.param("labels", 3.0, marks=pytest.mark.slow),
    ],
)
def test_an_image_does_not_depend_on_its_company(exports, options, kind, guidance, tmp_path):
    check(load(exports(kind)[0], **options), SIZES, (1, 3), guidance, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guidance"), [("iclevr-64", 3.0), ("monsters-64", 1.0), ("sd", 3.0)])
def test_an_image_does_not_depend_on_its_company_up_to_16(large_bundle, options, name, guidance, tmp_path):
    check(load(large_bundle(name), **options | {"threads": 2}), ALL_SIZES, (1, 3, 7), guidance, tmp_path)
