"""What lies in a model folder: which folder holds which network, and what beside them cannot be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, read_json
from fastgen.files.records import Name, Record, to_record
from fastgen.models.pipelines import RUN

INDEX = "model_index.json"
DENOISERS = ("UNet2DConditionModel", "UNet2DModel", "DiTTransformer2DModel", "PatchUNet", "BroadcastUNet")
# What diffusers called DiT before, with norm_type "ada_norm_zero"; and its class now.
LEGACY = ("Transformer2DModel", "DiTTransformer2DModel")
SETTINGS = "fastgen.json"  # generation defaults and training record, beside model_index.json
AUTOENCODERS = ("AutoencoderKL", "AutoencoderTiny", "VQModel")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel")
EMA = "unet_ema"
# Components of a pipeline, in the places where pipelines of diffusers have them.
DENOISER_FOLDERS, VAE_FOLDERS = ("unet", "transformer"), ("vae", "vqvae", "movq")
PROMPT = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
# Not run: a safety checker looks at finished pictures, the others serve it, or image prompts, which requests cannot hold.
BESIDE = ("safety_checker", "feature_extractor", "image_encoder", "watermark")
KNOWN = (*DENOISER_FOLDERS, *VAE_FOLDERS, *PROMPT, *PROMPT.values(), *BESIDE, "scheduler", "conditioner")
# Files beside the folders that change what the model draws.
ADDITIONS = {
    "*lora*.safetensors": "LoRA weights: fuse them with --lora {file}[:SCALE], or leave them out with --lora none",
    "*lora*.bin": "LoRA weights in a pickle: convert them to safetensors, then --lora FILE[:SCALE]",
    "adapter_model*": "LoRA weights of PEFT: fuse them with --lora {file}[:SCALE], or leave them out with --lora none",
    "unet/*lora*": "LoRA weights: fuse them with --lora {file}[:SCALE], or leave them out with --lora none",
    "ip-adapter*": "an IP-Adapter (image prompts), which fastgen does not run; move it away to use the model without it",
    "ip_adapter*": "an IP-Adapter (image prompts), which fastgen does not run; move it away to use the model without it",
    "learned_embeds*": "a textual inversion: load it with diffusers and save the pipeline, or move it away",
}


# [library, class]; [null, null] for a component that the pipeline may have and this one has not.
Component = Annotated[tuple[Name | None, ...], Meta(min_length=2, max_length=2)]


class Index(Record, frozen=True, forbid_unknown_fields=False):
    """What fastgen reads of model_index.json besides its components."""

    _class_name: Name | None = None
    _diffusers_version: Name | None = None
    force_zeros_for_empty_prompt: bool = True
    id2label: Mapping[str, Name] | None = None


@dataclass(frozen=True)
class Layout:
    """The folders of a model's networks by their names. `pipeline`: the class that model_index.json names. `label`: "ema" for
    averaged weights of unet_ema/."""

    denoiser: str
    denoiser_class: str
    vae: str | None = None
    text_encoders: Mapping[str, str] = field(default_factory=dict)  # folder of an encoder -> of its tokenizer
    conditioner: bool = False
    pipeline: str | None = None
    zero_unconditional: bool = False
    id2label: Mapping[str, Any] | None = None
    label: str | None = None


def read_layout(folder: Path, checkpoint: str | None = None, *, has_lora: bool = False) -> Layout:
    """Read model_index.json. Raises InputError for components that fastgen does not run, and for files beside them that change
    the model. `has_lora`: the user has said which LoRA weights to fuse."""
    index = read_index(folder)
    components = [name for name, entry in index.items() if isinstance(entry, list) and entry and entry[0]]
    if foreign := [name for name in components if name not in KNOWN]:
        raise InputError(f"{folder / INDEX}: {index.get('_class_name')} has {foreign[0]}, which fastgen does not run")
    _check_additions(folder, has_lora)
    for name in (*DENOISER_FOLDERS, *VAE_FOLDERS, *PROMPT):
        if name not in components and (folder / name / "config.json").is_file():
            raise InputError(f"{folder}: {name}/ is there, but {INDEX} does not name it; name it, or move it away")
    denoiser = next((name for name in DENOISER_FOLDERS if name in components), None)
    if denoiser is None:
        raise InputError(f"{folder / INDEX}: {index.get('_class_name')} has neither {' nor '.join(DENOISER_FOLDERS)}")
    encoders = {name: tokenizer for name, tokenizer in PROMPT.items() if name in components}
    if "image_encoder" in components and not encoders:
        raise InputError(f"{folder / INDEX}: {index.get('_class_name')} is asked by images, which requests cannot hold")
    for tokenizer in encoders.values():
        if tokenizer not in components:
            raise InputError(f"{folder / INDEX}: names a text encoder, but no {tokenizer}")
    _check_scheduler(folder, index)
    average = checkpoint == "ema" and denoiser == "unet" and (folder / EMA / "config.json").is_file()
    return Layout(
        denoiser=EMA if average else denoiser,
        denoiser_class=_denoiser_class(folder, denoiser, index),
        vae=next((name for name in VAE_FOLDERS if name in components), None),
        text_encoders=encoders,
        conditioner="conditioner" in components,
        pipeline=None if index.get("_class_name") is None else str(index["_class_name"]),
        zero_unconditional=bool(index.get("force_zeros_for_empty_prompt", True)),
        id2label=index.get("id2label"),
        label="ema" if average else None,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """model_index.json. Raises InputError for a folder without one."""
    file = folder / INDEX
    if not file.is_file():
        raise InputError(f"{folder}: not a model folder ({INDEX} is missing)")
    index = read_json(file)
    to_record(index, Index, file)
    components = {key: value for key, value in index.items() if key in KNOWN}
    to_record(components, dict[str, Component | None], file)
    return index


def class_names(id2label: object, folder: Path) -> dict[str, int]:
    """The names of classes from a DiT pipeline's id2label, {"0": "tench, Tinca tinca"}: each name between commas counts.
    Of a name that occurs twice, such as crane, the last class counts, as in that pipeline."""
    if not isinstance(id2label, Mapping):
        raise InputError(f"{folder / INDEX}: id2label: found {brief(id2label)}, expected an object")
    names: dict[str, int] = {}
    for number, text in id2label.items():
        if not (number.isascii() and number.isdigit() and len(number) < 8 and isinstance(text, str)):
            raise InputError(
                f"{folder / INDEX}: id2label: found {brief({number: text})}, expected a class id and its names"
            )
        for name in text.split(","):
            names[name.strip()] = int(number)
    return names


def _denoiser_class(folder: Path, denoiser: str, index: Mapping[str, Any]) -> str:
    """The class in the network's own config.json, which diffusers writes; else the one in model_index.json."""
    file = folder / denoiser / "config.json"
    config = read_json(file, infinity=True) if file.is_file() else {}
    entry = index[denoiser]
    if not isinstance(config, dict):
        raise InputError(f"{file}: found {brief(config)}, expected an object")
    stored = config.get("_class_name")
    name = entry[1] if stored is None else stored
    if name == LEGACY[0] and config.get("norm_type") == "ada_norm_zero":
        return LEGACY[1]
    if name not in DENOISERS:
        place = f"{folder / INDEX}: {denoiser}" if stored is None else f"{file}: _class_name"
        raise InputError(f"{place}: found {brief(name)}, fastgen runs {', '.join(DENOISERS)}")
    if entry[1] not in (name, *LEGACY):
        raise InputError(f"{folder / INDEX}: {denoiser}: found {brief(entry)}, but {file.name} is of a {name}")
    return str(name)


def _check_scheduler(folder: Path, index: Mapping[str, Any]) -> None:
    """InputError where model_index.json and the scheduler's own config name different classes."""
    entry, file = index.get("scheduler"), folder / "scheduler" / "scheduler_config.json"
    named = entry[1] if isinstance(entry, list) and len(entry) > 1 else None
    config = read_json(file, infinity=True) if file.is_file() else {}
    stored = config.get("_class_name") if isinstance(config, dict) else None
    if index.get("_class_name") in RUN and named and stored and named != stored:
        raise InputError(
            f"{file}: _class_name: found {brief(stored)}, but {INDEX} names {named}; make both say the same"
        )


def _check_additions(folder: Path, has_lora: bool) -> None:
    for pattern, words in ADDITIONS.items():
        files = sorted(f for f in folder.glob(pattern) if f.is_file())
        if files and not (has_lora and words.startswith("LoRA")):
            raise InputError(f"{folder}: holds {files[0].relative_to(folder)}, {words.format(file=files[0])}")
