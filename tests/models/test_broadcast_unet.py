"""BroadcastUNet: label and time are planes in the input of every level, and it saves, loads, exports like other UNets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from label_unets import LABELS, check_bf16, check_onnx_graph, inputs

from fastgen.errors import InputError
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.models.folder import LabelConditioner, Model, load_model
from fastgen.models.networks.broadcast_unet import BroadcastUNet
from fastgen.models.networks.denoiser import Denoiser
from fastgen.models.saving import save_model
from fastgen.sampling.defaults import Sampling

SCHEDULE = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2"}
DIM, TIME = 6, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with widths for every rewriting of the export: the deepest upsampling is wide."""
    torch.manual_seed(0)
    unet = BroadcastUNet(16, block_out_channels=(8, 16, 128), label_dim=DIM, time_dim=TIME, norm_num_groups=4)
    conditioner = LabelConditioner("broadcast", LABELS, DIM)
    model = Model(None, unet, SCHEDULE, Sampling("ddpm", 3, 1.0), conditioner, ICLEVR_OBJECTS)
    save_model(model, out := tmp_path_factory.mktemp("models") / "broadcast")
    return out


def test_every_level_is_told_label_and_time_by_constant_planes(folder: Path) -> None:
    model = load_model(folder)
    unet: Denoiser = model.networks()["unet"]  # type: ignore[assignment]
    x, timesteps, labels = inputs(2)
    seen = []
    blocks = [*unet.unet.down_blocks, *unet.unet.up_blocks]
    for block in blocks:
        block.conv1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        unet(x, timesteps, labels)
        told = torch.cat([unet.conditioner(labels), get_timestep_embedding(timesteps, TIME, True, 0)], dim=1)
    assert [tuple(plane.shape[-2:]) for plane in seen] == [(16, 16), (8, 8), (4, 4), (8, 8), (16, 16)]
    for planes in seen:
        found = planes[:, -(DIM + TIME) :]
        torch.testing.assert_close(found, told[:, :, None, None].expand_as(found))
    assert not any("attn" in name or "attention" in name for name, _ in unet.named_modules())


def test_a_model_folder_names_the_class_and_loads_to_the_same_network(folder: Path, tmp_path: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["unet"] == ["fastgen", "BroadcastUNet"]
    model = load_model(folder)
    assert type(model.unet) is BroadcastUNet
    save_model(model, tmp_path / "copy")
    with torch.no_grad():
        first, second = (m.networks()["unet"](*inputs(2)) for m in (model, load_model(tmp_path / "copy")))
    assert torch.equal(first, second)
    assert first.abs().sum() > 0


def test_an_unknown_class_of_unet_is_one_line(folder: Path, tmp_path: Path) -> None:
    save_model(load_model(folder), tmp_path / "copy")
    for name in ("model_index.json", "unet/config.json"):
        file = tmp_path / "copy" / name
        file.write_text(file.read_text().replace('"BroadcastUNet"', '"BroadcastUNett"'))
    with pytest.raises(
        InputError, match=r"_class_name: found 'BroadcastUNett', fastgen runs UNet2DConditionModel, .*BroadcastUNet$"
    ):
        load_model(tmp_path / "copy")


def test_sizes_that_do_not_halve_are_refused() -> None:
    with pytest.raises(ValueError, match="sample_size = 18: expected a multiple of 4"):
        BroadcastUNet(18, block_out_channels=(8, 8, 8), norm_num_groups=4)


@pytest.mark.parametrize("batch", [1, 3])
def test_its_onnx_graph_computes_the_same_at_any_batch_size(folder: Path, tmp_path_factory, batch: int) -> None:
    check_onnx_graph(folder, tmp_path_factory.getbasetemp() / "broadcast-onnx" / "model.onnx", batch)


def test_bf16_keeps_timesteps_apart(folder: Path) -> None:
    check_bf16(folder)
