"""The stages of each family of models, in order. A finished stage loads its checkpoint in place of training again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastgen.errors import InputError
from fastgen.generate.requests import Request, multi_hot
from fastgen.models import evaluator
from fastgen.models.build import build_module, build_text_encoder, load_text_encoder, load_vae
from fastgen.models.folder import Model, save_model
from fastgen.models.networks.labels import LabelConditioner, LabelUNet, conditioner_dim, unet_class
from fastgen.models.networks.text import TextUNet
from fastgen.presets import NetworkPreset, Preset, Training
from fastgen.training.bpe import train_tokenizer
from fastgen.training.classifier import AttributeTask, ClassifierTask
from fastgen.training.contrastive import ContrastiveTask
from fastgen.training.diffusion import DiffusionTask, NoiseSchedule
from fastgen.training.encode import cached_moments, cached_states, latent_scale, tokenize
from fastgen.training.examples import Examples
from fastgen.training.losses import Objective, objective_of, refuse_unet_keys
from fastgen.training.previews import (
    PresetConditions,
    default_table,
    fixed_labels,
    fixed_prompts,
    preview_rows,
    sampled_preview,
)
from fastgen.training.run_folder import Job
from fastgen.training.sources import CaptionSource, ConditionSource, LabelSource, LatentSpace, PixelSpace, Space
from fastgen.training.trainer import fit
from fastgen.training.vae import VaeTask


def train_text(preset: Preset, data: Examples, job: Job) -> None:
    """Autoencoder, tokenizer and text encoder, then the UNet on their outputs."""
    from diffusers import UNet2DConditionModel

    vae, (text_encoder, tokenizer), recipe = _vae(preset), _text_encoder(preset, data), _recipe(preset.unet, "unet")
    unet = build_module(UNet2DConditionModel, _network(preset.unet).config, "unet", recipe.seed)
    _check_text_unet(unet, vae, text_encoder, preset)
    _check_process(preset)
    objective = objective_of(recipe, latents=True, image_size=preset.image_size)
    prompts = fixed_prompts(preset)
    device = job.run("unet", recipe.precision).precision.device

    _fit_vae(vae, preset, data, job)
    _fit_text_encoder(text_encoder, tokenizer, preset, data, job)
    with job.processes.main_first():
        moments = cached_moments(
            vae, data.images, data.pixel_fields, recipe.flip, device, job.progress, recipe.color_jitter
        )
    if _network(preset.vae).path is None:
        vae.register_to_config(scaling_factor=latent_scale(moments, data.rows(recipe)[0]))
    texts, choices = data.captions
    ids = tokenize(tokenizer, texts, text_encoder.config.max_position_embeddings)
    with job.processes.main_first():
        states = cached_states(text_encoder, ids, device, job.progress)
    space, conditions = LatentSpace(moments, data.images, vae, device), CaptionSource(states, choices, device)
    extra = None
    if prompts:
        ids = tokenize(tokenizer, prompts, text_encoder.config.max_position_embeddings)
        with job.processes.main_first():
            prompt_states = np.array(cached_states(text_encoder, ids, device, job.progress))
        extra = PresetConditions(torch.from_numpy(prompt_states).to(device).float(), prompts)
    model = Model(None, "text", unet, dict(preset.scheduler), preset.sampling)
    model.text_encoder, model.tokenizer, model.vae = text_encoder, tokenizer, vae
    _train_unet(TextUNet(unet), model, space, conditions, objective, extra, preset, data, job)


def train_labels(preset: Preset, data: Examples, job: Job) -> None:
    """The UNet and its conditioner, on pixels."""
    recipe = _recipe(preset.unet, "unet")
    device = job.run("unet", recipe.precision).precision.device
    objects = dict(data.dataset.objects or {})
    config = _network(preset.unet).config
    unet = build_module(unet_class((preset.conditioner or {})["kind"], config), config, "unet", recipe.seed)
    conditioner = LabelConditioner(num_labels=len(objects), **_conditioner(preset, unet.config))
    if unet.config.sample_size != preset.image_size:
        size = unet.config.sample_size
        raise InputError(f"unet.config.sample_size = {size}: expected image_size, {preset.image_size}")
    _check_process(preset)
    objective = objective_of(recipe, latents=False, image_size=preset.image_size)
    lists = fixed_labels(preset, objects)
    extra = None
    if lists:
        requests = [Request(str(i), f"{i}.png", labels=labels) for i, labels in enumerate(lists)]
        condition = torch.from_numpy(multi_hot(requests, objects)).to(device)
        extra = PresetConditions(condition, tuple(map(", ".join, lists)))

    space, conditions = PixelSpace(data.images, device), LabelSource(data.multi_hot, device)
    model = Model(None, "labels", unet, dict(preset.scheduler), preset.sampling, conditioner, objects)
    _train_unet(LabelUNet(unet, conditioner), model, space, conditions, objective, extra, preset, data, job)


def train_evaluator(preset: Preset, data: Examples, job: Job) -> None:
    """The classifier that scores labels or attributes."""
    recipe = _recipe(preset.evaluator, "evaluator")
    if preset.image_size != evaluator.IMAGE_SIZE:
        raise InputError(f"image_size = {preset.image_size}: the evaluator sees {evaluator.IMAGE_SIZE} px")
    objects, attributes = dict(data.dataset.objects or {}), data.dataset.attributes
    run = job.run("evaluator", recipe.precision)
    torch.manual_seed(recipe.seed)
    module = evaluator.ResNet18(len(objects), **_network(preset.evaluator).config)
    inputs = module, data.images, data.multi_hot, data.rows(recipe), run.precision.device
    fit(AttributeTask(*inputs, attributes=attributes) if attributes else ClassifierTask(*inputs), recipe, run)
    outputs = attributes or objects
    job.finish(lambda folder: evaluator.save(module.cpu(), folder, outputs, record(preset, data, job)))


def record(preset: Preset, data: Examples, job: Job) -> dict[str, Any]:
    """The training record in the model's folder: preset, data, last figures of each stage, versions."""
    from importlib.metadata import version

    last = {row["stage"]: row for stage in ("vae", "text_encoder", "unet", "evaluator") for row in job.log.rows(stage)}
    return {
        "preset": preset.name,
        "image_mode": preset.image_mode,
        "data": data.dataset.fingerprint,
        "images": len(data.readable),
        "stages": {stage: {k: v for k, v in row.items() if k != "stage"} for stage, row in last.items()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _vae(preset: Preset) -> Any:
    from diffusers import AutoencoderKL

    network = _network(preset.vae)
    if network.path is not None:
        return load_vae(network)
    return build_module(AutoencoderKL, network.config, "vae", _recipe(network, "vae").seed)


def _text_encoder(preset: Preset, data: Examples) -> tuple[Any, Any]:
    network = _network(preset.text_encoder)
    if network.path is not None:
        return load_text_encoder(network)
    length = int(network.config.get("max_position_embeddings", 77))
    tokenizer = train_tokenizer(data.captions[0], int(network.config.get("vocab_size", 4096)), length)
    return build_text_encoder(network.config, tokenizer, _recipe(network, "text_encoder").seed), tokenizer


def _check_text_unet(unet: Any, vae: Any, text_encoder: Any, preset: Preset) -> None:
    channels = int(vae.config.latent_channels)
    size = preset.image_size // 2 ** (len(vae.config.block_out_channels) - 1)
    for key, expected, why in (
        ("in_channels", channels, "the autoencoder's latent channels"),
        ("out_channels", channels, "the autoencoder's latent channels"),
        ("sample_size", size, f"the latents' size at {preset.image_size} px"),
        ("cross_attention_dim", text_encoder.config.hidden_size, "the text encoder's width"),
    ):
        if unet.config[key] != expected:
            raise InputError(f"unet.config.{key} = {unet.config[key]!r}: expected {expected}, {why}")


def _conditioner(preset: Preset, unet: Any) -> dict[str, Any]:
    table = dict(preset.conditioner or {})
    width, where = conditioner_dim(table["kind"], unet)
    if table.setdefault("dim", width) != width:
        raise InputError(f"conditioner.dim = {table['dim']}: expected {width}, {where}")
    return table


def _check_process(preset: Preset) -> None:
    """Raises InputError, before hours of training, when the noise schedule or the sampling defaults do not work."""
    NoiseSchedule(preset.scheduler)
    default_table(preset.scheduler, preset.sampling)


def _fit_vae(vae: Any, preset: Preset, data: Examples, job: Job) -> None:
    if _network(preset.vae).path is not None:
        return
    recipe = _recipe(preset.vae, "vae")
    run = job.run("vae", recipe.precision)
    rows = data.rows(recipe)
    fit(VaeTask(vae, data.images, rows, run.precision.device, flip=recipe.flip, loss=recipe.loss), recipe, run)


def _fit_text_encoder(encoder: Any, tokenizer: Any, preset: Preset, data: Examples, job: Job) -> None:
    if _network(preset.text_encoder).path is not None:
        return
    recipe = _recipe(preset.text_encoder, "text_encoder")
    run = job.run("text_encoder", recipe.precision)
    texts, choices = data.captions
    ids = tokenize(tokenizer, texts, encoder.config.max_position_embeddings)
    rows = data.rows(recipe)
    fit(ContrastiveTask(encoder, ids, choices, data.subjects, data.images, rows, run.precision.device), recipe, run)


def _train_unet(
    module: Any,
    model: Model,
    space: Space,
    conditions: ConditionSource,
    objective: Objective,
    extra: PresetConditions | None,
    preset: Preset,
    data: Examples,
    job: Job,
) -> None:
    """Train `module`, the model's UNet with its conditioner, and save the model."""
    job.outline(lambda folder: save_model(model, folder, trained=False))
    recipe = _recipe(preset.unet, "unet")
    run = job.run("unet", recipe.precision)
    rows = data.rows(recipe)
    examples = preview_rows(rows[1])
    process, captions = (preset.scheduler, preset.sampling, run.precision), data.captions_of(examples)
    preview = sampled_preview(space, conditions, examples, captions, *process, extra)
    task = DiffusionTask(
        module,
        space,
        conditions,
        preset.scheduler,
        rows,
        dropout=recipe.condition_dropout,
        flip=recipe.flip,
        jitter=recipe.color_jitter,
        timestep_shift=recipe.timestep_shift,
        objective=objective,
        preview=preview,
    )
    fit(task, recipe, run)
    for network in (model.unet, model.conditioner, model.text_encoder, model.vae):
        if network is not None:
            network.cpu()
    job.finish(lambda folder: save_model(model, folder, record(preset, data, job)))


def _network(part: NetworkPreset | None) -> NetworkPreset:
    assert part is not None  # Preset has checked it
    return part


def _recipe(part: NetworkPreset | None, name: str) -> Training:
    network = _network(part)
    if network.train is None:
        raise InputError(f"{name}.path: this network is what the preset trains; give {name}.config and {name}.train")
    if name != "unet":
        refuse_unet_keys(network.train, name)
    return network.train
