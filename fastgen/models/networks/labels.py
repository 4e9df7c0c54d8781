"""The networks of the label family: conditioners, their UNets, and both as one network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import read_json, write_json


class LabelConditioner(nn.Module):
    """Multi-hot labels (B, num_labels) -> embedding (B, dim): Linear, or Linear-SiLU-Linear when `hidden` > 0.

    `kind` says where the embedding enters the UNet: "class_embed" is added to the time embedding (dim = 4 x the first
    width), "concat" is broadcast over the image and concatenated to its channels, "broadcast" is that in every level of a
    BroadcastUNet (dim = its `label_dim`).
    """

    def __init__(self, kind: str, num_labels: int, dim: int, hidden: int = 0) -> None:
        super().__init__()
        self.config = {"kind": kind, "num_labels": num_labels, "dim": dim, "hidden": hidden}
        self.kind = kind
        if hidden:
            self.embed: nn.Module = nn.Sequential(nn.Linear(num_labels, hidden), nn.SiLU(), nn.Linear(hidden, dim))
        else:
            self.embed = nn.Linear(num_labels, dim)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embed(class_labels)


class LabelUNet(nn.Module):
    """UNet2DModel, PatchUNet or BroadcastUNet, and its conditioner, as one network."""

    unet: Any
    conditioner: Any

    def __init__(self, unet: nn.Module, conditioner: LabelConditioner) -> None:
        super().__init__()
        self.unet, self.conditioner = unet, conditioner

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        """sample (B, C, H, W), timestep (B,), class_labels (B, num_labels) -> prediction (B, C, H, W)."""
        embedding = self.conditioner(class_labels)  # (B, dim)
        if self.conditioner.kind != "concat":
            return self.unet(sample, timestep, class_labels=embedding, return_dict=False)[0]
        planes = embedding[:, :, None, None].expand(-1, -1, *sample.shape[-2:])  # (B, dim, H, W)
        return self.unet(torch.cat([sample, planes], dim=1), timestep, return_dict=False)[0]


def unet_class(kind: str, config: Mapping[str, Any]) -> Any:
    """The class of UNet for a conditioner of this kind and these keyword arguments: with a `patch_size` it is a PatchUNet."""
    if kind == "broadcast":
        return label_unet_class("BroadcastUNet")
    return label_unet_class("PatchUNet" if "patch_size" in config else "UNet2DModel")


def label_unet_class(name: str) -> Any:
    """A class of UNet by the name that a model folder gives it. Raises InputError for any other."""
    from diffusers import UNet2DModel

    from fastgen.models.networks.broadcast_unet import BroadcastUNet
    from fastgen.models.networks.patch_unet import PatchUNet

    classes = {"UNet2DModel": UNet2DModel, "BroadcastUNet": BroadcastUNet, "PatchUNet": PatchUNet}
    if name not in classes:
        raise unknown("UNet class", name, list(classes))
    return classes[name]


def class_record(network: nn.Module) -> list[str]:
    """[package, class] of a network, as model_index.json names it; the module's path is left out, so that it may change."""
    return [type(network).__module__.partition(".")[0], type(network).__name__]


def conditioner_dim(kind: str, unet: Any) -> tuple[int, str]:
    """(width of the embedding that a UNet with this config takes, the words for where the config says so).

    Raises InputError when the UNet cannot take a conditioner of this kind.
    """
    if kind == "broadcast":
        return int(unet.label_dim), "unet.config.label_dim"
    if kind == "class_embed":
        if unet.class_embed_type != "identity":
            raise InputError("unet.config.class_embed_type: expected 'identity' with conditioner.kind 'class_embed'")
        return 4 * int(unet.block_out_channels[0]), "4 x the UNet's first width"
    if unet.in_channels <= unet.out_channels:
        raise InputError(f"unet.config.in_channels = {unet.in_channels}: expected the image's and conditioner.dim more")
    return int(unet.in_channels) - int(unet.out_channels), "unet.config.in_channels - out_channels"


def save_conditioner(conditioner: LabelConditioner, folder: Path, weights: bool = True) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        save_file({k: v.contiguous() for k, v in conditioner.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", conditioner.config)


def load_conditioner(folder: Path, weights: Mapping[str, Tensor] | None = None) -> LabelConditioner:
    """The conditioner of `folder`'s config.json with `weights`, else with those in the folder. Raises InputError."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        conditioner = LabelConditioner(**read_json(folder / "config.json"))
        conditioner.load_state_dict(load_file(folder / "model.safetensors") if weights is None else weights)
    except (OSError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: cannot be loaded as a conditioner: {' '.join(str(error).split())}") from None
    return conditioner
