"""CLIP as a judge: embeddings of images and prompts (Radford et al., Learning Transferable Visual Models From Natural
Language Supervision, 2021), from a folder that `transformers` can read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastgen.errors import InputError, first_line
from fastgen.files.jsonfiles import read_json
from fastgen.models.loaders import pretrained, pretrained_tokenizer
from fastgen.models.weights import weights_hash
from fastgen.scoring.networks import float32_convolutions

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's models
CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
FILES = ["*.json", "*.txt", "*.safetensors"]
PROMPTS = 64  # per batch


@dataclass(frozen=True)
class Preprocessing:
    """An image -> (3, size, size): the shorter side to `shortest_edge` px, a crop of the middle, values normalised."""

    size: int
    shortest_edge: int
    resample: Image.Resampling
    mean: tuple[float, ...]
    std: tuple[float, ...]
    source: str  # where the values are from

    def __str__(self) -> str:
        method = self.resample.name.lower()
        return f"shorter side to {self.shortest_edge} px ({method}, antialiased), middle {self.size} px ({self.source})"

    def apply(self, image: Image.Image) -> np.ndarray:
        """RGB -> (3, size, size) float32."""
        width, height = image.size
        short = min(width, height)
        if short != self.shortest_edge:
            width, height = (int(self.shortest_edge * side / short) for side in (width, height))
            image = image.resize((width, height), self.resample)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        crop = np.asarray(image.crop((left, top, left + self.size, top + self.size)), np.float32)
        return ((crop / 255 - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)).transpose(2, 0, 1)


@dataclass(frozen=True)
class ClipNetwork:
    """A CLIP in eval mode. `source`: its folder or hub id, as in the options."""

    model: Any
    tokenizer: Any
    process: Preprocessing
    source: str

    name = "clip"

    @property
    def title(self) -> str:
        """The variant: source, patch, image size, widths of the image and text towers and of the common space."""
        vision, text = self.model.config.vision_config, self.model.config.text_config
        shape = f"patch {vision.patch_size}, {vision.image_size} px, widths {vision.hidden_size} and {text.hidden_size}"
        return f"{self.source}: {shape}, {self.model.config.projection_dim}-d"

    @property
    def preprocessing(self) -> str:
        return str(self.process)

    @cached_property
    def fingerprint(self) -> str:
        return weights_hash(self.model)

    @property
    def size(self) -> int:
        return self.process.size

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """(B, projection_dim) float32, not normalised."""
        pixels = torch.from_numpy(np.stack([self.process.apply(image) for image in images]))  # (B, 3, size, size)
        with torch.no_grad(), float32_convolutions():
            pooled = self.model.vision_model(pixel_values=pixels.to(self.model.device)).pooler_output
            return self.model.visual_projection(pooled).cpu().numpy()

    def text_features(self, prompts: Sequence[str]) -> np.ndarray:
        """(N, projection_dim) float32, not normalised; longer prompts are cut to the context length."""
        out = []
        for start in range(0, len(prompts), PROMPTS):
            batch = list(prompts[start : start + PROMPTS])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=self.context, return_tensors="pt")
            ids, mask = tokens.input_ids.to(self.model.device), tokens.attention_mask.to(self.model.device)
            with torch.no_grad():
                pooled = self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output
                out.append(self.model.text_projection(pooled).cpu().numpy())
        return np.concatenate(out)

    @property
    def context(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def count_truncated(self, prompts: Sequence[str]) -> int:
        """How many prompts have more tokens than the context length, start and end token included."""
        lengths = (len(ids) for ids in self.tokenizer(list(prompts), truncation=False, verbose=False).input_ids)
        return sum(length > self.context for length in lengths)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each pair of rows: (N, D), (N, D) -> (N,) float64."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.einsum("nd,nd->n", a, b) / norms


def load_clip(source: str, download: bool, allow_pickle: bool, device: torch.device) -> ClipNetwork:
    """A CLIP from a local folder, or by its hub id from the local Hugging Face cache; fetched only with `download`.

    Raises InputError for a source that is neither, another network, missing weights, and a tokenizer that does not fit.
    """
    folder = _folder(source, download, allow_pickle)
    config = _config(folder, source)
    model = _model(folder, source, allow_pickle)
    tokenizer = _tokenizer(folder, source, model)
    process = _preprocessing(folder, int(config.get("vision_config", {}).get("image_size", 224)))
    return ClipNetwork(model.to(device).eval(), tokenizer, process, source)


def _folder(source: str, download: bool, allow_pickle: bool) -> Path:
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    patterns = [*FILES, "*.bin"] if allow_pickle else FILES
    try:
        return Path(snapshot_download(source, local_files_only=not download, allow_patterns=patterns))
    except HFValidationError:
        raise InputError(f"{source}: no such folder, and no hub id; expected a CLIP") from None
    except LocalEntryNotFoundError:
        if not download:
            hint = "nothing is fetched unasked: add --download to fetch it"
            raise InputError(f"{source}: no such folder, and not in the local Hugging Face cache; {hint}") from None
        raise InputError(f"{source}: the Hugging Face hub cannot be reached") from None
    except OSError as error:  # its HTTP errors: no such repository, no permission
        raise InputError(f"{source}: cannot be fetched: {first_line(error)}") from None


def _config(folder: Path, source: str) -> Mapping[str, Any]:
    if not (folder / CONFIG).is_file():
        raise InputError(f"{source}: no CLIP folder ({CONFIG} is missing)")
    config = read_json(folder / CONFIG)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise InputError(f"{source}: {CONFIG} says model_type = {kind!r}, expected 'clip' (image and text towers)")
    return config


def _model(folder: Path, source: str, allow_pickle: bool) -> Any:
    from transformers import CLIPModel

    if not allow_pickle and not any(folder.glob("*.safetensors")):
        raise InputError(f"{source}: holds no .safetensors weights; a pickle (.bin) is read with --allow-pickle")
    options = {"use_safetensors": None if allow_pickle else True, "local_files_only": True}
    return pretrained(CLIPModel, folder, source, lambda key: True, **options)


def _tokenizer(folder: Path, source: str, model: Any) -> Any:
    tokenizer = pretrained_tokenizer(folder, source, local_files_only=True)
    text = model.config.text_config
    if len(tokenizer) > text.vocab_size:
        raise InputError(f"{source}: the tokenizer has {len(tokenizer)} tokens, the text tower {text.vocab_size}")
    if text.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: in old configurations, which take the highest id
        mismatch = (
            f"the tokenizer ends a text with {tokenizer.eos_token_id}, the text tower looks for {text.eos_token_id}"
        )
        raise InputError(f"{source}: {mismatch}")
    return tokenizer


def _preprocessing(folder: Path, image_size: int) -> Preprocessing:
    """The values of preprocessor_config.json (or the one inside processor_config.json), else those of OpenAI's models."""
    values: Any = {}
    name = next((name for name in (PREPROCESSOR, PROCESSOR) if (folder / name).is_file()), None)
    if name:
        values = read_json(folder / name)
        values = values.get("image_processor", {}) if name == PROCESSOR else values
    size, crop = values.get("size", image_size), values.get("crop_size", image_size)
    edge = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
    side = crop if isinstance(crop, int) else crop.get("height")
    if side != image_size or not edge or edge < side:
        sizes = f"size {size}, crop_size {crop}"
        raise InputError(f"{folder / str(name)}: found {sizes}, expected images of {image_size} px for this CLIP")
    mean, std = (tuple(values.get(key, default)) for key, default in (("image_mean", MEAN), ("image_std", STD)))
    method = Image.Resampling(values.get("resample", Image.Resampling.BICUBIC))
    return Preprocessing(side, edge, method, mean, std, name or "CLIP's defaults")
