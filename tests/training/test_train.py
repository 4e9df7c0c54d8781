from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from msgspec.structs import replace
from PIL import Image
from safetensors.torch import load_file

from fastgen.errors import InputError
from fastgen.models.folder import load_model
from fastgen.models.networks.autoencoder import standardise
from fastgen.presets import NetworkPreset, Preset, Training, load_preset
from fastgen.training import train

LABEL_PRESET = """
image_size = 16
[unet.config]
sample_size = 16
block_out_channels = [8, 16]
down_block_types = ["DownBlock2D", "AttnDownBlock2D"]
up_block_types = ["AttnUpBlock2D", "UpBlock2D"]
layers_per_block = 1
norm_num_groups = 4
class_embed_type = "identity"
[unet.train]
steps = 6
batch_size = 4
precision = "fp32"
checkpoint_every = 2
validate_every = 3
validation_fraction = 0.25
flip = true
[conditioner]
kind = "class_embed"
[scheduler]
_class_name = "DDPMScheduler"
beta_schedule = "squaredcos_cap_v2"
prediction_type = "v_prediction"
[sampling]
num_inference_steps = 2
guidance_scale = 2.0
"""

TEXT_PRESET = """
image_size = 32
image_mode = "pad"
[vae.config]
block_out_channels = [8, 8]
down_block_types = ["DownEncoderBlock2D", "DownEncoderBlock2D"]
up_block_types = ["UpDecoderBlock2D", "UpDecoderBlock2D"]
latent_channels = 4
norm_num_groups = 4
sample_size = 32
[vae.train]
steps = 4
batch_size = 4
precision = "fp32"
[text_encoder.config]
vocab_size = 600
hidden_size = 16
intermediate_size = 32
num_hidden_layers = 1
num_attention_heads = 2
[text_encoder.train]
steps = 4
batch_size = 4
precision = "fp32"
[unet.config]
sample_size = 16
block_out_channels = [8, 16]
down_block_types = ["DownBlock2D", "CrossAttnDownBlock2D"]
up_block_types = ["CrossAttnUpBlock2D", "UpBlock2D"]
layers_per_block = 1
norm_num_groups = 4
attention_head_dim = 2
cross_attention_dim = 16
[unet.train]
steps = 4
batch_size = 4
precision = "fp32"
flip = true
[scheduler]
_class_name = "DDIMScheduler"
prediction_type = "v_prediction"
clip_sample = false
[sampling]
num_inference_steps = 2
guidance_scale = 2.0
"""

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def preset_of(text: str, folder: Path, overrides: tuple[str, ...] = ()) -> Preset:
    path = folder / "tiny.toml"
    path.write_text(text, encoding="utf-8")
    return load_preset(path, overrides)


def picture(colour: tuple[int, int, int], seed: int, size: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(-20, 21, (size, size, 3))
    return Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Twelve scenes of one or two coloured cubes, as i-CLEVR names them."""
    folder = tmp_path / "labelled"
    (folder / "iclevr").mkdir(parents=True)
    labels = {}
    for scene in range(12):
        name = list(COLOURS)[scene % 3]
        labels[f"CLEVR_train_{scene:06d}_0.png"] = [f"{name} cube"]
        picture(COLOURS[name], scene, 16).save(folder / "iclevr" / f"CLEVR_train_{scene:06d}_0.png")
    (folder / "train.json").write_text(json.dumps(labels))
    (folder / "objects.json").write_text(json.dumps({f"{name} cube": i for i, name in enumerate(COLOURS)}))
    return folder


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """Six monsters in two poses of two frames."""
    folder = tmp_path / "described"
    (folder / "train").mkdir(parents=True)
    info = {}
    for monster in range(6):
        name = list(COLOURS)[monster % 3]
        texts = [f"A {name} slime number {monster}.", f"{name.capitalize()} slime, {monster} eyes."]
        for key, action in (("main", ""), ("attack1", "The monster is attacking.")):
            info[f"{monster}_{key}"] = {"given_description": texts, "action_description": action, "num_frames": 2}
            for frame in range(2):
                image = picture(COLOURS[name], 10 * monster + frame, 32)
                image.save(folder / "train" / f"{monster}_{key}_{frame}.png")
    (folder / "train_info.json").write_text(json.dumps(info))
    return folder


def weights(model: Path) -> dict[str, torch.Tensor]:
    files = sorted(f for f in model.glob("*/*.safetensors"))
    assert files
    return {f"{f.parent.name}.{k}": v for f in files for k, v in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_label_model_is_trained_saved_and_loaded(labelled: Path, tmp_path: Path) -> None:
    out = train(preset_of(LABEL_PRESET, tmp_path), labelled, tmp_path / "model", progress=False)
    model = load_model(out)
    assert model.condition.kind == "labels"
    assert model.condition.labels == {"red cube": 0, "green cube": 1, "blue cube": 2}
    assert model.sampling.guidance_scale == 2.0
    unet = model.networks()["unet"]
    with torch.no_grad():
        prediction = unet(torch.randn(2, 3, 16, 16), torch.tensor([5.0, 9.0]), torch.eye(3)[:2])
    assert prediction.shape == (2, 3, 16, 16)
    with Image.open(out / "previews" / "000006.png") as preview:
        assert preview.size == sheet_size(3, [1, 1])  # the three validation images above three generated ones
    training = json.loads((out / "fastgen.json").read_text())["training"]
    assert training["image_mode"] == "stretch"
    assert training["images"] == 12
    assert training["stages"]["unet"]["step"] == 6
    assert np.isfinite(training["stages"]["unet"]["validation_loss"])


def test_a_finished_job_is_left_alone(labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = preset_of(LABEL_PRESET, tmp_path)
    out = train(preset, labelled, tmp_path / "model", progress=False)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*")}
    capsys.readouterr()
    train(preset, labelled, out, progress=False)
    assert "already finished" in capsys.readouterr().err
    assert {f: f.stat().st_mtime_ns for f in out.rglob("*")} == before


def test_another_jobs_folder_is_refused_with_the_first_difference(labelled: Path, tmp_path: Path) -> None:
    out = train(preset_of(LABEL_PRESET, tmp_path), labelled, tmp_path / "model", progress=False)
    other = preset_of(LABEL_PRESET, tmp_path, ("unet.train.steps=7",))
    with pytest.raises(InputError, match=r"unet\.train\.steps = 6 there and 7 here"):
        train(other, labelled, out, progress=False)
    picture((9, 9, 9), 99, 20).save(labelled / "iclevr" / "CLEVR_train_000003_0.png")
    with pytest.raises(InputError, match="other data"):
        train(preset_of(LABEL_PRESET, tmp_path), labelled, out, progress=False)


def test_a_folder_with_something_else_in_it_is_refused(labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no training job"):
        train(preset_of(LABEL_PRESET, tmp_path), labelled, tmp_path / "full", progress=False)


def test_how_often_checkpoints_are_written_may_change(labelled: Path, tmp_path: Path) -> None:
    out = train(preset_of(LABEL_PRESET, tmp_path), labelled, tmp_path / "model", progress=False)
    changed = preset_of(LABEL_PRESET, tmp_path, ("unet.train.checkpoint_every=1", "unet.train.accumulation=2"))
    assert train(changed, labelled, out, progress=False) == out


def test_a_job_killed_at_any_moment_continues_to_the_same_weights(labelled: Path, tmp_path: Path) -> None:
    overrides = ("unet.train.steps=40", "unet.train.checkpoint_every=1", "unet.train.validate_every=20")
    preset = preset_of(LABEL_PRESET, tmp_path, overrides)
    whole = train(preset, labelled, tmp_path / "whole", progress=False)
    killed = tmp_path / "killed"
    code = (
        "import sys, torch; from pathlib import Path; from fastgen.presets import load_preset;"
        "from fastgen.training import train; torch.set_num_threads(1);"
        "train(load_preset(sys.argv[1], sys.argv[4:]), Path(sys.argv[2]), Path(sys.argv[3]), progress=False)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "tiny.toml"), str(labelled), str(killed), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(killed.glob("checkpoints/unet/step-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model_index.json").exists()
    assert list(killed.glob("checkpoints/unet/step-*"))
    train(preset, labelled, killed, progress=False)
    assert same(weights(whole), weights(killed))


def test_a_bad_image_stops_training_unless_it_is_skipped(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = labelled / "iclevr" / "CLEVR_train_000001_0.png"
    bad.write_bytes(bad.read_bytes()[:50])
    preset = preset_of(LABEL_PRESET, tmp_path)
    with pytest.raises(InputError, match=r"CLEVR_train_000001_0\.png"):
        train(preset, labelled, tmp_path / "model", progress=False)
    out = train(preset, labelled, tmp_path / "model", skip_bad=True, progress=False)
    assert "1 bad images skipped" in capsys.readouterr().err
    assert json.loads((out / "fastgen.json").read_text())["training"]["images"] == 11


def test_data_of_the_other_kind_is_refused(labelled: Path, described: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds images with labels; preset tiny needs captions"):
        train(preset_of(TEXT_PRESET, tmp_path), labelled, tmp_path / "a", progress=False)
    with pytest.raises(InputError, match="holds images with captions"):
        train(preset_of(LABEL_PRESET, tmp_path), described, tmp_path / "b", progress=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unet.config.sample_size=32", r"unet\.config\.sample_size = 32: gives 32 px, image_size is 16"),
        ("conditioner.dim=5", r"conditioner\.dim = 5: expected 32"),
        ("unet.config.block_out_chanels=[8]", r"unknown key 'unet\.config\.block_out_chanels'; did you mean"),
        ("unet.config.norm_num_groups=3", r"unet\.config: UNet2DModel refuses it"),
        ("unet.config.class_embed_type=timestep", r"class_embed_type: expected 'identity'"),
        ("scheduler.prediction_type=flow", r"scheduler\.prediction_type = 'flow'"),
    ],
)
def test_a_preset_that_does_not_fit_together_is_one_line(
    labelled: Path, tmp_path: Path, override: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as raised:
        train(preset_of(LABEL_PRESET, tmp_path, (override,)), labelled, tmp_path / "model", progress=False)
    assert "\n" not in str(raised.value)


def test_the_concat_conditioner_trains(labelled: Path, tmp_path: Path) -> None:
    text = LABEL_PRESET.replace('kind = "class_embed"', 'kind = "concat"\ndim = 5').replace(
        'class_embed_type = "identity"', "in_channels = 8\nout_channels = 3"
    )
    out = train(preset_of(text, tmp_path), labelled, tmp_path / "model", progress=False)
    assert load_model(out).conditioner.kind == "concat"  # type: ignore[union-attr]


def test_a_text_model_loads_in_diffusers_and_generates(described: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline
    from tokenizers import Tokenizer

    out = train(preset_of(TEXT_PRESET, tmp_path), described, tmp_path / "model", progress=False)
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    ours: Any = load_model(out)
    prompts = ["A red slime number 0. The monster is attacking.", "", "naïve 東 dragon's 42", "a " * 100]
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    ids = pipeline.tokenizer(prompts, **options)["input_ids"]
    assert ids == ours.tokenizers[0](prompts, **options)["input_ids"]
    fast = Tokenizer.from_file(str(out / "tokenizer" / "tokenizer.json"))
    assert fast.encode(prompts[0]).ids == [i for i in ids[0] if i != ids[0][-1]] + [ids[0][-1]]
    states = [
        encoder(torch.tensor(ids)).last_hidden_state for encoder in (pipeline.text_encoder, ours.text_encoders[0])
    ]
    torch.testing.assert_close(*states)
    assert pipeline.vae.config.scaling_factor == ours.space.scaling_factor != 0.18215
    image = pipeline("a red slime", num_inference_steps=2, output_type="np", height=32, width=32).images[0]
    assert image.shape == (32, 32, 3)


def test_the_latents_of_a_trained_autoencoder_have_zero_mean_and_unit_variance_in_every_channel(
    described: Path, tmp_path: Path
) -> None:
    out = train(preset_of(TEXT_PRESET, tmp_path), described, tmp_path / "model", progress=False)
    model: Any = load_model(out)
    pictures = [
        np.asarray(Image.open(file).convert("RGB").resize((32, 32))) for file in sorted(described.rglob("*.png"))
    ]
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        latents = model.vae.encode(x).latent_dist.mean * model.space.scaling_factor
    assert model.space.scaling_factor == pytest.approx(1, abs=0.1)
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 0.2
    assert (latents.std(dim=(0, 2, 3)) - 1).abs().max() < 0.25


def test_standardised_latents_leave_the_autoencoder_as_it_was() -> None:
    vae: Any = load_preset("iclevr-64").vae
    torch.manual_seed(0)
    vae = AutoencoderKL(**vae.config).eval()
    x, mean, std = torch.rand(4, 3, 64, 64) * 2 - 1, torch.randn(16), torch.rand(16) + 0.2
    with torch.no_grad():
        before = vae.encode(x).latent_dist
        picture = vae.decode(before.mean).sample
        standardise(vae, mean, std)
        after = vae.encode(x).latent_dist
        torch.testing.assert_close(vae.decode(after.mean).sample, picture, rtol=0, atol=1e-4)
    shape = (1, 16, 1, 1)
    torch.testing.assert_close(after.mean, (before.mean - mean.view(shape)) / std.view(shape), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(after.std, before.std / std.view(shape), rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="no quant_conv"):
        standardise(AutoencoderKL(use_quant_conv=False), mean, std)


def test_pooled_text_is_taken_at_the_end_token(described: Path, tmp_path: Path) -> None:
    out = train(preset_of(TEXT_PRESET, tmp_path), described, tmp_path / "model", progress=False)
    model = load_model(out)
    ids = torch.tensor(model.tokenizers[0](["a red slime"], padding="max_length", max_length=77)["input_ids"])
    result = model.text_encoders[0](ids)
    end = ids[0].tolist().index(model.tokenizers[0].eos_token_id)
    assert 0 < end < 76
    torch.testing.assert_close(result.pooler_output[0], result.last_hidden_state[0, end])


def test_latents_are_scaled_to_unit_variance(described: Path, tmp_path: Path) -> None:
    out = train(preset_of(TEXT_PRESET, tmp_path), described, tmp_path / "model", progress=False)
    model = load_model(out)
    files = sorted((described / "train").glob("*.png"))
    x = torch.stack([torch.from_numpy(np.array(Image.open(f))).permute(2, 0, 1) / 127.5 - 1 for f in files])
    with torch.no_grad():
        distribution = model.vae.encode(x).latent_dist  # type: ignore[union-attr, operator]
    torch.manual_seed(0)
    assert (model.space.from_vae(distribution.sample())).std().item() == pytest.approx(1, abs=0.05)


def test_finished_stages_are_not_repeated(described: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastgen.training import stages

    preset = preset_of(TEXT_PRESET, tmp_path)
    whole = train(preset, described, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(stages, "_train_unet", lambda *_: sys.exit("killed"))
        with pytest.raises(SystemExit):
            train(preset, described, tmp_path / "parts", progress=False)
    steps: list[str] = []
    optimise = sys.modules["fastgen.training.trainer"].optimise

    def counting(task: Any, *rest: Any) -> Any:
        steps.append(task.name)
        return optimise(task, *rest)

    monkeypatch.setattr("fastgen.training.trainer.optimise", counting)
    train(preset, described, tmp_path / "parts", progress=False)
    assert set(steps) == {"unet"}
    assert same(weights(whole), weights(tmp_path / "parts"))


def test_a_branch_of_a_branch_keeps_the_networks_that_it_was_trained_with(described: Path, tmp_path: Path) -> None:
    first = train(preset_of(TEXT_PRESET, tmp_path), described, tmp_path / "a", progress=False)
    for steps, name, origin in ((6, "b", "a/checkpoints/unet/step-000004"), (8, "c", "b/checkpoints/unet/step-000006")):
        preset = preset_of(TEXT_PRESET, tmp_path, (f"unet.train.steps={steps}",))
        train(preset, described, tmp_path / name, progress=False, resume=tmp_path / origin)
    before, after = (load_model(folder) for folder in (first, tmp_path / "c"))
    assert same(before.vae.state_dict(), after.vae.state_dict())
    assert same(before.text_encoders[0].state_dict(), after.text_encoders[0].state_dict())
    assert not same(before.unet.state_dict(), after.unet.state_dict())
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "vae")
    with pytest.raises(InputError, match=r"vae: holds no checkpoint, and .*step-000006 was trained with that network"):
        train(preset, described, tmp_path / "d", progress=False, resume=tmp_path / "b" / "checkpoints/unet/step-000006")


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("a", r"a: is no checkpoint to resume from; expected RUN/checkpoints/STAGE/step-000500, STAGE one of vae, "),
        ("a/checkpoints/unet", r"unet: is no checkpoint to resume from"),
        ("a/checkpoints/unet/step-000003", r"step-000003: no such checkpoint; there are: step-000002, step-000004"),
        ("nowhere/checkpoints/unet/step-000004", r"step-000004: no such checkpoint; there are: none"),
        ("a/checkpoints/unet/step-000004", r"step-000004: is at step 4, the recipe ends at 2"),
    ],
)
def test_what_a_run_cannot_begin_at_is_refused(labelled: Path, tmp_path: Path, resume: str, message: str) -> None:
    train(preset_of(LABEL_PRESET, tmp_path, ("unet.train.steps=4",)), labelled, tmp_path / "a", progress=False)
    preset = preset_of(LABEL_PRESET, tmp_path, ("unet.train.steps=2",))
    with pytest.raises(InputError, match=message):
        train(preset, labelled, tmp_path / "b", progress=False, resume=tmp_path / resume)
    assert (tmp_path / "b").exists() == ("recipe ends" in message)


def test_networks_with_a_path_are_loaded_frozen(described: Path, tmp_path: Path) -> None:
    first = train(preset_of(TEXT_PRESET, tmp_path), described, tmp_path / "first", progress=False)
    preset = replace(
        preset_of(TEXT_PRESET, tmp_path, ("unet.train.steps=3",)),
        vae=NetworkPreset(path=str(first)),
        text_encoder=NetworkPreset(path=str(first), subfolder="text_encoder"),
    )
    second = train(preset, described, tmp_path / "second", progress=False)
    a, b = weights(first), weights(second)
    frozen = [name for name in a if name.startswith(("vae.", "text_encoder."))]
    assert frozen
    assert all(torch.equal(a[name], b[name]) for name in frozen)
    assert not (second / "checkpoints" / "vae").exists()
    assert load_model(second).space == load_model(first).space


def test_a_path_that_holds_no_network_is_one_line(described: Path, tmp_path: Path) -> None:
    preset = replace(preset_of(TEXT_PRESET, tmp_path), vae=NetworkPreset(path=str(tmp_path)))
    with pytest.raises(InputError, match=r"vae\.path = ") as raised:
        train(preset, described, tmp_path / "model", progress=False)
    assert "\n" not in str(raised.value)


def test_an_evaluator_is_trained_saved_and_loaded(labelled: Path, tmp_path: Path) -> None:
    from fastgen.models import evaluator

    recipe = Training(steps=3, batch_size=4, precision="fp32", validation_fraction=0.25)
    preset = Preset("tiny", 64, "stretch", evaluator=NetworkPreset({"width": 8}, train=recipe))
    out = train(preset, labelled, tmp_path / "evaluator", progress=False)
    loaded = evaluator.load(out)
    assert loaded.objects == {"red cube": 0, "green cube": 1, "blue cube": 2}
    images = np.zeros((2, 3, 64, 64), np.float32)
    assert (loaded.predict(images).shape, loaded.features(images).shape) == ((2, 3), (2, 64))
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert 0 <= row["accuracy"] <= 1


def test_an_evaluator_of_attributes_is_trained_saved_and_loaded(described: Path, tmp_path: Path) -> None:
    from fastgen.models import evaluator

    keys = [f"{i}_{action}" for i in range(6) for action in ("main", "attack1")]
    entries = {key: {"colour": list(COLOURS)[int(key[0]) % 3], "action": key[2:]} for key in keys}
    (described / "attributes.json").write_text(json.dumps(entries))
    recipe = Training(steps=3, batch_size=4, precision="fp32", validation_fraction=0.25)
    preset = Preset("tiny", 64, "stretch", evaluator=NetworkPreset({"width": 8}, train=recipe))
    out = train(preset, described, tmp_path / "evaluator", progress=False)
    loaded = evaluator.load(out)
    assert loaded.attributes == {"colour": ("blue", "green", "red"), "action": ("attack1", "main")}
    assert loaded.predict(np.zeros((2, 3, 64, 64), np.float32)).shape == (2, 5)
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    shares = [row["accuracy_colour"], row["accuracy_action"]]
    assert 0 <= min(shares) == row["accuracy_lowest"] <= max(shares) <= 1
    entries["0_main"]["colour"] = "green"
    (described / "attributes.json").write_text(json.dumps(entries))
    with pytest.raises(InputError, match="holds a job on other data"):
        train(preset, described, out, progress=False)


def test_the_second_run_takes_pixels_from_the_cache(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = preset_of(LABEL_PRESET, tmp_path)
    first = train(preset, labelled, tmp_path / "first", progress=False)
    monkeypatch.setattr("fastgen.data.cache.load_images", lambda *_, **__: pytest.fail("decoded again"))
    second = train(preset, labelled, tmp_path / "second", progress=False)
    assert same(weights(first), weights(second))


def sheet_size(columns: int, lines: list[int]) -> tuple[int, int]:
    """Of a sheet with cells of 96 px; `lines`: those of each row's longest caption."""
    return columns * (96 + 6) + 6, sum(96 + 12 * n + 6 for n in lines) + 6


def test_every_option_of_the_loss_and_the_data_trains_a_text_model(described: Path, tmp_path: Path) -> None:
    text = (
        TEXT_PRESET.replace('image_mode = "pad"', 'image_mode = "figure"')
        .replace(
            "flip = true\n",
            "flip = true\ncolor_jitter = 0.2\nmin_snr_gamma = 5.0\nloss = {kl = 0.01, latent_perceptual = 0.1}\n"
            "loss_from_epoch = {kl = 0.3}\n",
        )
        .replace(
            "clip_sample = false", "clip_sample = false\nrescale_betas_zero_snr = true\ntimestep_spacing = 'trailing'"
        )
    )
    prompts = '\n[preview]\nprompts = ["A red slime number 0.", "Nothing like it."]\n'
    out = train(preset_of(text + prompts, tmp_path), described, tmp_path / "model", progress=False)
    with Image.open(out / "previews" / "000004.png") as preview:
        assert preview.size == sheet_size(4, [3, 3, 2])  # four validation images; the preset's own prompts are shorter
    row = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(row["loss"])
    assert np.isfinite(row["validation_loss"])


def test_a_label_model_previews_the_presets_own_labels(labelled: Path, tmp_path: Path) -> None:
    text = LABEL_PRESET.replace("flip = true", "flip = true\ncolor_jitter = 0.2")
    good = text + '\n[preview]\nlabels = [["red cube", "blue cube"], ["green cube"]]\n'
    out = train(preset_of(good, tmp_path), labelled, tmp_path / "model", progress=False)
    with Image.open(out / "previews" / "000006.png") as preview:
        assert preview.size == sheet_size(3, [1, 1, 1])
    bad = text + '\n[preview]\nlabels = [["red cubes"]]\n'
    with pytest.raises(InputError, match="did you mean 'red cube'"):
        train(preset_of(bad, tmp_path), labelled, tmp_path / "other", progress=False)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unet.train.loss={latent_perceptual=0.1}", "this model works on pixels"),
        ("unet.train.loss={mes=1}", "unknown loss term 'mes'; did you mean 'mse'"),
        ("scheduler.rescale_betas_zero_snr=true", 'use prediction_type = "v_prediction"'),
    ],
)
def test_an_objective_that_cannot_work_is_refused_before_the_first_step(
    labelled: Path, tmp_path: Path, override: str, message: str
) -> None:
    text = LABEL_PRESET.replace("v_prediction", "epsilon")
    with pytest.raises(InputError, match=message):
        train(preset_of(text, tmp_path, (override,)), labelled, tmp_path / "model", progress=False)
    assert not (tmp_path / "model" / "checkpoints").exists()


def still(stage: str) -> tuple[str, ...]:
    """Overrides by which a stage trains without moving, so that its result is what it began with."""
    return tuple(f"{stage}.train.{key}" for key in ("steps=1", "learning_rate=1e-30", "weight_decay=0"))


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[name], b[name], atol=1e-7) for name in a)


def test_training_begins_with_the_weights_of_another_model(labelled: Path, tmp_path: Path) -> None:
    first = train(preset_of(LABEL_PRESET, tmp_path), labelled, tmp_path / "first", progress=False)
    begun = (f"unet.train.pretrained={first}", "unet.train.seed=5", *still("unet"))
    second = train(preset_of(LABEL_PRESET, tmp_path, begun), labelled, tmp_path / "second", progress=False)
    fresh = train(
        preset_of(LABEL_PRESET, tmp_path, ("unet.train.seed=5", *still("unet"))),
        labelled,
        tmp_path / "c",
        progress=False,
    )
    assert close(weights(second), weights(first))
    assert not close(weights(fresh), weights(first))
    record = json.loads((second / "fastgen.json").read_text())["training"]
    assert len(record["pretrained"]["unet"].split()) == 2  # UNet and conditioner
    assert "pretrained" not in json.loads((first / "fastgen.json").read_text())["training"]


def test_all_networks_of_a_text_model_begin_with_those_of_another(
    described: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(preset_of(TEXT_PRESET, tmp_path), described, tmp_path / "first", progress=False)
    frozen = (f"vae.path={first}", f"text_encoder.path={first}", f"unet.train.pretrained={first}", *still("unet"))
    second = train(preset_of(TEXT_PRESET, tmp_path, frozen), described, tmp_path / "second", progress=False)
    assert same(weights(second), weights(first)) or close(weights(second), weights(first))
    assert "another" not in capsys.readouterr().err
    assert str(tmp_path) not in "".join(file.read_text() for file in second.glob("*/config.json"))
    stages = ("vae", "text_encoder", "unet")
    begun = tuple(o for s in stages for o in (f"{s}.train.pretrained={first}", *still(s)))
    # The tokenizer comes with the text encoder: other captions would give another.
    texts = json.loads((described / "train_info.json").read_text())
    for entry in texts.values():
        entry["given_description"] = [
            "An entirely different wording of whatever stands here, " + entry["given_description"][0]
        ]
    (described / "train_info.json").write_text(json.dumps(texts))
    third = train(preset_of(TEXT_PRESET, tmp_path, begun), described, tmp_path / "third", progress=False)
    for part in ("unet", "text_encoder"):
        assert close(
            {k: v for k, v in weights(third).items() if k.startswith(part)},
            {k: v for k, v in weights(first).items() if k.startswith(part)},
        )
    assert (third / "tokenizer/tokenizer.json").read_bytes() == (first / "tokenizer/tokenizer.json").read_bytes()
    assert set(json.loads((third / "fastgen.json").read_text())["training"]["pretrained"]) == set(stages)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("unet.config.layers_per_block=2",), "unet.config.layers_per_block: found 2, "),
        (("unet.config.norm_num_groups=2",), "unet.config.norm_num_groups: found 2, "),  # the same shapes
        (("unet.train.pretrained=nowhere",), "nowhere: neither a bundle"),
        (("conditioner.hidden=8",), "conditioner.config.hidden: found 8, "),
    ],
)
def test_weights_of_another_architecture_are_refused(
    labelled: Path, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    first = train(preset_of(LABEL_PRESET, tmp_path), labelled, tmp_path / "first", progress=False)
    preset = preset_of(LABEL_PRESET, tmp_path, (f"unet.train.pretrained={first}", *overrides))
    with pytest.raises(InputError, match=re.escape(message)):
        train(preset, labelled, tmp_path / "second", progress=False)
    assert not (tmp_path / "second").exists()


def test_other_labels_are_refused_and_another_noise_schedule_is_said(
    labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = train(preset_of(LABEL_PRESET, tmp_path), labelled, tmp_path / "first", progress=False)
    begun = (f"unet.train.pretrained={first}", *still("unet"))
    other = (*begun, "scheduler.prediction_type=epsilon")
    train(preset_of(LABEL_PRESET, tmp_path, other), labelled, tmp_path / "epsilon", progress=False)
    assert "its noise schedule or prediction_type is another than the preset's" in capsys.readouterr().err
    objects = json.loads((labelled / "objects.json").read_text())
    (labelled / "objects.json").write_text(json.dumps({name: 2 - i for name, i in objects.items()}))
    with pytest.raises(InputError, match="the same names, in another order"):
        train(preset_of(LABEL_PRESET, tmp_path, begun), labelled, tmp_path / "second", progress=False)


def test_an_evaluator_begins_with_the_weights_of_another(labelled: Path, tmp_path: Path) -> None:
    def preset(**keys: Any) -> Preset:
        recipe = Training(steps=2, batch_size=4, precision="fp32", validation_fraction=0.25, **keys)
        return Preset("tiny", 64, "stretch", evaluator=NetworkPreset({"width": 8}, train=recipe))

    first = train(preset(), labelled, tmp_path / "first", progress=False)
    begun = {"pretrained": str(first), "learning_rate": 1e-30, "weight_decay": 0.0, "seed": 3}
    second = train(preset(**begun), labelled, tmp_path / "second", progress=False)
    parameters = [k for k in load_file(first / "model.safetensors") if "running" not in k and "num_batches" not in k]
    a, b = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert close({k: a[k] for k in parameters}, {k: b[k] for k in parameters})
    objects = json.loads((labelled / "objects.json").read_text())
    (labelled / "objects.json").write_text(json.dumps({name: 2 - i for name, i in objects.items()}))
    with pytest.raises(InputError, match="not those of the data"):
        train(preset(**begun), labelled, tmp_path / "third", progress=False)
    assert not (tmp_path / "third").exists()
