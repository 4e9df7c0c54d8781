"""Conditioners: from labels or a class to what a UNet takes; and the classes of UNet that take it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import brief, located, write_json
from fastgen.files.records import Extent, Index, Record, Width, builtins, read_record
from fastgen.models.layout import DENOISERS
from fastgen.models.tensor_files import read_safetensors
from fastgen.models.weights import check_state

KINDS = ("class_embed", "concat", "broadcast", "tokens")
EMBEDS = ("linear", "identity", "embedding", "tokens", "words")


class ConditionerConfig(Record, frozen=True):
    """config.json of a conditioner: the arguments of `LabelConditioner`."""

    kind: Literal["class_embed", "concat", "broadcast", "tokens"]
    num_labels: Width
    dim: Width
    hidden: Extent = 0
    embed: Literal["linear", "identity", "embedding", "tokens", "words"] | None = None
    words: list[list[Index]] | None = None


class LabelConditioner(nn.Module):
    """Multi-hot labels (B, num_labels), or class ids (B,), -> embedding (B, dim), or tokens (B, T, dim).

    `kind` says where the embedding enters the network: "class_embed" is added to the time embedding (dim = its width),
    "concat" is broadcast over the image and concatenated to its channels, "broadcast" is that in every level of a BroadcastUNet
    (dim = its `label_dim`), "tokens" goes into cross-attention.
    `embed` says how: "linear" is a Linear, or Linear-SiLU-Linear when `hidden` > 0; "identity" are the labels themselves
    (dim = num_labels); "embedding" is a row of a table for each class id; of kind "tokens" these three give a single token, and
    "tokens", the default there, one for each label, which absent labels share; "words" is that with the mean of the rows of a
    label's `words`, indices from 0 as `label_words` gives them, so that "red cube" and "red sphere" share what is red.
    """

    def __init__(
        self,
        kind: str,
        num_labels: int,
        dim: int,
        hidden: int = 0,
        embed: str | None = None,
        words: list[list[int]] | None = None,
    ) -> None:
        super().__init__()
        default = "tokens" if kind == "tokens" else "linear"
        embed = embed or default
        per_label = embed in ("tokens", "words")
        if kind not in KINDS or embed not in EMBEDS or (per_label and kind != "tokens"):
            raise InputError(f"conditioner: kind {kind!r} with embed {embed!r}: expected {KINDS} with one of {EMBEDS}")
        if embed == "identity" and dim != num_labels:
            raise InputError(f"conditioner: dim is {dim}, expected {num_labels}: the labels themselves")
        self.config: dict[str, Any] = {"kind": kind, "num_labels": num_labels, "dim": dim, "hidden": hidden}
        self.config |= {} if embed == default else {"embed": embed}
        self.kind, self.takes_class = kind, embed == "embedding"
        self._one_token = kind == "tokens" and not per_label
        if (words is None) == (embed == "words") or (words is not None and not _are_words(words, num_labels)):
            expected = f"expected a list of words for each of {num_labels} labels, with embed = 'words' alone"
            raise InputError(f"conditioner: embed = {embed!r} with words = {brief(words)}: {expected}")
        self.config |= {} if words is None else {"words": words}
        self.embed = _embedding(embed, num_labels, dim, hidden, words)

    def forward(self, class_labels: Tensor) -> Tensor:
        embedding = self.embed(class_labels)
        return embedding[:, None] if self._one_token else embedding


def _embedding(embed: str, num_labels: int, dim: int, hidden: int, words: list[list[int]] | None) -> nn.Module:
    if embed in ("tokens", "words"):
        return LabelTokens([[label] for label in range(num_labels)] if words is None else words, dim)
    if embed == "identity":
        return nn.Identity()
    if embed == "embedding":
        return nn.Embedding(num_labels, dim)
    if hidden:
        return nn.Sequential(nn.Linear(num_labels, hidden), nn.SiLU(), nn.Linear(hidden, dim))
    return nn.Linear(num_labels, dim)


class LabelTokens(nn.Module):
    """Multi-hot labels (B, K) -> tokens (B, K, dim) for cross-attention: for each label that is present the mean of the rows of
    its `words`, one common row for all that are absent. So without labels all tokens are equal: the unconditional sequence."""

    shares: Tensor

    def __init__(self, words: list[list[int]], dim: int) -> None:
        super().__init__()
        count = 1 + max(index for indices in words for index in indices)
        self.present = nn.Embedding(count, dim)
        self.absent = nn.Parameter(torch.randn(dim))
        shares = torch.zeros(len(words), count)
        for label, indices in enumerate(words):
            for index in indices:
                shares[label, index] += 1 / len(indices)
        self.register_buffer("shares", shares, persistent=False)

    def forward(self, class_labels: Tensor) -> Tensor:
        share = class_labels[:, :, None]  # (B, K, 1)
        return share * (self.shares @ self.present.weight) + (1 - share) * self.absent


def _are_words(words: Any, num_labels: int) -> bool:
    """Whether these are lists of indices, one for each label, without a gap."""
    if not isinstance(words, list) or not all(isinstance(indices, list) and indices for indices in words):
        return False
    indices = [index for label in words for index in label]
    if not all(isinstance(index, int) for index in indices):
        return False
    return len(words) == num_labels and set(indices) == set(range(len(set(indices))))


def label_words(names: Mapping[str, int]) -> list[list[int]]:
    """For each label, in the order of its index, the indices of the words of its name, which blanks and underscores part."""
    known: dict[str, int] = {}
    ordered = sorted(names, key=lambda name: names[name])
    return [
        [known.setdefault(word, len(known)) for word in name.replace("_", " ").split() or [name]] for name in ordered
    ]


def conditioner_for(table: Mapping[str, Any], unet: Any, names: Mapping[str, int], count: int) -> LabelConditioner:
    """The conditioner that a preset's table describes, for a UNet with this config and `count` labels (or classes, with the one
    that stands for none): with the width that the UNet says, and the words of `names` where it embeds them.

    Raises InputError when they do not fit.
    """
    width, where = conditioner_dim(table["kind"], unet)
    options = {"dim": width, **table}
    if options["dim"] != width:
        raise InputError(f"conditioner.dim = {options['dim']}: expected {width}, {where}")
    if options.get("embed") == "identity" and width != count:
        raise InputError(
            f"conditioner.embed = 'identity': the data have {count} labels, the UNet takes {width} ({where})"
        )
    if options.get("embed") == "words":
        options["words"] = label_words(names)
    return LabelConditioner(num_labels=count, **options)


def unet_class(kind: str | None, config: Mapping[str, Any]) -> Any:
    """The class of UNet for a conditioner of this kind (None for a prompt) and these keyword arguments: with a `patch_size` it
    is a PatchUNet, with cross-attention a UNet2DConditionModel."""
    if kind == "broadcast":
        return denoiser_class("BroadcastUNet")
    if kind in (None, "tokens"):
        return denoiser_class("UNet2DConditionModel")
    return denoiser_class("PatchUNet" if "patch_size" in config else "UNet2DModel")


def denoiser_class(name: str) -> Any:
    """A class of network that denoises, by the name that a model folder gives it. Raises InputError for any other."""
    import diffusers

    from fastgen.models.networks.broadcast_unet import BroadcastUNet
    from fastgen.models.networks.patch_unet import PatchUNet

    ours = {"BroadcastUNet": BroadcastUNet, "PatchUNet": PatchUNet}
    if name not in DENOISERS:
        raise unknown("class of denoiser", name, DENOISERS)
    return ours.get(name) or getattr(diffusers, name)


def class_record(network: nn.Module) -> list[str]:
    """[package, class] of a network, as model_index.json names it; the module's path is left out, so that it may change."""
    return [type(network).__module__.partition(".")[0], type(network).__name__]


def conditioner_dim(kind: str, unet: Any) -> tuple[int, str]:
    """(width of the embedding that a UNet with this config takes, the words for where the config says so).

    Raises InputError when the UNet cannot take a conditioner of this kind.
    """
    if kind == "broadcast":
        return int(unet.label_dim), "unet.config.label_dim"
    if kind == "tokens":
        return int(unet.cross_attention_dim), "unet.config.cross_attention_dim"
    if kind == "class_embed":
        if unet.class_embed_type != "identity":
            raise InputError("unet.config.class_embed_type: expected 'identity' with conditioner.kind 'class_embed'")
        return 4 * int(unet.block_out_channels[0]), "4 x the UNet's first width"
    if unet.in_channels <= unet.out_channels:
        raise InputError(f"unet.config.in_channels = {unet.in_channels}: expected the image's and conditioner.dim more")
    return int(unet.in_channels) - int(unet.out_channels), "unet.config.in_channels - out_channels"


def check_fits(conditioner: LabelConditioner, config: Mapping[str, Any]) -> None:
    """InputError where a UNet with this config does not take what the conditioner gives. What "concat" adds to its channels,
    and the width of tokens, are checked with its space and its cross-attention."""
    takes = {
        "class_embed": config.get("class_embed_type") == "identity",
        "broadcast": config.get("label_dim") is not None,
        "tokens": config.get("cross_attention_dim") is not None,
    }
    if not takes.get(conditioner.kind, True):
        fitting = ", ".join(kind for kind, is_taken in takes.items() if is_taken) or "concat"
        raise InputError(f"kind: found {conditioner.kind!r}, but the UNet takes {fitting}")
    widths = {
        "class_embed": config.get("time_embedding_dim") or 4 * config["block_out_channels"][0],
        "broadcast": config.get("label_dim"),
    }
    found = conditioner.config["dim"]
    if conditioner.kind == "concat" and found >= config["in_channels"]:
        raise InputError(f"dim: found {found}, but the UNet takes {config['in_channels']} channels in all")
    if found != widths.get(conditioner.kind, found):
        raise InputError(f"dim: found {found}, but the UNet takes {widths[conditioner.kind]}")


def save_conditioner(conditioner: LabelConditioner, folder: Path, weights: bool = True) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    if weights:
        save_file({k: v.contiguous() for k, v in conditioner.state_dict().items()}, folder / "model.safetensors")
    write_json(folder / "config.json", conditioner.config)


def load_conditioner(folder: Path, weights: Mapping[str, Tensor] | None = None) -> LabelConditioner:
    """The conditioner of `folder`'s config.json with `weights`, else with those in the folder. Raises InputError."""
    file = folder / "config.json"
    config = builtins(read_record(file, ConditionerConfig))
    state = read_safetensors(folder / "model.safetensors") if weights is None else weights
    with located(file), torch.device("meta"):
        described = LabelConditioner(**config)
    check_state(described.state_dict(), state, folder, f"the conditioner that {file.name} describes")
    conditioner = LabelConditioner(**config)
    conditioner.load_state_dict(state)
    return conditioner
