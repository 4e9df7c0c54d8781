"""Imported weights -> a model in memory; and the source's own network, built apart from fastgen's classes."""

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
from fastgen.models.condition import CLASS, GUIDANCE, POOLED, STATES
from fastgen.models.folder import Model
from fastgen.models.importing.architecture import Architecture, empty_network, fill
from fastgen.models.importing.label_layers import LabelLayers, find_layers
from fastgen.models.importing.split import MismatchError, SplitWeights, mismatches, split
from fastgen.models.importing.weight_files import UNET_MARK, WeightFile, read_tensors, split_name
from fastgen.models.interface import latent_channels
from fastgen.presets import NetworkPreset, Preset
from fastgen.sampling.defaults import Sampling
from fastgen.sampling.schedulers import learned_variance

MARKS = {"DiTTransformer2DModel": "pos_embed.proj.weight"}  # a key of every network of the class
LISTED = 5  # entries that a note names
Reference = Callable[..., Tensor]  # (sample, timestep, *conditions) -> prediction, as the checkpoint's author called it


@dataclass(frozen=True)
class ImportOptions:
    """What the user says of a checkpoint, see `import_model`."""

    text_encoder: str | None = None
    vae: str | None = None
    download: bool = False
    objects: Path | None = None
    conditioner: str | None = None
    embed: str | None = None
    condition_first: bool = False
    unconditional: bool = False
    null_class: int | None = None
    allow_pickle: bool = False


@dataclass
class Assembly:
    """A model to write, and the source's network to compare it with."""

    model: Model
    reference: Reference
    notes: list[str] = field(default_factory=list)


def assemble(
    checkpoint: WeightFile,
    architecture: Architecture,
    preset: Preset | None,
    scheduler_config: dict[str, Any],
    options: ImportOptions,
) -> Assembly:
    """The denoiser's weights with what is around it: text encoder and VAE from elsewhere, the layers that embed labels in place
    of `class_embedding`, beside the network, or in a file of their own. Raises InputError when one of these is not named, does
    not load or does not fit, MismatchError for weights that do not fit the architecture."""
    parts = split(checkpoint, MARKS.get(architecture.class_name, UNET_MARK))
    model = Model(None, torch.nn.Identity(), scheduler_config, Sampling())
    notes = list(parts.notes)
    text = _takes_text(architecture, preset, options, parts)
    beside = {} if checkpoint.key is not None else _layers(parts.rest)  # a key leaves out what lies beside on purpose
    if text:
        _add_text_encoder(model, preset, options, notes)
    if _takes_latents(architecture, preset, options, text):
        _add_vae(model, preset, options, notes)
    layers = None
    if text or (architecture.native and options.conditioner is None):
        _refuse(
            architecture,
            embed=options.embed,
            condition_first=options.condition_first,
            unconditional=options.unconditional,
        )
        _check_weights(parts, empty_network(architecture), checkpoint.path, beside)
    else:
        layers = _label_layers(checkpoint, architecture, preset, parts, beside, model, options)
    if left := [key for key in parts.rest if key not in beside]:
        more = f", ... ({len(left)} in all)" if len(left) > LISTED else ""
        notes.append(f"beside the UNet left out: {', '.join(left[:LISTED])}{more}")
    model.unet, reference = _networks(architecture, parts, layers, options)
    model.null_class = options.null_class
    if layers is not None:
        model.conditioner = layers.conditioner()
        notes += _layer_notes(layers, parts, checkpoint, options)
    model.names = _names(model, options, notes)
    if layers is not None and layers.embed == "identity":
        notes.append(_identity_note(layers))
    return Assembly(model, _by_names(model, reference), notes)


def _takes_text(architecture: Architecture, preset: Preset | None, options: ImportOptions, parts: SplitWeights) -> bool:
    """Whether the network is conditioned on text. Raises InputError where nothing says so, nor the contrary."""
    labels = (preset and preset.conditioner) or options.conditioner or options.embed
    if options.text_encoder or (preset and preset.text_encoder):
        _refuse(architecture, conditioner=options.conditioner, embed=options.embed, objects=options.objects)
        _refuse(architecture, condition_first=options.condition_first, unconditional=options.unconditional)
        if architecture.class_name != "UNet2DConditionModel":
            _refuse(architecture, text_encoder=options.text_encoder or True)
        return True
    blocks = (*architecture.config.get("down_block_types", ()), *architecture.config.get("up_block_types", ()))
    if architecture.states_width and any("CrossAttn" in block for block in blocks) and not labels:
        if parts.rest and not options.vae:
            return False
        raise InputError(
            "the text_encoder is not named: give --text-encoder PATH_OR_ID[:SUBFOLDER]; if its cross-attention takes labels "
            "or a class, give the layer that embeds them with --conditioner FILE, or say how with --embed"
        )
    return False


def _takes_latents(architecture: Architecture, preset: Preset | None, options: ImportOptions, text: bool) -> bool:
    """Whether the network works on latents: with --vae or a preset's VAE. A UNet2DConditionModel must say it either way."""
    if options.vae == "none":
        return False
    if options.vae or (preset and preset.vae):
        return True
    if architecture.class_name == "DiTTransformer2DModel" or (text and preset is None):
        raise InputError("the vae is not named; give --vae PATH_OR_ID[:SUBFOLDER], or --vae none for a model in pixels")
    return False


def _add_text_encoder(model: Model, preset: Preset | None, options: ImportOptions, notes: list[str]) -> None:
    from fastgen.models.build import load_text_encoder

    network = _network("text_encoder", options.text_encoder, preset)
    with _download_hint("--text-encoder", network, options.download):
        encoder, tokenizer = load_text_encoder(network, local_files_only=not options.download)
    model.text_encoders, model.tokenizers = [encoder], [tokenizer]
    notes.append(f"text encoder from {network.path}")


def _add_vae(model: Model, preset: Preset | None, options: ImportOptions, notes: list[str]) -> None:
    from fastgen.models.build import load_vae

    network = _network("vae", options.vae, preset)
    with _download_hint("--vae", network, options.download):
        vae = load_vae(network, local_files_only=not options.download)
    model.vae = vae
    notes += [f"VAE from {network.path}", f"latents are VAE latents x {vae.config.get('scaling_factor') or 1:g}"]


def _label_layers(
    checkpoint: WeightFile,
    architecture: Architecture,
    preset: Preset | None,
    parts: SplitWeights,
    beside: Mapping[str, Tensor],
    model: Model,
    options: ImportOptions,
) -> LabelLayers | None:
    """The layers that embed labels or a class; None where the user says that the model is unconditional."""
    table = dict((preset.conditioner if preset else None) or {})
    embed = options.embed or table.get("embed")
    patched = {k: parts.unet.pop(k) for k in list(parts.unet) if k.startswith("class_embedding.")}
    _check_weights(parts, empty_network(architecture), checkpoint.path, {})
    channels = _channels(architecture, model)
    extra = int(architecture.config["in_channels"]) - channels
    kind = table.get("kind") or ("tokens" if architecture.states_width else "concat" if extra > 0 else "class_embed")
    dim = {"concat": extra, "tokens": architecture.states_width}.get(kind, architecture.time_embedding_dim)
    if options.condition_first and kind != "concat":
        raise InputError("--condition-first: this model adds its labels to the time embedding, it concatenates nothing")
    tensors = read_tensors(options.conditioner, options.allow_pickle) if options.conditioner else patched | dict(beside)
    where = options.conditioner or str(checkpoint.path)
    if options.unconditional:
        _refuse(architecture, embed=options.embed, objects=options.objects)
        if tensors or extra > 0 or table:
            raise InputError(
                f"--unconditional: {where} holds {next(iter(tensors), 'channels or a preset of a condition')}"
            )
        return None
    if not tensors:
        if kind == "class_embed" or (embed != "identity" and dim != _named(options)):
            raise _missing_layers(kind, dim, checkpoint.path)
        return LabelLayers("its labels", kind, "identity", (), dim)
    if embed == "identity":
        raise InputError(
            f"{where}: {next(iter(tensors))} lies beside the network, but --embed identity says that nothing embeds"
        )
    return find_layers(tensors, kind, dim, embed, int(table.get("hidden", 0)), where)


def _layers(rest: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what lies beside the network the weights and biases of layers; not counters and tables of the noise schedule, such as
    step, initted or betas, that a checkpoint holds besides."""
    layers = {key.rpartition(".")[0] for key, value in rest.items() if value.ndim > 1}
    return {key: value for key, value in rest.items() if key.rpartition(".")[0] in layers}


def _named(options: ImportOptions) -> int:
    """How many labels have names."""
    return len(ICLEVR_OBJECTS if options.objects is None else read_objects(options.objects))


def _channels(architecture: Architecture, model: Model) -> int:
    """Channels of the space that the network denoises in. It may predict as many variances beside them: where the noise
    schedule says so, or where it predicts exactly twice the channels that it takes."""
    if model.vae is not None:
        return latent_channels(model.vae)
    taken, given = int(architecture.config["in_channels"]), int(architecture.config["out_channels"])
    return given // 2 if given == 2 * taken or learned_variance(model.scheduler_config) else given


def _networks(
    architecture: Architecture, parts: SplitWeights, layers: LabelLayers | None, options: ImportOptions
) -> tuple[Any, Callable[..., Tensor]]:
    """The network as fastgen runs it; and the source's, a function of sample, timestep and the conditions by their names."""
    source = fill(empty_network(architecture), parts.unet)
    if layers is None:

        def plain(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            words = {key: conditions[key] for key in (CLASS, GUIDANCE) if key in conditions}
            if architecture.class_name == "UNet2DConditionModel":
                words["encoder_hidden_states"] = conditions.get(STATES)  # type: ignore[assignment]
            return source(sample, timestep, **words).sample

        return fill(empty_network(architecture), parts.unet), plain
    embed, state = layers.module(), dict(parts.unet)
    if layers.kind == "class_embed":
        source.class_embedding = layers.module()  # where its author had it
    if options.condition_first:
        weight = state["conv_in.weight"]  # (width, dim + C, 3, 3)
        state["conv_in.weight"] = torch.cat([weight[:, layers.dim :], weight[:, : layers.dim]], dim=1).contiguous()

    def reference(sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        labels = conditions[CLASS]
        crosses = {"encoder_hidden_states": None} if architecture.class_name == "UNet2DConditionModel" else {}
        if layers.kind == "class_embed":
            return source(sample, timestep, class_labels=labels, **crosses).sample
        if layers.kind == "tokens":
            return source(sample, timestep, embed(labels)[:, None]).sample
        planes = embed(labels).view(len(labels), layers.dim, 1, 1).repeat(1, 1, *sample.shape[2:])  # (B, dim, H, W)
        both = [planes, sample] if options.condition_first else [sample, planes]
        return source(torch.cat(both, dim=1), timestep, **crosses).sample

    return fill(empty_network(architecture, "identity" if layers.kind == "class_embed" else None), state), reference


def _by_names(model: Model, reference: Callable[..., Tensor]) -> Reference:
    names = [name for name, *_ in model.condition.inputs]
    if POOLED in names:
        raise InputError(
            "this UNet takes a pooled text and sizes (SDXL): save it in its whole pipeline; fastgen reads that folder"
        )
    channels = model.space.shape[0]

    def call(sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        prediction = reference(sample, timestep, **dict(zip(names, conditions, strict=True)))
        return prediction[:, :channels]  # a learned variance is dropped

    return call


def _check_weights(parts: SplitWeights, network: Any, path: Path, rest: Mapping[str, Tensor]) -> None:
    wrong = mismatches(network.state_dict(), parts.unet, parts.prefix) + mismatches({}, rest)
    if wrong:
        count = sum(p.numel() for p in network.parameters())
        raise MismatchError(f"{path}: {type(network).__name__} of {count / 1e6:.1f} M parameters", wrong)


def _missing_layers(kind: str, dim: int, path: Path) -> InputError:
    what = {"class_embed": "class_embedding.weight", "tokens": "the layer whose states cross-attention takes"}.get(
        kind, "a Linear beside the UNet"
    )
    lost = "; UNet2DModel.from_pretrained drops a Linear there and says nothing" if kind == "class_embed" else ""
    others = ", or --unconditional if it has no condition" if kind == "class_embed" else ""
    others = f", or --embed identity if the {dim} labels themselves are its planes" if kind == "concat" else others
    return InputError(
        f"{path}: holds no conditioner: {what} is missing{lost}; give the file that has its weights, a Linear's "
        f"({dim}, number of labels), with --conditioner FILE{others}"
    )


def _layer_notes(layers: LabelLayers, parts: SplitWeights, checkpoint: WeightFile, options: ImportOptions) -> list[str]:
    notes = [] if layers.embed == "identity" else [_found_note(layers, checkpoint)]
    if options.condition_first:
        order = "labels come before the image, torch.cat([planes, x], 1)"
        notes.append(f"{order}: conv_in's input channels reordered to match ours")
    elif layers.kind == "concat":
        order = "labels are taken to follow the image, torch.cat([x, planes], 1)"
        notes.append(f"{order}; if not, import with --condition-first")
    return notes


def _found_note(layers: LabelLayers, checkpoint: WeightFile) -> str:
    shape = tuple(layers.layers[0]["weight"].shape)
    config = checkpoint.config
    if layers.name.startswith("class_embedding") and config is not None and not config.get("class_embed_type"):
        return f"{layers.weight_name} {shape} found although config.json says nothing: a {layers}"
    return f"{layers.name} {shape}: a {layers}, kind {layers.kind!r}"


def _identity_note(layers: LabelLayers) -> str:
    return (
        f"the {layers.dim} planes beside the image are taken to be the labels themselves, without a layer between; if its code "
        "had one, give it with --conditioner FILE"
    )


def _names(model: Model, options: ImportOptions, notes: list[str]) -> dict[str, int] | None:
    """The names of labels or classes: of --objects, else i-CLEVR's for 24 labels; classes go without."""
    named = None if options.objects is None else read_objects(options.objects)
    kinds = model.condition  # names are numbers so far
    if kinds.names is None:
        if named is not None:
            raise InputError("--objects: this model takes neither labels nor classes")
        return None
    count = len(kinds.names)
    if named is None and kinds.labels is not None:
        if count != len(ICLEVR_OBJECTS):
            raise InputError(f"the {count} labels have no names; give them with --objects objects.json")
        named = dict(ICLEVR_OBJECTS)
        notes.append("its labels are taken to be the 24 objects of i-CLEVR, in their order")
    if named is not None and len(named) != count:
        what = "each input of the conditioner" if kinds.labels is not None else "each class"
        raise InputError(f"{options.objects}: {len(named)} objects, expected {count}, one for {what}")
    del model.condition  # it is computed again, with the names
    return named


def _refuse(architecture: Architecture, **options: Any) -> None:
    for name, value in options.items():
        if value:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} does not concern a {architecture.class_name}, which {architecture.where} names")


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
