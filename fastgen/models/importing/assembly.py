"""Imported weights -> a model in memory, in either family; and the source's own network, built apart from fastgen's classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgen.errors import InputError
from fastgen.files.names import ICLEVR_OBJECTS, read_objects
from fastgen.models.folder import Model
from fastgen.models.importing.architecture import Architecture, empty_unet, fill
from fastgen.models.importing.split import (
    LabelWeights,
    MismatchError,
    SplitWeights,
    find_label_layers,
    mismatches,
    split,
)
from fastgen.models.importing.weight_files import WeightFile, read_tensors, split_name
from fastgen.models.networks.labels import LabelConditioner
from fastgen.presets import NetworkPreset, Preset
from fastgen.sampling.defaults import Sampling

Reference = Callable[..., Tensor]  # (sample, timestep, condition) -> prediction, as the checkpoint's author called it


@dataclass
class Assembly:
    """A model to write, and the source's network to compare it with."""

    model: Model
    reference: Reference
    notes: list[str] = field(default_factory=list)


def text_model(
    checkpoint: WeightFile,
    architecture: Architecture,
    preset: Preset | None,
    *,
    text_encoder: str | None,
    vae: str | None,
    download: bool,
) -> Assembly:
    """A UNet2DConditionModel's weights with a text encoder and a VAE from elsewhere. Raises InputError when one of these is not
    named, does not load, or does not fit the UNet."""
    from fastgen.models.build import load_text_encoder, load_vae

    encoder, autoencoder = _network("text_encoder", text_encoder, preset), _network("vae", vae, preset)
    parts = split(checkpoint)
    # A key that names the UNet leaves out what lies beside it on purpose.
    rest = parts.rest if checkpoint.key is None else {}
    _check_unet(parts, empty_unet(architecture), checkpoint.path, rest)
    model = Model(None, "text", fill(empty_unet(architecture), parts.unet), {}, Sampling())
    with _download_hint("--text-encoder", encoder, download):
        model.text_encoder, model.tokenizer = load_text_encoder(encoder, local_files_only=not download)
    with _download_hint("--vae", autoencoder, download):
        model.vae = load_vae(autoencoder, local_files_only=not download)
    _check_fit(architecture, model, preset)
    source: Any = fill(empty_unet(architecture), parts.unet)

    def reference(sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return source(sample, timestep, states).sample

    notes = [f"text encoder from {encoder.path}", f"VAE from {autoencoder.path}"]
    notes.append(f"latents are VAE latents x {model.scaling_factor:g}")
    if parts.rest:
        notes.append(f"{len(parts.rest)} weights beside the UNet left out")
    return Assembly(model, reference, [*parts.notes, *notes])


def label_model(
    checkpoint: WeightFile,
    architecture: Architecture,
    preset: Preset | None,
    *,
    conditioner: str | None,
    objects: Path | None,
    condition_first: bool,
    allow_pickle: bool,
) -> Assembly:
    """A UNet2DModel's weights and the layers that embed the labels, which are in place of `class_embedding`, beside the UNet,
    or in the file `conditioner`. Raises InputError when they are missing or the labels have no names, MismatchError for
    weights that do not fit."""
    parts, table = split(checkpoint), dict((preset.conditioner if preset else None) or {})
    patched = {k: parts.unet.pop(k) for k in list(parts.unet) if k.startswith("class_embedding.")}
    _check_unet(parts, empty_unet(architecture), checkpoint.path)
    extra = architecture.config["in_channels"] - architecture.config["out_channels"]
    kind = table.get("kind") or ("concat" if extra > 0 else "class_embed")
    dim = extra if kind == "concat" else architecture.time_embedding_dim
    tensors = read_tensors(conditioner, allow_pickle) if conditioner else patched | parts.rest
    layers = find_label_layers(tensors, conditioner or checkpoint.path)
    if layers is None:
        raise _missing_layers(kind, dim, checkpoint.path)
    _check_layers(layers, kind, dim, table, conditioner or str(checkpoint.path))
    if condition_first and kind != "concat":
        raise InputError("--condition-first: this model adds its labels to the time embedding, it concatenates nothing")
    names, notes = _objects(objects, layers.num_labels), [*parts.notes, _layers_note(layers, kind, patched, checkpoint)]
    if condition_first:
        order = "labels come before the image, torch.cat([planes, x], 1)"
        notes.append(f"{order}: conv_in's input channels reordered to match ours")
    elif kind == "concat":
        order = "labels are taken to follow the image, torch.cat([x, planes], 1)"
        notes.append(f"{order}; if not, import with --condition-first")

    embed, source = layers.module(), fill(empty_unet(architecture), parts.unet)
    if kind == "class_embed":
        source.class_embedding = layers.module()  # where its author had the Linear
    state = dict(parts.unet)
    if condition_first:
        weight = state["conv_in.weight"]  # (width, dim + C, 3, 3)
        state["conv_in.weight"] = torch.cat([weight[:, dim:], weight[:, :dim]], dim=1).contiguous()
    unet = fill(empty_unet(architecture, "identity" if kind == "class_embed" else None), state)
    module = LabelConditioner(kind, layers.num_labels, dim, layers.hidden)
    module.load_state_dict(layers.state())

    def reference(sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        if kind == "class_embed":
            return source(sample, timestep, class_labels=labels).sample
        planes = embed(labels).view(len(labels), dim, 1, 1).repeat(1, 1, *sample.shape[2:])  # (B, dim, H, W)
        return source(torch.cat([planes, sample] if condition_first else [sample, planes], dim=1), timestep).sample

    return Assembly(Model(None, "labels", unet, {}, Sampling(), module.eval(), names), reference, notes)


def _check_unet(parts: SplitWeights, unet: Any, path: Path, rest: Mapping[str, Tensor] | None = None) -> None:
    wrong = mismatches(unet.state_dict(), parts.unet, parts.prefix) + mismatches({}, rest or {})
    if wrong:
        raise MismatchError(f"{path}: {type(unet).__name__} of {unet.num_parameters() / 1e6:.1f} M parameters", wrong)


def _check_layers(layers: LabelWeights, kind: str, dim: int, table: Mapping[str, Any], where: str) -> None:
    if layers.hidden and not table.get("hidden"):
        raise InputError(
            f"{where}: {layers.name} holds two layers, and weights do not tell the activation between them; if it is SiLU, "
            f"say so in the preset: [conditioner] hidden = {layers.hidden}"
        )
    if kind == "class_embed" and layers.num_labels == dim != layers.dim:
        raise InputError(
            f"{where}: {layers.name}.weight is {(layers.dim, dim)}, an nn.Embedding of single classes; expected a Linear "
            f"on multi-hot labels, ({dim}, number of labels)"
        )
    wrong = [
        f"shape {layers.name}: {key} found {getattr(layers, key)}, expected {value}"
        for key, value in {"dim": dim, "hidden": table.get("hidden", 0)}.items()
        if getattr(layers, key) != value
    ]
    if wrong:
        raise MismatchError(f"{where}: label conditioner of kind {kind!r}", wrong)


def _missing_layers(kind: str, dim: int, path: Path) -> InputError:
    what = "class_embedding.weight" if kind == "class_embed" else "a Linear beside the UNet"
    lost = "; UNet2DModel.from_pretrained drops a Linear there and says nothing" if kind == "class_embed" else ""
    return InputError(
        f"{path}: holds no conditioner: {what} is missing{lost}; give the file that has the Linear's weights "
        f"({dim}, number of labels) with --conditioner FILE"
    )


def _layers_note(layers: LabelWeights, kind: str, patched: Mapping[str, Tensor], checkpoint: WeightFile) -> str:
    shape = tuple(layers.layers[0]["weight"].shape)
    if patched and checkpoint.config is not None and not checkpoint.config.get("class_embed_type"):
        name = next(k for k in patched if k.endswith("weight"))
        return f"{name} {shape} found although config.json says nothing: a {layers}"
    return f"{layers.name} {shape}: a {layers}, kind {kind!r}"


def _objects(path: Path | None, num_labels: int) -> dict[str, int]:
    if path is None and num_labels != len(ICLEVR_OBJECTS):
        raise InputError(f"the {num_labels} labels have no names; give them with --objects objects.json")
    names = dict(ICLEVR_OBJECTS) if path is None else read_objects(path)
    if len(names) != num_labels:
        raise InputError(f"{path}: {len(names)} objects, expected {num_labels}, one for each input of the conditioner")
    return names


def _network(name: str, option_value: str | None, preset: Preset | None) -> NetworkPreset:
    """The source of a frozen network: the option's, else the preset's. Raises InputError where both are missing."""
    if option_value is not None:
        path, subfolder = split_name(option_value)
        return NetworkPreset(path=path, subfolder=subfolder)
    network: NetworkPreset | None = getattr(preset, name) if preset else None
    if network is None or network.path is None:
        option = "--" + name.replace("_", "-")
        trained = f": preset {preset.name} trains its own" if network and preset else ""
        raise InputError(f"the {name} is not named{trained}; give {option} PATH_OR_ID[:SUBFOLDER]")
    return network


@contextmanager
def _download_hint(option: str, network: NetworkPreset, download: bool) -> Iterator[None]:
    """Adds to an InputError what to do where a hub id is not on this machine."""
    try:
        yield
    except InputError as error:
        if download or Path(str(network.path)).exists():
            raise
        raise InputError(f"{error}; give {option} FOLDER, or allow --download") from None


def _check_fit(architecture: Architecture, model: Model, preset: Preset | None) -> None:
    text: Any = model.text_encoder.config  # type: ignore[union-attr]
    vae: Any = model.vae.config  # type: ignore[union-attr]
    config = architecture.config
    image_size = config["sample_size"] * 2 ** (len(vae.block_out_channels) - 1)
    pairs = [
        ("cross_attention_dim", config["cross_attention_dim"], text.hidden_size, "the text encoder's width"),
        ("in_channels", config["in_channels"], vae.latent_channels, "the VAE's latent channels"),
        ("out_channels", config["out_channels"], vae.latent_channels, "the VAE's latent channels"),
    ]
    if preset is not None:
        pairs.append(("sample_size", image_size, preset.image_size, "image_size in px, through this VAE,"))
    for key, found, expected, what in pairs:
        if found != expected:
            raise InputError(f"{architecture.where}: {key} = {config[key]!r} gives {found}, but {what} is {expected}")
