"""Model folders (diffusers layout, safetensors) <-> PyTorch modules.

This is the one module of generation that needs torch, diffusers and transformers: bundles do not.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fastgen.errors import InputError
from fastgen.files.hashes import sha256_file, sha256_names
from fastgen.files.jsonfiles import brief, read_json, write_json
from fastgen.files.names import read_objects
from fastgen.models.checkpoint_choice import RunWeights, choose_checkpoint, model_parts
from fastgen.models.networks.labels import (
    LabelConditioner,
    LabelUNet,
    class_record,
    label_unet_class,
    load_conditioner,
    save_conditioner,
)
from fastgen.models.networks.text import TextEncoder, TextUNet, VaeDecoder, VaeEncoder
from fastgen.models.signatures import Signature, label_signatures, text_signatures
from fastgen.models.spec import Spec
from fastgen.models.tokenizer import Tokenizer
from fastgen.models.weights import load_state, pretrained, pretrained_tokenizer, quiet_transformers
from fastgen.sampling.compile import TableCompiler
from fastgen.sampling.defaults import Sampling
from fastgen.sampling.schedulers import default_name
from fastgen.sampling.tables import SolverTable

COMPONENTS = ("text_encoder", "vae")  # the spec has a hash of each: an index depends on them, not on the UNet
WEIGHTS = ("unet", "conditioner", *COMPONENTS)  # folders whose weights identify a model
SETTINGS = "fastgen.json"  # generation defaults and training record, beside model_index.json


@dataclass
class Model:
    """A model folder in memory, in eval mode."""

    folder: Path | None
    family: str  # "text" | "labels"
    unet: nn.Module
    scheduler_config: dict[str, Any]
    sampling: Sampling
    conditioner: LabelConditioner | None = None
    objects: dict[str, int] | None = None  # label family: object name -> index
    text_encoder: nn.Module | None = None
    tokenizer: Any = None  # transformers' CLIPTokenizer
    vae: nn.Module | None = None
    run_weights: RunWeights | None = None  # of the UNet and the conditioner, where they come from a checkpoint

    def networks(self) -> dict[str, nn.Module]:
        """The modules under the names and interfaces of `signatures`."""
        if self.family == "labels":
            assert self.conditioner is not None
            return {"unet": LabelUNet(self.unet, self.conditioner).eval()}
        assert self.text_encoder is not None
        assert self.vae is not None
        return {
            "text_encoder": TextEncoder(self.text_encoder).eval(),
            "unet": TextUNet(self.unet).eval(),
            "vae_decoder": VaeDecoder(self.vae).eval(),
            "vae_encoder": VaeEncoder(self.vae).eval(),
        }

    def signatures(self) -> dict[str, Signature]:
        config: Any = self.unet.config
        size = config.sample_size
        if self.family == "labels":
            assert self.objects is not None
            return label_signatures(channels=config.out_channels, image_size=size, num_labels=len(self.objects))
        text: Any = self.text_encoder.config  # type: ignore[union-attr]
        vae: Any = self.vae.config  # type: ignore[union-attr]
        return text_signatures(
            latents=(config.in_channels, size, size),
            image_size=size * 2 ** (len(vae.block_out_channels) - 1),
            tokens=text.max_position_embeddings,
            width=text.hidden_size,
            pooled=text.hidden_size,
            vocabulary=text.vocab_size,
        )

    @cached_property
    def spec(self) -> Spec:
        """Raises InputError for a model that was never saved: it has no files to hash."""
        if self.folder is None:
            raise InputError("this model lives in memory only; save it with save_model and load the folder")
        identifying = WEIGHTS if self.run_weights is None else COMPONENTS
        weights = sorted(f for f in self.folder.glob("*/*.safetensors") if f.parent.name in identifying)
        hashes = {f.relative_to(self.folder).as_posix(): sha256_file(f) for f in weights}
        parts = {c: {n: h for n, h in hashes.items() if n.startswith(f"{c}/")} for c in COMPONENTS}
        if self.run_weights is not None:
            hashes["unet"] = self.run_weights.sha256
        return Spec(
            family=self.family,
            signatures=self.signatures(),
            sampling=self.sampling,
            scheduler_config=self.scheduler_config,
            scaling_factor=self.scaling_factor,
            objects=self.objects,
            sha256=sha256_names(hashes),
            checkpoint=None if self.run_weights is None else self.run_weights.label,
            image_mode=_trained_mode(self.folder),
            component_sha256={component: sha256_names(part) for component, part in parts.items() if part},
        )

    def prompt_tokenizer(self) -> Tokenizer:
        backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        length = int(self.signatures()["text_encoder"].inputs[0].shape[1])
        return Tokenizer(backend, self.tokenizer.pad_token, length)

    def table(self, key: str) -> SolverTable:
        """The solver table `NAME:STEPS[:NOISE_STEPS]` of this model's noise schedule, compiled now."""
        return TableCompiler(self.scheduler_config).table(key)

    @property
    def scaling_factor(self) -> float:
        """Latents = VAE latents x this (1 in the label family, whose space is pixels)."""
        return 1.0 if self.vae is None else float(self.vae.config.scaling_factor)  # type: ignore[union-attr, arg-type]


def save_model(model: Model, folder: Path, record: Mapping[str, Any] | None = None, *, trained: bool = True) -> None:
    """Write the model folder (diffusers layout; StableDiffusionPipeline.from_pretrained loads the text family).

    `record`, how the model was trained, goes into fastgen.json. `trained`: False leaves out the weights of the UNet and the
    conditioner, which an unfinished run has in its checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _save_module(model.unet, folder / "unet", trained)
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler_config, infinity=True)
    index: dict[str, Any] = {"scheduler": ["diffusers", model.scheduler_config["_class_name"]]}
    if model.family == "labels":
        assert model.conditioner is not None
        save_conditioner(model.conditioner, folder / "conditioner", trained)
        write_json(folder / "labels.json", model.objects)
        index |= {"_class_name": "LabelDiffusion", "unet": class_record(model.unet)}
        index |= {"conditioner": class_record(model.conditioner)}
    else:
        assert model.vae is not None
        assert model.text_encoder is not None
        _save_module(model.vae, folder / "vae", True)
        save_text_encoder(model.text_encoder, model.tokenizer, folder)
        index |= {
            "_class_name": "StableDiffusionPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "safety_checker": [None, None],
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
        }
    write_json(folder / SETTINGS, {"sampling": asdict(model.sampling), "training": dict(record or {})})
    write_json(folder / "model_index.json", index)


def _save_module(module: Any, folder: Path, weights: bool) -> None:
    if weights:
        module.save_pretrained(folder, safe_serialization=True)
    else:
        module.save_config(folder)


def save_text_encoder(text_encoder: Any, tokenizer: Any, folder: Path) -> None:
    """Write text_encoder/ and tokenizer/ in the layout that transformers 4 and 5 both read: `text_model.*` weight keys (version
    5 writes no prefix, and version 4 then keeps random weights silently), vocab.json and merges.txt beside tokenizer.json."""
    from safetensors.torch import save_file

    text_encoder.save_pretrained(folder / "text_encoder", safe_serialization=True)
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in text_encoder.state_dict().items()}
    state = {k: v.contiguous() for k, v in state.items() if not k.endswith("position_ids")}
    save_file(state, folder / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder / "tokenizer")
    bpe = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    write_json(folder / "tokenizer" / "vocab.json", bpe["vocab"])
    lines = "\n".join(["#version: 0.2", *merges, ""])
    (folder / "tokenizer" / "merges.txt").write_text(lines, encoding="utf-8")


def load_model(folder: str | os.PathLike[str], checkpoint: str | None = None) -> Model:
    """Load a model folder onto the CPU in float32, in eval mode.

    `checkpoint`: which of a training run's weights, see `checkpoint_choice.choose_checkpoint`; the run need not be finished.
    Raises InputError when the folder is not one, a component is missing, or a weight does not match its architecture.
    """
    run_weights = choose_checkpoint(Path(folder), checkpoint) if checkpoint else None
    folder = model_parts(Path(folder), checkpoint)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise InputError(f"{folder}: not a model folder (model_index.json is missing)")
    index = _table(index_file)
    scheduler_config = _table(folder / "scheduler" / "scheduler_config.json")
    sampling = _sampling(folder, scheduler_config)
    if "conditioner" in index:
        return _load_labels(folder, index, scheduler_config, sampling, run_weights)
    if "text_encoder" in index and "vae" in index:
        return _load_text(folder, scheduler_config, sampling, run_weights)
    kind = index.get("_class_name")
    raise InputError(f"{index_file}: {kind} is neither a text-to-latent model nor a labels-to-pixels model")


def _table(file: Path) -> dict[str, Any]:
    value = read_json(file, infinity=True)
    if not isinstance(value, dict):
        raise InputError(f"{file}: found {brief(value)}, expected an object")
    return value


def _trained_mode(folder: Path) -> str | None:
    """The preset's image_mode: from the record in fastgen.json, or, before training is finished, from training.json."""
    for file, table in ((folder / SETTINGS, "training"), (folder / "training.json", "preset")):
        record = _table(file).get(table) if file.is_file() else None
        if isinstance(record, dict) and isinstance(record.get("image_mode"), str):
            return str(record["image_mode"])
    return None


def _sampling(folder: Path, scheduler_config: Mapping[str, Any]) -> Sampling:
    if (folder / SETTINGS).is_file():
        try:
            return Sampling(**read_json(folder / SETTINGS)["sampling"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / SETTINGS}: sampling: malformed ({type(error).__name__}: {error})") from None
    guidance = 1.0 if (folder / "conditioner").is_dir() else 7.5
    return Sampling(default_name(scheduler_config), 50, guidance)


def _load_labels(
    folder: Path,
    index: Mapping[str, Any],
    scheduler_config: dict[str, Any],
    sampling: Sampling,
    run_weights: RunWeights | None,
) -> Model:
    try:
        cls = label_unet_class(str(index["unet"][1]))
    except (KeyError, IndexError, TypeError, InputError) as error:
        raise InputError(f"{folder / 'model_index.json'}: unet: {error}") from None
    unet = _unet(cls, folder / "unet", run_weights)
    weights = None if run_weights is None else run_weights.weights("conditioner")
    conditioner = load_conditioner(folder / "conditioner", weights).eval()
    objects = read_objects(folder / "labels.json")
    return Model(folder, "labels", unet, scheduler_config, sampling, conditioner, objects, run_weights=run_weights)


def _load_text(
    folder: Path, scheduler_config: dict[str, Any], sampling: Sampling, run_weights: RunWeights | None
) -> Model:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    with quiet_transformers():
        return Model(
            folder,
            "text",
            _unet(UNet2DConditionModel, folder / "unet", run_weights),
            scheduler_config,
            sampling,
            text_encoder=_pretrained(CLIPTextModel, folder / "text_encoder"),
            tokenizer=pretrained_tokenizer(folder / "tokenizer", str(folder / "tokenizer"), local_files_only=True),
            vae=_pretrained(AutoencoderKL, folder / "vae"),
            run_weights=run_weights,
        )


def _unet(cls: Any, folder: Path, run_weights: RunWeights | None) -> Any:
    if run_weights is None:
        return _pretrained(cls, folder)
    unet = cls.from_config(cls.load_config(folder))
    load_state(unet, run_weights.weights("unet"), run_weights.checkpoint.folder, f"the {cls.__name__} of {folder}")
    return unet.eval()


def _pretrained(cls: Any, folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: config.json is missing, expected a saved {cls.__name__}")
    return pretrained(cls, folder, str(folder), local_files_only=True)
