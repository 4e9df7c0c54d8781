"""Caching of deep features: the split of a UNet, which network a row runs, and whole runs with `cache_interval`."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from fastgen import load
from fastgen.errors import InputError
from fastgen.generate.feature_cache import networks_of_rows

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel  # noqa: E402

from fastgen.models.folder import load_model  # noqa: E402
from fastgen.models.networks.patch_unet import PatchUNet  # noqa: E402
from fastgen.models.networks.split_unet import SplitUNet, _split, deep_shape, why_whole  # noqa: E402

W, S = "unet_whole", "unet_shallow"
SMALL = {"block_out_channels": (8, 16, 24), "norm_num_groups": 4, "attention_head_dim": 4}
UNETS = {  # class, config, shape of the state, arguments
    "labels": (
        UNet2DModel,
        {
            "sample_size": 8,
            "layers_per_block": 2,
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
            "center_input_sample": True,
            "num_class_embeds": 5,
        },
        (3, 8, 8),
        {"class_labels": torch.tensor([1, 3])},
    ),
    "sizes": (  # SDXL's condition, and edges that are no multiple of 4
        UNet2DConditionModel,
        {
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 12,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 10,
            "time_cond_proj_dim": 6,
        },
        (4, 10, 14),
        {
            "encoder_hidden_states": torch.ones(2, 3, 12),
            "timestep_cond": torch.ones(2, 6),
            "added_cond_kwargs": {"text_embeds": torch.ones(2, 10), "time_ids": torch.ones(2, 6)},
        },
    ),
    "patches": (
        PatchUNet,
        {"sample_size": 16, "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4},
        (3, 16, 16),
        {"class_labels": torch.ones(2, 32)},
    ),
}


def made(kind):
    cls, config, shape, arguments = UNETS[kind]
    torch.manual_seed(0)
    unet = cls(**(SMALL | config)).eval()
    sample, timestep = torch.randn(2, *shape), torch.tensor([700.0, 20.0])
    return unet, sample, timestep, arguments


@pytest.mark.parametrize("kind", UNETS)
def test_a_split_unet_predicts_what_the_unet_does(kind):
    unet, sample, timestep, arguments = made(kind)
    with torch.inference_mode():
        expected = unet(sample, timestep, **arguments, return_dict=False)[0]
        prediction, deep = _split(unet).whole(sample, timestep, **arguments)
        shallow = _split(unet).shallow(sample, timestep, deep, **arguments)
        other = _split(unet).shallow(sample, timestep, deep + 1, **arguments)
    assert why_whole(unet) is None
    assert tuple(deep.shape) == (2, *deep_shape(unet, UNETS[kind][2]))
    assert torch.equal(prediction, expected)
    assert torch.equal(shallow, expected)
    assert (other - expected).abs().max() > 1e-4  # the deep feature matters


def test_what_cannot_be_split_says_why():
    one = UNet2DModel(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    dit = DiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=8, norm_num_groups=4
    )
    skip = UNet2DModel(
        block_out_channels=(32, 32),
        down_block_types=("SkipDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "SkipUpBlock2D"),
    )
    assert why_whole(one) == "its UNet2DModel has one level, hence no deep features"
    assert why_whole(dit) == "DiTTransformer2DModel is no UNet of diffusers"
    assert why_whole(skip) == "its UNet2DModel has blocks of the kind SkipDownBlock2D"


@pytest.mark.parametrize(
    ("guided", "interval", "expected"),
    [
        ([True] * 5, 2, [W, S, W, S, W]),
        ([True] * 7, 3, [W, S, S, W, S, S, W]),
        ([False, True, True, True, False, False, False], 3, [W, W, S, S, W, S, S]),
        ([True] * 3, 9, [W, S, S]),
        ([True] * 3, 1, ["unet"] * 3),
    ],
)
def test_which_network_a_row_runs(guided, interval, expected):
    assert networks_of_rows(guided, interval) == expected


def images(pipeline, kind, **settings):
    given = (
        {"prompts": ["a red dragon", "a blue slime"]} if kind == "text" else {"labels": [["red cube"], ["gray cube"]]}
    )
    return np.stack([np.asarray(image) for image in pipeline.generate(**given, seeds=[1, 2], **settings)])


@pytest.mark.parametrize("kind", ["text", "labels"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_every_second_evaluation_runs_the_whole_unet(request, kind, scale):
    pipeline = load(request.getfixturevalue(f"{kind.removesuffix('s')}_model"), "eager")
    calls = Counter()
    forward = pipeline.engine.run

    def run(network, *inputs):
        calls[network, len(inputs[0])] += 1
        return forward(network, *inputs)

    pipeline.engine.run = run
    found = images(pipeline, kind, num_inference_steps=6, guidance_scale=scale, scheduler="ddim", cache_interval=2)
    rows = 2 if scale == 1.0 else 4
    assert {key: n for key, n in calls.items() if key[0].startswith("unet")} == {(W, rows): 3, (S, rows): 3}
    whole = images(pipeline, kind, num_inference_steps=6, guidance_scale=scale, scheduler="ddim")
    assert calls["unet", rows] == 6
    assert not np.array_equal(found, whole)


def test_an_interval_of_one_is_no_caching(text_model):
    pipeline = load(text_model, "eager")
    assert np.array_equal(images(pipeline, "text", cache_interval=1), images(pipeline, "text"))


def test_a_second_evaluation_of_the_same_state_would_be_the_same(text_model):
    """With the deep feature of its own input the shallow network is the whole one, guided too."""
    engine = load(text_model, "eager").engine
    sample, timestep, states = engine.samples("unet", 2)
    both = torch.cat([states, -states])
    prediction, deep = engine.run_halves(W, sample, timestep, both)
    assert torch.equal(engine.run_halves(S, sample, timestep, both, deep)[0], prediction)
    assert torch.equal(engine.run_guided(sample, timestep, both), prediction)
    halves = [engine.run(W, sample, timestep, half)[0] for half in (states, -states)]
    assert torch.allclose(torch.cat(halves), prediction, atol=1e-5)


def test_solvers_of_several_evaluations_and_guidance_intervals(text_model):
    """Evaluations are counted, not steps: heun has two in each but the last."""
    from fastgen.generate.requests import Request
    from fastgen.generate.run import Run

    pipeline = load(text_model, "eager")
    requests = [Request("a", "a.png", prompt="a red dragon")]
    settings = pipeline.settings(scheduler="heun", num_inference_steps=3, cache_interval=2)
    assert Run(pipeline, requests, settings).networks == [W, S, W, S, W]
    settings = pipeline.settings(scheduler="ddim", num_inference_steps=6, cache_interval=3, guidance_interval=(1, 3))
    run = Run(pipeline, requests, settings)
    assert run.networks == [W, W, S, W, S, S]
    assert np.isfinite(run.images(run.batches(1)[0])).all()


def test_batches_and_late_starts(text_model):
    """Images do not depend on the batches, and a late start begins with the whole network."""
    from fastgen.generate.requests import Request
    from fastgen.generate.run import Run

    pipeline = load(text_model, "eager")
    settings = {"num_inference_steps": 4, "cache_interval": 2}
    together = images(pipeline, "text", batch_size=2, **settings).astype(int)
    alone = images(pipeline, "text", batch_size=1, **settings).astype(int)
    assert np.abs(together - alone).max() <= 1

    class Start:
        texts = ()
        identity = ()

        def latents(self, requests):
            return np.zeros((len(requests), 4, 8, 8), np.float32)

    late = pipeline.settings(**settings).late(noise_steps=3)
    run = Run(pipeline, [Request("a", "a.png", prompt="a red dragon")], late, Start())
    assert run.networks == [W, S, W]
    assert np.isfinite(run.images(run.batches(1)[0])).all()


def test_the_interval_is_recorded(fastgen, text_model, requests_files, tmp_path):
    words = [requests_files["text"], "--model", text_model, "--engine", "eager", "--num-inference-steps", 4]
    code, _, err = fastgen("generate", *words, "--cache-interval", 2, "--out", tmp_path / "cached")
    assert code == 0, err
    code, _, err = fastgen("generate", *words, "--cache-interval", 1, "--out", tmp_path / "plain")
    assert code == 0, err
    lines = {name: (tmp_path / name / "manifest.jsonl").read_text().splitlines() for name in ("cached", "plain")}
    assert [json.loads(line)["cache_interval"] for line in lines["cached"]] == [2] * 5
    assert "cache_interval" not in lines["plain"][0]
    code, _, err = fastgen("generate", *words, "--cache-interval", 3, "--out", tmp_path / "cached")
    assert code == 2
    assert "cache_interval is 2 there and 3 now" in err


def test_an_estimate_times_both_networks(text_model, requests_files, fastgen):
    words = [requests_files["text"], "--model", text_model, "--engine", "eager", "--num-inference-steps", 4]
    code, out, err = fastgen("generate", *words, "--cache-interval", 2, "--dry-run")
    assert code == 0, err
    assert "4 evaluations each" in out


def test_settings_refuse_an_interval_below_one(text_model):
    pipeline = load(text_model, "eager")
    with pytest.raises(InputError, match="cache_interval is 0, expected at least 1"):
        pipeline.settings(cache_interval=0)


def test_engines_and_models_without_it_refuse(text_model, label_model, fastgen, requests_files, tmp_path):
    words = [requests_files["text"], "--model", text_model, "--engine", "compile", "--cache-interval", 2]
    code, _, err = fastgen("generate", *words, "--out", tmp_path / "x")
    assert code == 2
    assert "--cache-interval: for engines eager, ort and openvino on a CPU, not compile on cpu" in err
    model = load_model(label_model)
    model.unet.up_blocks = model.unet.up_blocks[:1]
    with pytest.raises(InputError, match=r"--cache-interval: its UNet2DModel has one level.*, which cannot be split"):
        model.check_split()


def test_a_split_shares_the_weights(text_model):
    unet = load_model(text_model).unet
    assert {id(p) for p in SplitUNet(unet).parameters()} == {id(p) for p in unet.parameters()}
