"""What a preset and a dataset give before anything is trained: networks that fit each other, or an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgen.errors import InputError
from fastgen.models import evaluator
from fastgen.models.build import build_module, build_text_encoder, load_text_encoder, load_vae
from fastgen.models.folder import Model
from fastgen.models.networks.labels import conditioner_for, unet_class
from fastgen.presets import NETWORKS, NetworkPreset, Preset, Training
from fastgen.training.autocast import choose
from fastgen.training.bpe import train_tokenizer
from fastgen.training.diffusion import NoiseSchedule
from fastgen.training.examples import Examples
from fastgen.training.losses import Objective, objective_of, refuse_unet_keys
from fastgen.training.pretrained import begin_evaluator, begin_network, begin_unet, source_of
from fastgen.training.previews import default_table, fixed_labels, fixed_prompts


@dataclass(frozen=True)
class ModelPlan:
    """A diffusion model before its training. `fixed`: prompts or label lists of the preset's own previews; `pretrained`: the
    hash of the weights that a network begins with, where they are those of another model."""

    model: Model
    objective: Objective
    fixed: Sequence[Any]
    pretrained: Mapping[str, str]


def plan_model(preset: Preset, data: Examples, device: str | None) -> ModelPlan:
    """The networks of a preset, untrained or loaded, and the loss of its UNet. Nothing is written.

    Raises InputError for networks that do not fit each other, the images or the device, for a noise schedule or a sampling that
    does not work, for a loss that cannot be computed, and for too few images.
    """
    model, pretrained = _assemble(preset, data)
    recipe = recipe_of(preset.unet, "unet")
    _check_process(preset)
    model.condition.check_guided(preset.sampling.guidance_scale)
    _check_recipes(preset, data, device)
    objective = objective_of(recipe, latents=model.vae is not None, image_size=preset.image_size)
    fixed = fixed_prompts(preset) if preset.kind == "text" else fixed_labels(preset, data.dataset.objects or {})
    return ModelPlan(model, objective, fixed, pretrained)


@dataclass(frozen=True)
class EvaluatorPlan:
    """An evaluator before its training. `outputs`: the objects or attributes that it judges; `pretrained`: as in ModelPlan."""

    module: evaluator.ResNet18
    outputs: Mapping[str, Any]
    pretrained: Mapping[str, str]


def plan_evaluator(preset: Preset, data: Examples, device: str | None) -> EvaluatorPlan:
    """The network of an evaluator's preset. Raises InputError where it cannot be trained on these images."""
    if preset.image_size != evaluator.IMAGE_SIZE:
        raise InputError(f"image_size = {preset.image_size}: the evaluator sees {evaluator.IMAGE_SIZE} px")
    _check_recipes(preset, data, device)
    recipe, objects = recipe_of(preset.evaluator, "evaluator"), dict(data.dataset.objects or {})
    torch.manual_seed(recipe.seed)
    module = evaluator.ResNet18(len(objects), **network_of(preset.evaluator).config)
    outputs = data.dataset.attributes or objects
    if recipe.pretrained is None:
        return EvaluatorPlan(module, outputs, {})
    return EvaluatorPlan(module, outputs, {"evaluator": begin_evaluator(module, recipe.pretrained, outputs)})


def _check_recipes(preset: Preset, data: Examples, device: str | None) -> None:
    for name in NETWORKS:
        part: NetworkPreset | None = getattr(preset, name)
        if part is not None and part.path is None:
            recipe = recipe_of(part, name)
            choose(recipe.precision, device)
            data.rows(recipe)


def _assemble(preset: Preset, data: Examples) -> tuple[Model, Mapping[str, str]]:
    """The model with fresh weights, or loaded ones where the preset names them, and the hashes of those that training begins
    with. Raises InputError for networks that do not fit together, or to the preset's image size."""
    config, table = network_of(preset.unet).config, dict(preset.conditioner or {})
    crosses = preset.text_encoder is not None or "cross_attention_dim" in config
    cls = unet_class(table.get("kind") or (None if crosses else "class_embed"), config)
    unet = build_module(cls, config, "unet", recipe_of(preset.unet, "unet").seed)
    model = Model(None, unet, dict(preset.scheduler), preset.sampling)
    if table:
        objects = dict(data.dataset.objects or {})
        model.names = objects
        count = len(objects)
        if table.get("embed") == "embedding":  # one more class, which stands for none
            model.null_class, count = len(objects), len(objects) + 1
        model.conditioner = conditioner_for(table, unet.config, objects, count)
    elif config.get("num_class_embeds") or config.get("class_embed_type"):
        raise InputError(
            "unet.config: class_embed_type, num_class_embeds: labels and classes have a [conditioner] of their own"
        )
    pretrained: dict[str, str] = {}
    if preset.vae is not None:
        model.vae = _vae(preset)
        if (source := source_of(preset, "vae")) is not None:
            pretrained["vae"] = begin_network(model.vae, source, "vae")
    if preset.text_encoder is not None:
        source = source_of(preset, "text_encoder")
        encoder, tokenizer = _text_encoder(preset, data, source)
        if source is not None:
            pretrained["text_encoder"] = begin_network(encoder, source, "text_encoder")
        model.text_encoders, model.tokenizers = [encoder], [tokenizer]
    try:
        size, channels = model.space.image[1:], model.space.image[0]
        model.signatures()
    except InputError as error:
        raise InputError(f"preset {preset.name}: {str(error).removeprefix(f'{model.where}: ')}") from None
    if size != (preset.image_size, preset.image_size):
        found = " x ".join(map(str, dict.fromkeys(size)))
        raise InputError(
            f"unet.config.sample_size = {unet.config.sample_size}: gives {found} px, image_size is {preset.image_size}"
        )
    if channels != 3:
        raise InputError(f"the model's images have {channels} channels; training reads RGB images, of 3")
    if (source := source_of(preset, "unet")) is not None:
        pretrained["unet"] = begin_unet(model, preset, source)
    return model, pretrained


def _vae(preset: Preset) -> Any:
    from diffusers import AutoencoderKL

    network = network_of(preset.vae)
    if network.path is not None:
        return load_vae(network)
    return build_module(AutoencoderKL, network.config, "vae", recipe_of(network, "vae").seed)


def _text_encoder(preset: Preset, data: Examples, source: Model | None) -> tuple[Any, Any]:
    """(encoder, tokenizer). A tokenizer is learnt from the captions, unless the weights of `source` come with theirs."""
    network = network_of(preset.text_encoder)
    if network.path is not None:
        return load_text_encoder(network)
    if source is not None and source.tokenizers:
        tokenizer = source.tokenizers[0]
    else:
        length = int(network.config.get("max_position_embeddings", 77))
        tokenizer = train_tokenizer(data.captions[0], int(network.config.get("vocab_size", 4096)), length)
    return build_text_encoder(network.config, tokenizer, recipe_of(network, "text_encoder").seed), tokenizer


def _check_process(preset: Preset) -> None:
    """Raises InputError, before hours of training, when the noise schedule or the sampling defaults do not work."""
    NoiseSchedule(preset.scheduler)
    default_table(preset.scheduler, preset.sampling)


def network_of(part: NetworkPreset | None) -> NetworkPreset:
    """A network that the preset has."""
    assert part is not None  # Preset has checked it
    return part


def recipe_of(part: NetworkPreset | None, name: str) -> Training:
    """How the network of this name is trained. InputError for one that is loaded, and for keys of another network's recipe."""
    network = network_of(part)
    if network.train is None:
        raise InputError(f"{name}.path: this network is what the preset trains; give {name}.config and {name}.train")
    if name != "unet":
        refuse_unet_keys(network.train, name)
    return network.train
