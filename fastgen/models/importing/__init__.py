"""`fastgen import`: checkpoints of other code -> model folders, each compared with its source by a forward pass."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastgen.errors import FastgenError, InputError
from fastgen.files.folders import new_folder
from fastgen.files.hashes import sha256_file
from fastgen.models.folder import Model, load_model
from fastgen.models.importing.architecture import Architecture, decide
from fastgen.models.importing.assembly import ImportOptions, Reference, assemble
from fastgen.models.importing.schedule import choose_schedule, describe
from fastgen.models.importing.split import MismatchError
from fastgen.models.importing.weight_files import WeightFile, read_checkpoint
from fastgen.models.loaders import boundary
from fastgen.models.saving import save_model
from fastgen.presets import Preset, load_preset
from fastgen.sampling.defaults import Sampling
from fastgen.sampling.schedulers import default_name

__all__ = ["ImportReport", "MismatchError", "import_model"]

TOLERANCE = 1e-5  # relative to the largest output; 0 unless --condition-first changes the order of a convolution's sum


@dataclass(frozen=True)
class ImportReport:
    """The new model folder. `difference`: the largest between the outputs of its UNet and the source's on the same inputs."""

    folder: Path
    described: str  # such as "labels -> pixels"
    architecture: str
    parameters: int  # of the UNet and its conditioner, where it has one
    schedule: str
    sampling: Sampling
    notes: tuple[str, ...]
    difference: float

    def lines(self) -> list[str]:
        """What `fastgen import` prints."""
        s = self.sampling
        return [
            f"{self.described}: {self.architecture}, {self.parameters / 1e6:.1f} M parameters",
            f"noise schedule: {self.schedule}",
            f"sampling unless told otherwise: {s.scheduler}, {s.num_inference_steps} steps, guidance {s.guidance_scale:g}",
            *(f"note: {note}" for note in self.notes),
            "checked: read back, its largest difference from the source network, called as the notes say, is "
            f"{self.difference:.3g}",
            f"model: {self.folder}",
        ]


def import_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    preset: str | os.PathLike[str] | None = None,
    key: str | None = None,
    schedule: str | None = None,
    num_train_timesteps: int | None = None,
    prediction_type: str | None = None,
    allow_pickle: bool = False,
    objects: str | os.PathLike[str] | None = None,
    **options: Any,
) -> ImportReport:
    """Make a model folder of a denoiser that diffusers or plain torch code saved.

    `source`: a folder (config.json and weights), a .safetensors file, or a PyTorch pickle (with `allow_pickle`; `key` names the
    state dict or the UNet in it). `preset`: a name or TOML file that says the architecture (needed without config.json), and
    where not given here also the noise schedule, text encoder and VAE. `schedule`: see `importing.schedule.choose_schedule`.
    `text_encoder` and `vae`: `PATH_OR_ID[:SUBFOLDER]`, of a model of text and of latents; ids are looked for on this machine
    unless `download`; `vae` "none" says that the model works on pixels. `objects`: names of the labels (by default i-CLEVR's
    24) or classes. `conditioner`: `FILE[:KEY]` with the layer on the labels, where the source lacks it; `embed` "linear",
    "embedding" (class ids) or "identity", where weights do not tell; `condition_first` if its code concatenated the labels
    before the image; `unconditional` if it has no condition; `null_class`: the class id that its training used for no class.

    Raises InputError for whatever is missing, not named or does not fit, MismatchError (an InputError) key by key where weights
    do not; FastgenError when the folder, read back, computes something else than the source. Nothing is written then.
    """
    with boundary(source):
        return _import(
            Path(source),
            Path(out),
            preset,
            key,
            ImportOptions(objects=None if objects is None else Path(objects), allow_pickle=allow_pickle, **options),
            {"schedule": schedule, "num_train_timesteps": num_train_timesteps, "prediction_type": prediction_type},
        )


def _import(
    path: Path,
    folder: Path,
    preset: str | os.PathLike[str] | None,
    key: str | None,
    chosen: ImportOptions,
    named: Mapping[str, Any],
) -> ImportReport:
    """`import_model`. `named`: what the user says of the noise schedule, see `choose_schedule`."""
    if os.path.lexists(folder):
        raise InputError(f"{folder}: exists already; choose another --out")
    as_preset = load_preset(preset if isinstance(preset, str) else Path(preset)) if preset is not None else None
    checkpoint = read_checkpoint(path, key=key, allow_pickle=chosen.allow_pickle)
    architecture = decide(checkpoint.config, as_preset, path)
    scheduler_config = choose_schedule(
        named["schedule"],
        as_preset.scheduler if as_preset else None,
        latents=bool(chosen.vae not in (None, "none") or (as_preset and as_preset.vae)),
        num_train_timesteps=named["num_train_timesteps"],
        prediction_type=named["prediction_type"],
    )
    assembly = assemble(checkpoint, architecture, as_preset, scheduler_config, chosen)
    assembly.model.sampling = _sampling(as_preset, scheduler_config, assembly.model)
    notes = [*checkpoint.notes, *assembly.notes]
    if named["schedule"] is None and as_preset is not None:
        notes.append(f"noise schedule as preset {as_preset.name} says")
    assembly.model.signatures()  # raises for what does not fit together
    with new_folder(folder) as temporary:
        save_model(assembly.model, temporary, _record(checkpoint, architecture, as_preset, notes))
        difference = _difference(load_model(temporary), assembly.model, assembly.reference)
    return _report(assembly.model, folder, architecture, notes, difference)


def _sampling(preset: Preset | None, scheduler_config: dict[str, Any], model: Model) -> Sampling:
    """The preset's defaults; else what the noise schedule's own class does in 50 steps. Raises InputError if that fails."""
    from fastgen.sampling.compile import TableCompiler

    guidance = 7.5 if model.condition.text is not None else 1.0
    sampling = preset.sampling if preset else Sampling(default_name(scheduler_config), 50, guidance)
    TableCompiler(scheduler_config).table(f"{sampling.scheduler}:{sampling.num_inference_steps}")
    return sampling


def _record(
    checkpoint: WeightFile, architecture: Architecture, preset: Preset | None, notes: list[str]
) -> dict[str, Any]:
    """Where the model came from, for whoever finds its folder."""
    return {
        "imported": {
            "source": checkpoint.path.name,
            "sha256": {file.name: sha256_file(file) for file in checkpoint.files},
            "architecture": architecture.where,
            "preset": preset.name if preset else None,
            "notes": notes,
        }
    }


@torch.no_grad()
def _difference(loaded: Model, model: Model, reference: Reference) -> float:
    """The largest difference between the denoisers' outputs, (2, C, h, w); the other networks' weights must be equal."""
    arrays = loaded.signatures()["unet"].sample_inputs(2, np.random.default_rng(0)).values()
    inputs = [torch.from_numpy(x) for x in arrays]
    expected = reference(*inputs)
    difference = float((loaded.networks()["unet"](*inputs) - expected).abs().max())
    if not difference <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise FastgenError(f"the imported UNet differs from its source by {difference:.3g}; nothing was written")
    pairs: list[tuple[str, Any, Any]] = [("vae", loaded.vae, model.vae)]
    encoders = zip(loaded.text_encoders, model.text_encoders, strict=True)
    pairs += [("text_encoder", read, network) for read, network in encoders]
    for name, read, network in pairs:
        if network is not None and read is not None:
            state = read.state_dict()
            if not all(torch.equal(value, state[k]) for k, value in network.state_dict().items()):
                raise FastgenError(f"{name}: read back, its weights differ; nothing was written")
    return difference


def _report(
    model: Model, folder: Path, architecture: Architecture, notes: list[str], difference: float
) -> ImportReport:
    modules = [module for module in (model.unet, model.conditioner) if module is not None]
    return ImportReport(
        folder,
        f"{model.condition.kind} -> {'latents' if model.space.latent else 'pixels'}",
        f"{architecture.class_name}, {model.space.size}",
        sum(p.numel() for module in modules for p in module.parameters()),
        describe(model.scheduler_config),
        model.sampling,
        tuple(notes),
        difference,
    )
