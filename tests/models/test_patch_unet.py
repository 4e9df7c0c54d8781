"""PatchUNet: diffusers' UNet on patches, which saves, loads and exports like other UNets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from label_unets import LABELS, check_bf16, check_onnx_graph, inputs

from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.models.build import build_module
from fastgen.models.folder import LabelConditioner, Model, load_model
from fastgen.models.networks.patch_unet import PatchUNet
from fastgen.models.saving import save_model
from fastgen.sampling.defaults import Sampling

SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "layers_per_block": 1,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    unet = PatchUNet(4, sample_size=16, **BLOCKS)
    conditioner = LabelConditioner("class_embed", LABELS, 32)
    model = Model(None, unet, SCHEDULE, Sampling("ddpm", 3, 1.0), conditioner, ICLEVR_OBJECTS)
    save_model(model, out := tmp_path_factory.mktemp("models") / "patches")
    return out


def test_it_is_diffusers_unet_on_squares_of_pixels() -> None:
    torch.manual_seed(0)
    module = PatchUNet(4, sample_size=16, **BLOCKS)
    plain = UNet2DModel(sample_size=4, in_channels=48, out_channels=48, class_embed_type="identity", **BLOCKS)
    plain.load_state_dict(module.unet.state_dict())
    x, timesteps, _ = inputs(2)
    told = torch.randn(2, 32)
    squares = x.reshape(2, 3, 4, 4, 4, 4).permute(0, 1, 3, 5, 2, 4).reshape(2, 48, 4, 4)
    with torch.no_grad():
        found = module(x, timesteps, class_labels=told).sample
        expected = plain(squares, timesteps, class_labels=told).sample
    expected = expected.reshape(2, 3, 4, 4, 4, 4).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    torch.testing.assert_close(found, expected)


def test_a_model_folder_names_the_class_and_loads_to_the_same_network(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["fastgen", "PatchUNet"]
    model = load_model(folder)
    save_model(model, tmp_path / "copy")
    with torch.no_grad():
        first, second = (m.networks()["unet"](*inputs(2)) for m in (model, load_model(tmp_path / "copy")))
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


@pytest.mark.parametrize("module", ["fastgen.networks", "fastgen.networks.patch_unet", "somewhere.else"])
def test_a_folder_that_names_the_module_of_a_class_loads_too(folder: Path, tmp_path: Path, module: str) -> None:
    """So folders were written by earlier versions, the models that come with the package among them."""
    shutil.copytree(folder, tmp_path / "old")
    file = tmp_path / "old" / "model_index.json"
    index = json.loads(file.read_text())
    assert index["conditioner"] == ["fastgen", "LabelConditioner"]
    old = {part: [module, index[part][1]] for part in ("unet", "conditioner")}
    file.write_text(json.dumps(index | old))
    with torch.no_grad():
        first, second = (load_model(f).networks()["unet"](*inputs(2)) for f in (folder, tmp_path / "old"))
    assert torch.equal(first, second)


def test_training_starts_from_an_output_of_zero() -> None:
    module = build_module(PatchUNet, {"patch_size": 4, "sample_size": 16, **BLOCKS}, "unet", seed=0)
    x, timesteps, _ = inputs(2)
    with torch.no_grad():
        assert module(x, timesteps, class_labels=torch.randn(2, 32)).sample.abs().max() == 0


def test_sizes_that_do_not_hold_whole_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="sample_size = 18: expected a multiple of patch_size = 4"):
        PatchUNet(4, sample_size=18, **BLOCKS)


@pytest.mark.parametrize("batch", [1, 3])
def test_its_onnx_graph_computes_the_same_at_any_batch_size(folder: Path, tmp_path_factory, batch: int) -> None:
    check_onnx_graph(folder, tmp_path_factory.getbasetemp() / "patches-onnx" / "model.onnx", batch)


def test_bf16_keeps_timesteps_apart(folder: Path) -> None:
    check_bf16(folder)
