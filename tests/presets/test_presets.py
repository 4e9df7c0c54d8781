"""The published systems as presets: networks to the last parameter, samplers, and the road to scored images at small size."""

from __future__ import annotations

import json
import logging
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from PIL import Image
from small_presets import SHORT, SMALL
from torch import nn

from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.models.condition import CLASS
from fastgen.models.networks.broadcast_unet import BroadcastUNet
from fastgen.models.networks.denoiser import Denoiser
from fastgen.models.networks.labels import LabelConditioner, conditioner_dim, unet_class
from fastgen.presets import Preset, load_preset, preset_names
from fastgen.training.diffusion import NoiseSchedule
from fastgen.training.previews import default_table

PRESETS = Path(__file__).parents[2] / "fastgen" / "presets"
DOCS = Path(__file__).parents[2] / "docs" / "presets.md"
# name -> parameters that are trained, evaluations of the network by the sampling default
SYSTEMS = {
    "monsters-pndm-rag": (846_230_244, 79),
    "monsters-ddim": (241_363_972, 50),
    "monsters-dpmpp": (241_363_972, 130),
    "monsters-best": (296_403_460, 15),
    "iclevr-class-embed": (113_673_219 + 12_800, 1000),
    "iclevr-concat": (157_935_363 + 12_800, 2000),
    "iclevr-small": (1_708_163 + 3_200, 1000),
    "iclevr-broadcast": (10_961_411 + 1_600, 1000),
}
PUBLISHED = {  # in millions, of the UNet
    "monsters-pndm-rag": 846,
    "monsters-ddim": 241,
    "monsters-dpmpp": 241,
    "iclevr-class-embed": 114,
    "iclevr-concat": 158,
}
PIXELS = pytest.mark.parametrize("name", [name for name in SYSTEMS if name.startswith("iclevr")])


def networks(preset: Preset) -> Any:
    """(UNet, conditioner or None), built as training builds them but for the weights' values."""
    assert preset.unet is not None
    if preset.kind == "text":
        return UNet2DConditionModel(**preset.unet.config), None
    assert preset.conditioner is not None
    unet = unet_class(preset.conditioner["kind"], preset.unet.config)(**preset.unet.config)
    return unet, LabelConditioner(num_labels=len(ICLEVR_OBJECTS), **preset.conditioner)


def parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def text_unet(widths: tuple[int, ...], plain: int = 1, layers: int = 2, **options: Any) -> UNet2DConditionModel:
    attending = len(widths) - plain
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        layers_per_block=layers,
        block_out_channels=widths,
        down_block_types=("CrossAttnDownBlock2D",) * attending + ("DownBlock2D",) * plain,
        up_block_types=("UpBlock2D",) * plain + ("CrossAttnUpBlock2D",) * attending,
        cross_attention_dim=512,
        **options,
    )


def embedding_unet(widths: tuple[int, ...], attending: set[int]) -> UNet2DModel:
    """UNet2DModel with a Linear in place of its class embedding, as one writes it by hand."""
    levels = range(len(widths))
    unet = UNet2DModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=widths,
        down_block_types=tuple("AttnDownBlock2D" if i in attending else "DownBlock2D" for i in levels),
        up_block_types=tuple("AttnUpBlock2D" if i in attending else "UpBlock2D" for i in reversed(levels)),
    )
    unet.class_embedding = nn.Linear(24, 4 * widths[0])
    return unet


class ConcatUNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(24, 512)
        self.model = UNet2DModel(
            sample_size=64,
            in_channels=3 + 512,
            out_channels=3,
            layers_per_block=3,
            block_out_channels=(128, 128, 256, 256, 512, 512),
            down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D",) * 2,
            up_block_types=("AttnUpBlock2D",) * 2 + ("UpBlock2D",) * 4,
        )


BY_HAND: dict[str, Any] = {
    "monsters-pndm-rag": lambda: text_unet((160, 320, 640, 1280, 1280)),
    "monsters-ddim": lambda: text_unet((256, 384, 512, 768), attention_head_dim=16),
    "monsters-dpmpp": lambda: text_unet((256, 384, 512, 768), attention_head_dim=16),
    "monsters-best": lambda: text_unet((192, 384, 768), plain=0, layers=3),
    "iclevr-class-embed": lambda: embedding_unet((128, 128, 256, 256, 512, 512), {4}),
    "iclevr-concat": ConcatUNet,
    "iclevr-small": lambda: embedding_unet((32, 64, 64), {1, 2}),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_has_its_systems_parameters_to_the_last_one(name: str) -> None:
    with torch.device("meta"):
        unet, conditioner = networks(load_preset(name))
        found = parameters(unet) + parameters(conditioner)
        assert found == SYSTEMS[name][0]
        if name in PUBLISHED:
            assert round(parameters(unet) / 1e6) == PUBLISHED[name]
        if name in BY_HAND:
            assert found == parameters(BY_HAND[name]())


@pytest.mark.parametrize("name", [name for name in BY_HAND if name not in ("iclevr-concat", "monsters-best")])
def test_a_preset_has_the_weights_of_a_network_written_by_hand(name: str) -> None:
    """Names and shapes; the heads' number shows in neither."""
    with torch.device("meta"):
        ours, theirs = networks(load_preset(name))[0], BY_HAND[name]()
    shapes = {key: value.shape for key, value in theirs.state_dict().items() if not key.startswith("class_embedding.")}
    assert {key: value.shape for key, value in ours.state_dict().items()} == shapes
    heads = [[m.heads for m in unet.modules() if isinstance(m, Attention)] for unet in (ours, theirs)]
    assert heads[0] == heads[1] != []


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_presets_noise_schedule_and_sampling_default_compile(name: str) -> None:
    preset = load_preset(name)
    assert NoiseSchedule(preset.scheduler).count == (2000 if name == "iclevr-concat" else 1000)
    assert len(default_table(preset.scheduler, preset.sampling).timesteps) == SYSTEMS[name][1]


@pytest.mark.parametrize("name", ["monsters-pndm-rag", "monsters-ddim", "monsters-dpmpp", "monsters-best"])
def test_text_presets_train_on_the_noise_that_they_are_sampled_with(name: str) -> None:
    """Stable Diffusion's schedule, and the latents of its autoencoder with the factor that its config leaves out."""
    from diffusers import AutoencoderKL

    from fastgen.sampling.schedulers import make_scheduler

    preset = load_preset(name)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(NoiseSchedule(preset.scheduler)._scheduler.alphas_cumprod, expected)
    sampler = make_scheduler(preset.sampling.scheduler, preset.scheduler)
    torch.testing.assert_close(sampler.alphas_cumprod, expected)
    with torch.device("meta"):
        assert AutoencoderKL(block_out_channels=(32,)).config.scaling_factor == 0.18215


@PIXELS
def test_a_conditioner_fits_its_unet_and_previews_name_real_objects(name: str) -> None:
    preset = load_preset(name)
    with torch.device("meta"):
        unet, conditioner = networks(preset)
    assert conditioner.config["dim"] == conditioner_dim(conditioner.kind, unet.config)[0]
    assert {label for labels in preset.preview.get("labels", []) for label in labels} <= set(ICLEVR_OBJECTS)


@PIXELS
def test_a_label_presets_prediction_has_the_images_shape(name: str) -> None:
    with torch.device("meta"):
        unet, conditioner = networks(load_preset(name))
        denoiser = Denoiser(unet, [CLASS], conditioner)
        shape = denoiser(torch.empty(2, 3, 64, 64), torch.empty(2), torch.empty(2, 24)).shape
    assert shape == (2, 3, 64, 64)


def test_the_ablation_without_attention_has_none() -> None:
    with torch.device("meta"):
        unet, _ = networks(load_preset("iclevr-broadcast"))
    assert type(unet) is BroadcastUNet
    assert [block.conv1.out_channels for block in unet.down_blocks] == [64, 128, 256, 512]
    assert not any("attn" in name for name, _ in unet.named_modules())


def test_concat_trains_on_the_first_16206_of_18009_images(tmp_path: Path) -> None:
    from fastgen.data.dataset import Dataset, Example, split

    examples = tuple(Example(Path(f"{i}_{j}.png"), (), ("red cube",), f"{i}") for i in range(6003) for j in range(3))
    recipe: Any = load_preset("iclevr-concat").unet.train  # type: ignore[union-attr]
    data = Dataset("labels", tmp_path, examples, {"red cube": 0}, splits_in_file_order=True)
    train, validation = split(data, recipe.validation_fraction)
    assert (train.examples, len(validation.examples)) == (examples[:16206], 1803)
    assert recipe.validation_limit >= 1803


def documented() -> dict[str, dict[str, Any]]:
    """Section of docs/presets.md -> {dotted key: value} of its table."""
    sections: dict[str, dict[str, Any]] = {}
    for line in DOCS.read_text().splitlines():
        if line.startswith("#"):
            name = line.split("`")[1] if "`" in line else line.strip("# ")
            sections[name] = {}
        elif row := re.match(r"\| `([a-z_.]+) = (.+?)` \|", line):
            abbreviated = row[1].endswith("block_types")
            value = row[2].strip("[]").split(", ") if abbreviated else tomllib.loads(f"x = {row[2]}")["x"]
            sections[name][row[1]] = value
    return sections


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_documentation_says_what_a_preset_says(name: str) -> None:
    preset = flat(tomllib.loads((PRESETS / f"{name}.toml").read_text()))
    sections = documented()
    table = sections["The text presets" if name.startswith("monsters") else "The label presets"] | sections[name]
    ablation = name in ("iclevr-small", "iclevr-broadcast")
    blocks = {"CrossAttnDownBlock2D": "cross", "AttnDownBlock2D": "attn", "DownBlock2D": "plain"}
    preset = {k: [blocks[b] for b in v] if k.endswith("down_block_types") else v for k, v in preset.items()}
    assert {key: preset.get(key) for key in table} == table
    for key, value in preset.items():
        if key.startswith(("unet.train.", "sampling.", "conditioner.")):
            assert (sections["iclevr-class-embed"] | table if ablation else table)[key] == value


def test_the_help_of_train_names_every_preset(fastgen: Any) -> None:
    code, out, _ = fastgen("train", "--help")
    assert code == 0
    assert set(preset_names()) <= set(re.split(r"[\s,.]+", out.partition("Presets:")[2]))


# From here on: every preset at small size, from data to a score.

PROMPTS = ["Red slime with one eye.", "Blue slime. The monster is attacking."]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 scenes of one object each, and the requests for two images."""
    folder = tmp_path_factory.mktemp("labelled")
    (folder / "iclevr").mkdir()
    rng, labels = np.random.default_rng(0), {}
    for scene, name in enumerate(ICLEVR_OBJECTS):
        file = f"CLEVR_train_{scene:06d}_0.png"
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(folder / "iclevr" / file)
        labels[file] = [name]
    (folder / "train.json").write_text(json.dumps(labels))
    (folder / "objects.json").write_text(json.dumps(ICLEVR_OBJECTS))
    (folder / "test.json").write_text(json.dumps([["red cube"], ["gray cube", "blue sphere"]]))
    return folder


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight monsters in two poses, and the requests for two images."""
    folder = tmp_path_factory.mktemp("described")
    (folder / "train").mkdir()
    rng, info = np.random.default_rng(0), {}
    for monster in range(8):
        for pose, action in (("main", ""), ("attack1", "The monster is attacking.")):
            texts = [f"Slime number {monster}.", f"Monster {monster} of slime."]
            key = f"{monster}_{pose}"
            info[key] = {"given_description": texts, "action_description": action, "num_frames": 1}
            Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(folder / "train" / f"{key}_0.png")
    (folder / "train_info.json").write_text(json.dumps(info))
    requests = {f"{i}_main": {"image_name": f"{i}_main.png", "text_prompt": text} for i, text in enumerate(PROMPTS)}
    (folder / "test.json").write_text(json.dumps(requests))
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluator that was never trained."""
    from fastgen.models import evaluator

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("evaluator")
    evaluator.save(evaluator.ResNet18(len(ICLEVR_OBJECTS)), folder, ICLEVR_OBJECTS, {})
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("_graphs_once")  # the text presets have one text encoder and one autoencoder
@pytest.mark.parametrize("name", SYSTEMS)
def test_a_preset_at_small_size_trains_resumes_exports_generates_and_scores(
    name: str, fastgen: Any, request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = name.startswith("monsters")
    data: Path = request.getfixturevalue("described" if text else "labelled")
    overrides = [*SMALL[name], *SHORT]
    monkeypatch.setitem(sys.modules, "lpips", SimpleNamespace(LPIPS=StandIn))  # monsters-dpmpp asks for the package
    if text:
        frozen = request.getfixturevalue("text_model")
        overrides += [f"text_encoder.path={frozen}", f"vae.path={frozen}"]
    line = ["train", name, "--data", data, "--out", tmp_path / "model", *(x for o in overrides for x in ("--set", o))]

    with monkeypatch.context() as patch:
        interrupt_after_the_first_checkpoint(patch)
        assert fastgen(*line)[0] == 130
    assert not (tmp_path / "model" / "model_index.json").exists()
    code, _, err = fastgen(*line)
    assert code == 0, err
    assert "continues at step 2 of 4" in err
    assert list((tmp_path / "model" / "previews").glob("*.png"))

    monkeypatch.setattr("fastgen.sampling.compile.COMMON_STEPS", (1, 2, 3, 20))
    logging.getLogger("torch.__trace").propagate = False  # pages of it would be shown beside a failed test
    bundle, images = tmp_path / "bundle", tmp_path / "images"
    code, out, err = fastgen("export", tmp_path / "model", "--out", bundle, "--engine", "ort")
    assert code == 0, out + err
    code, _, err = fastgen("generate", data / "test.json", "--model", bundle, "--engine", "ort", "--out", images)
    assert code == 0, err
    sizes = [Image.open(file).size for file in sorted(images.glob("[01]*.png"))]
    assert sizes == [(64, 64), (64, 64)]
    scored = ["score", images, "--evaluator", request.getfixturevalue("judge")]
    if text:
        scored += ["--reference", data / "train", "--features", "evaluator"]
    else:
        scored += ["--requests", data / "test.json"]
    code, out, err = fastgen(*scored)
    assert code == 0, err
    assert ("fid" if text else "accuracy") in out


class StandIn(nn.Module):
    """Of LPIPS: (b, 3, H, W) twice -> (b, 1, 1, 1)."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def interrupt_after_the_first_checkpoint(patch: pytest.MonkeyPatch) -> None:
    from fastgen.models import checkpoints

    save = checkpoints.save

    def saving(*arguments: Any, **options: Any) -> None:
        save(*arguments, **options)
        raise KeyboardInterrupt

    patch.setattr(checkpoints, "save", saving)
