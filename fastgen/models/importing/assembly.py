"""The two families: imported weights -> a model in memory, and beside it the source's own network, built apart from ours."""

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
from fastgen.models.folder import LabelConditioner, Model
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
from fastgen.presets import NetworkPreset, Preset
from fastgen.sampling.defaults import Sampling

Reference = Callable[..., Tensor]  # (sample, timestep, condition) -> prediction, as the checkpoint's author called it


@dataclass
class Ready:
    """What will be written, and what to compare it with."""

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
) -> Ready:
    """A UNet2DConditionModel's weights, a text encoder and an autoencoder from elsewhere. Raises InputError when one is not
    named, does not load, or does not suit the others."""
    from fastgen.models.build import load_text_encoder, load_vae

    where = _network("text_encoder", text_encoder, preset), _network("vae", vae, preset)
    parts = split(checkpoint)
    named = checkpoint.key is not None  # then what lies beside the UNet was left out on purpose
    _check_unet(parts, empty_unet(architecture), checkpoint.path, {} if named else parts.rest)
    model = Model(None, "text", fill(empty_unet(architecture), parts.unet), {}, Sampling())
    with _named("--text-encoder", where[0], download):
        model.text_encoder, model.tokenizer = load_text_encoder(where[0], local_files_only=not download)
    with _named("--vae", where[1], download):
        model.vae = load_vae(where[1], local_files_only=not download)
    _check_suits(architecture, model, preset)
    source: Any = fill(empty_unet(architecture), parts.unet)

    def reference(sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        return source(sample, timestep, states).sample

    notes = [f"{name} from {network.path}" for name, network in zip(("text encoder", "VAE"), where, strict=True)]
    notes.append(f"latents are VAE latents x {model.scaling_factor:g}")
    if parts.rest:
        notes.append(f"{len(parts.rest)} weights beside the UNet left out")
    return Ready(model, reference, [*parts.notes, *notes])


def label_model(
    checkpoint: WeightFile,
    architecture: Architecture,
    preset: Preset | None,
    *,
    conditioner: str | None,
    objects: Path | None,
    condition_first: bool,
    allow_pickle: bool,
) -> Ready:
    """A UNet2DModel's weights and the layers that embed the labels: in place of `class_embedding`, beside the UNet, or in a
    file of their own. Raises InputError when these are missing or the labels' names are unknown, MismatchError key by key."""
    parts, table = split(checkpoint), dict((preset.conditioner if preset else None) or {})
    patched = {k: parts.unet.pop(k) for k in list(parts.unet) if k.startswith("class_embedding.")}
    _check_unet(parts, empty_unet(architecture), checkpoint.path)
    extra = architecture.config["in_channels"] - architecture.config["out_channels"]
    kind = table.get("kind") or ("concat" if extra > 0 else "class_embed")
    dim = extra if kind == "concat" else architecture.time_embedding_dim
    found = read_tensors(conditioner, allow_pickle) if conditioner else patched | parts.rest
    layers = find_label_layers(found, conditioner or checkpoint.path)
    if layers is None:
        raise InputError(_asked_for(kind, dim, checkpoint.path))
    _check_layers(layers, kind, dim, table, conditioner or str(checkpoint.path))
    if condition_first and kind != "concat":
        raise InputError("--condition-first: this model adds its labels to the time embedding, it concatenates nothing")
    names, notes = _objects(objects, layers.num_labels), [*parts.notes, *_announce(layers, kind, patched, checkpoint)]
    if kind == "concat":
        notes.append(_order(condition_first))

    embed, source = layers.module(), _source_unet(architecture, parts.unet, layers if kind == "class_embed" else None)
    own = dict(parts.unet)
    if condition_first:
        weight = own["conv_in.weight"]  # (width, dim + C, 3, 3)
        own["conv_in.weight"] = torch.cat([weight[:, dim:], weight[:, :dim]], dim=1).contiguous()
    unet = fill(empty_unet(architecture, "identity" if kind == "class_embed" else None), own)
    ours = LabelConditioner(kind, layers.num_labels, dim, layers.hidden)
    ours.load_state_dict(layers.state())

    def reference(sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        if kind == "class_embed":
            return source(sample, timestep, class_labels=labels).sample
        planes = embed(labels).view(len(labels), dim, 1, 1).repeat(1, 1, *sample.shape[2:])  # (B, dim, H, W)
        return source(torch.cat([planes, sample] if condition_first else [sample, planes], dim=1), timestep).sample

    return Ready(Model(None, "labels", unet, {}, Sampling(), ours.eval(), names), reference, notes)


def _check_unet(parts: SplitWeights, unet: Any, path: Path, rest: Mapping[str, Tensor] | None = None) -> None:
    wrong = mismatches(unet.state_dict(), parts.unet, parts.prefix) + mismatches({}, rest or {})
    if wrong:
        raise MismatchError(f"{path}: {type(unet).__name__} of {unet.num_parameters() / 1e6:.1f} M parameters", wrong)


def _source_unet(architecture: Architecture, state: Mapping[str, Tensor], patch: LabelWeights | None) -> Any:
    """The UNet as its author had it, with the Linear in place of `class_embedding`."""
    unet = fill(empty_unet(architecture), state)
    if patch is not None:
        unet.class_embedding = patch.module()
    return unet


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
    wanted = {"dim": dim, "hidden": table.get("hidden", 0)}
    wrong = [
        f"shape {layers.name}: {key} found {getattr(layers, key)}, expected {value}"
        for key, value in wanted.items()
        if getattr(layers, key) != value
    ]
    if wrong:
        raise MismatchError(f"{where}: label conditioner of kind {kind!r}", wrong)


def _asked_for(kind: str, dim: int, path: Path) -> str:
    what = "class_embedding.weight" if kind == "class_embed" else "a Linear beside the UNet"
    lost = "; UNet2DModel.from_pretrained drops a Linear there and says nothing" if kind == "class_embed" else ""
    return (
        f"{path}: holds no conditioner: {what} is missing{lost}; give the file that has the Linear's weights "
        f"({dim}, number of labels) with --conditioner FILE"
    )


def _announce(layers: LabelWeights, kind: str, patched: Mapping[str, Tensor], checkpoint: WeightFile) -> list[str]:
    shape = tuple(layers.layers[0]["weight"].shape)
    if patched and checkpoint.config is not None and not checkpoint.config.get("class_embed_type"):
        name = next(k for k in patched if k.endswith("weight"))
        return [f"{name} {shape} found although config.json says nothing: a {layers}"]
    return [f"{layers.name} {shape}: a {layers}, kind {kind!r}"]


def _order(condition_first: bool) -> str:
    if condition_first:
        return (
            "labels come before the image, torch.cat([planes, x], 1): conv_in's input channels reordered to match ours"
        )
    return "labels are taken to follow the image, torch.cat([x, planes], 1); if not, import with --condition-first"


def _objects(path: Path | None, num_labels: int) -> dict[str, int]:
    if path is None and num_labels != len(ICLEVR_OBJECTS):
        raise InputError(f"the {num_labels} labels have no names; give them with --objects objects.json")
    names = dict(ICLEVR_OBJECTS) if path is None else read_objects(path)
    if len(names) != num_labels:
        raise InputError(f"{path}: {len(names)} objects, expected {num_labels}, one for each input of the conditioner")
    return names


def _network(name: str, given: str | None, preset: Preset | None) -> NetworkPreset:
    """Where a frozen network comes from: the option, else the preset."""
    if given is not None:
        path, subfolder = split_name(given)
        return NetworkPreset(path=path, subfolder=subfolder)
    network: NetworkPreset | None = getattr(preset, name) if preset else None
    if network is None or network.path is None:
        option = "--" + name.replace("_", "-")
        trained = f": preset {preset.name} trains its own" if network and preset else ""
        raise InputError(f"the {name} is not named{trained}; give {option} PATH_OR_ID[:SUBFOLDER]")
    return network


@contextmanager
def _named(option: str, network: NetworkPreset, download: bool) -> Iterator[None]:
    """Adds to an InputError what helps where an id was not found on this machine."""
    try:
        yield
    except InputError as error:
        if download or Path(str(network.path)).exists():
            raise
        raise InputError(f"{error}; give {option} FOLDER, or allow --download") from None


def _check_suits(architecture: Architecture, model: Model, preset: Preset | None) -> None:
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
