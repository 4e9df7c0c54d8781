"""The stages of a training, in order. A finished stage loads its checkpoint in place of training again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fastgen.generate.requests import Request, multi_hot
from fastgen.models import evaluator
from fastgen.models.folder import Model
from fastgen.models.networks.autoencoder import standardise
from fastgen.models.saving import save_model
from fastgen.presets import Preset
from fastgen.training.assembly import EvaluatorPlan, ModelPlan, network_of, recipe_of
from fastgen.training.classifier import AttributeTask, ClassifierTask
from fastgen.training.contrastive import ContrastiveTask
from fastgen.training.diffusion import DiffusionTask
from fastgen.training.encode import cached_moments, cached_states, latent_scale, latent_statistics, tokenize
from fastgen.training.examples import Examples
from fastgen.training.previews import (
    PresetConditions,
    preview_rows,
    sampled_preview,
)
from fastgen.training.run_folder import STAGES, Job
from fastgen.training.sources import (
    CaptionSource,
    ClassSource,
    ConditionSource,
    LabelSource,
    LatentSpace,
    NoCondition,
    PixelSpace,
    Space,
)
from fastgen.training.trainer import fit
from fastgen.training.vae import VaeTask


def train_model(plan: ModelPlan, preset: Preset, data: Examples, job: Job) -> None:
    """A diffusion model: the networks around its UNet, where it has any, then the UNet on what they give."""
    model, recipe = plan.model, recipe_of(preset.unet, "unet")
    device = job.run("unet", recipe.precision).precision.device
    if model.vae is not None:
        _fit_vae(model.vae, preset, data, job)
    if model.text_encoders:
        _fit_text_encoder(model.text_encoders[0], model.tokenizers[0], preset, data, job)
    space = _space(model, preset, data, job, device)
    conditions, extra = _conditions(model, data, job, device, plan.fixed)
    _train_unet(plan, space, conditions, extra, preset, data, job)


def _space(model: Model, preset: Preset, data: Examples, job: Job, device: torch.device) -> Space:
    """The training images as samples, encoded once where the model works on latents."""
    if model.vae is None:
        return PixelSpace(data.images, device)
    recipe = recipe_of(preset.unet, "unet")
    with job.processes.main_first():
        moments = cached_moments(
            model.vae, data.images, data.pixel_fields, recipe.flip, device, job.progress, recipe.color_jitter
        )
    if network_of(preset.vae).path is None:
        vae: Any = model.vae
        vae.register_to_config(scaling_factor=latent_scale(moments, data.rows(recipe)[0]))
        del model.space  # it has the old factor
    return LatentSpace(moments, data.images, model.vae, device)


def _conditions(
    model: Model, data: Examples, job: Job, device: torch.device, fixed: Sequence[Any]
) -> tuple[ConditionSource, PresetConditions | None]:
    """The conditions of the training images, and those of the preset's own previews, `fixed`: prompts or label lists."""
    if model.text_encoders:
        texts, choices = data.captions
        source = CaptionSource(_states(model, texts, job, device), choices, device)
        if not fixed:
            return source, None
        states = np.array(_states(model, fixed, job, device))
        return source, PresetConditions((torch.from_numpy(states).to(device).float(),), tuple(fixed))
    if model.conditioner is None:
        return NoCondition(), None
    requests = [Request(str(i), f"{i}.png", labels=labels) for i, labels in enumerate(fixed)]
    captions = tuple(map(", ".join, fixed))
    if model.null_class is not None:
        ids = torch.tensor([model.condition.class_id(r.labels or ()) for r in requests], device=device)
        return ClassSource(data.classes, model.null_class, device), PresetConditions(
            (ids,), captions
        ) if fixed else None
    rows = torch.from_numpy(multi_hot(requests, model.names or {})).to(device) if fixed else torch.zeros(0)
    return LabelSource(data.multi_hot, device), PresetConditions((rows,), captions) if fixed else None


def _states(model: Model, texts: Sequence[str], job: Job, device: torch.device) -> np.ndarray:
    """(N, tokens, D) states of texts, from the cache."""
    assert model.condition.text is not None
    ids = tokenize(model.tokenizers[0], texts, model.condition.text.tokens[0])
    with job.processes.main_first():
        return cached_states(model.text_encoders[0], ids, device, job.progress)


def train_evaluator(plan: EvaluatorPlan, preset: Preset, data: Examples, job: Job) -> None:
    """The classifier that scores labels or attributes."""
    recipe = recipe_of(preset.evaluator, "evaluator")
    run, module, attributes = job.run("evaluator", recipe.precision), plan.module, data.dataset.attributes
    inputs = module, data.images, data.multi_hot, data.rows(recipe), run.precision.device
    fit(AttributeTask(*inputs, attributes=attributes) if attributes else ClassifierTask(*inputs), recipe, run)
    job.finish(
        lambda folder: evaluator.save(module.cpu(), folder, plan.outputs, record(preset, data, job, plan.pretrained))
    )


def record(preset: Preset, data: Examples, job: Job, pretrained: Mapping[str, str]) -> dict[str, Any]:
    """The training record in the model's folder: preset, data, hashes of weights that training began with, last figures of each
    stage, versions."""
    from importlib.metadata import version

    last = {row["stage"]: row for stage in STAGES for row in job.log.rows(stage)}
    return {
        "preset": preset.name,
        "image_mode": preset.image_mode,
        "data": data.dataset.fingerprint,
        "images": len(data.readable),
        **({"pretrained": dict(pretrained)} if pretrained else {}),
        "stages": {stage: {k: v for k, v in row.items() if k != "stage"} for stage, row in last.items()},
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
    }


def _fit_vae(vae: Any, preset: Preset, data: Examples, job: Job) -> None:
    if network_of(preset.vae).path is not None:
        return
    recipe = recipe_of(preset.vae, "vae")
    run = job.run("vae", recipe.precision)
    rows = data.rows(recipe)
    fit(VaeTask(vae, data.images, rows, run.precision.device, flip=recipe.flip, loss=recipe.loss), recipe, run)
    if vae.quant_conv is not None:
        _standardise(vae, data.images, rows[0], job, run.precision.device)


def _standardise(vae: Any, images: np.ndarray, rows: np.ndarray, job: Job, device: torch.device) -> None:
    """Latents of zero mean and unit variance in every channel: the noise schedule assumes it, and trained autoencoders have
    channels that differ several times. All processes take the main one's figures."""
    statistics = torch.zeros(2, vae.config.latent_channels, device=device)
    if job.processes.is_main:
        statistics = latent_statistics(vae, images, rows, device)
    standardise(vae, *job.processes.sum(statistics))


def _fit_text_encoder(encoder: Any, tokenizer: Any, preset: Preset, data: Examples, job: Job) -> None:
    if network_of(preset.text_encoder).path is not None:
        return
    recipe = recipe_of(preset.text_encoder, "text_encoder")
    run = job.run("text_encoder", recipe.precision)
    texts, choices = data.captions
    ids = tokenize(tokenizer, texts, min(tokenizer.model_max_length, encoder.config.max_position_embeddings))
    rows = data.rows(recipe)
    fit(ContrastiveTask(encoder, ids, choices, data.subjects, data.images, rows, run.precision.device), recipe, run)


def _train_unet(
    plan: ModelPlan,
    space: Space,
    conditions: ConditionSource,
    extra: PresetConditions | None,
    preset: Preset,
    data: Examples,
    job: Job,
) -> None:
    """Train the model's UNet with its conditioner, and save the model."""
    model = plan.model
    job.outline(lambda folder: save_model(model, folder, trained=False))
    recipe = recipe_of(preset.unet, "unet")
    run = job.run("unet", recipe.precision)
    rows = data.rows(recipe)
    examples = preview_rows(rows[1])
    process, captions = (preset.scheduler, preset.sampling, run.precision), data.captions_of(examples)
    preview = sampled_preview(space, conditions, examples, captions, *process, extra)
    task = DiffusionTask(
        model.denoiser(),
        space,
        conditions,
        preset.scheduler,
        rows,
        dropout=recipe.condition_dropout,
        flip=recipe.flip,
        jitter=recipe.color_jitter,
        timestep_shift=recipe.timestep_shift,
        objective=plan.objective,
        preview=preview,
    )
    fit(task, recipe, run)
    for network in (model.unet, model.conditioner, *model.text_encoders, model.vae):
        if network is not None:
            network.cpu()
    job.finish(lambda folder: save_model(model, folder, record(preset, data, job, plan.pretrained)))
