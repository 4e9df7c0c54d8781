"""LoRA weights, fused into a model's own: W + scale * alpha / rank * up @ down (Hu et al., LoRA, 2021)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError, first_line
from fastgen.files.hashes import sha256_file
from fastgen.files.jsonfiles import brief, parse_json
from fastgen.files.records import Factor, Name, to_record

if TYPE_CHECKING:
    from torch import Tensor, nn

# The ends of a pair's keys: those of PEFT, of older diffusers, and of kohya-ss.
DOWN = (
    ".lora_A.weight",
    ".lora_A.default.weight",
    ".lora.down.weight",
    ".lora_linear_layer.down.weight",
    ".lora_down.weight",
)
UP = tuple(end.replace("lora_A", "lora_B").replace("down", "up") for end in DOWN)
PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
ALPHA = ".alpha"
OTHERS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    ".diff": "full",
}
KOHYA = {"lora_unet_": 0, "lora_te_": 1, "lora_te1_": 1, "lora_te2_": 2}
PLAIN = {"unet.": 0, "transformer.": 0, "diffusion_model.": 0, "text_encoder.": 1, "text_encoder_2.": 2}
# Key of PEFT's settings -> its type.
SETTINGS: Mapping[str, Any] = {
    "lora_alpha": Factor | None,
    "alpha_pattern": dict[Name, Factor] | None,
    "use_rslora": bool | None,
    "use_dora": bool | None,
}
METADATA = "lora_adapter_metadata"  # where diffusers writes rank and alpha


@dataclass(frozen=True)
class Lora:
    """A safetensors file of LoRA weights, and the factor that they count with."""

    file: Path
    scale: float
    sha256: str

    @staticmethod
    def parse(text: str) -> Lora:
        """`FILE[:SCALE]`; a folder stands for pytorch_lora_weights.safetensors in it. Raises InputError."""
        path, colon, number = text.rpartition(":")
        try:
            file, scale = (Path(path), float(number)) if colon and not Path(text).exists() else (Path(text), 1.0)
        except ValueError:
            file, scale = Path(text), 1.0
        if file.is_dir():
            file = file / "pytorch_lora_weights.safetensors"
        if not file.is_file():
            raise InputError(f"--lora {text}: {file} is no file, expected FILE.safetensors[:SCALE]")
        if file.suffix != ".safetensors":
            raise InputError(f"--lora {text}: expected a .safetensors file")
        if not math.isfinite(scale):
            raise InputError(f"--lora {text}: the scale is {scale}, expected a finite number")
        return Lora(file, scale, sha256_file(file))


def parse_loras(texts: Sequence[str]) -> list[Lora] | None:
    """The values of --lora: None without any, an empty list for "none". Raises InputError."""
    if not texts:
        return None
    if "none" in texts:
        if len(texts) > 1:
            raise InputError("--lora none leaves LoRA weights out; give it alone")
        return []
    return [Lora.parse(text) for text in texts]


def fuse(lora: Lora, denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
    """Add the weights to those of the modules that they name, in place. Raises InputError for what is no LoRA, for another kind
    of it, and for modules that the model does not have: then nothing is changed."""
    from fastgen.models.tensor_files import read_safetensors

    with readable(lora.file):
        _fuse(lora, read_safetensors(lora.file), denoiser, text_encoders)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Raises InputError, in one line, for whatever tensors and metadata of wrong shapes and types bring about."""
    try:
        yield
    except (TypeError, ValueError, IndexError, RuntimeError, ZeroDivisionError, re.error) as error:
        raise InputError(
            f"{file}: cannot be read as LoRA weights ({type(error).__name__}: {first_line(error)})"
        ) from error


def _fuse(lora: Lora, state: Mapping[str, Tensor], denoiser: nn.Module, text_encoders: Sequence[nn.Module]) -> None:
    import torch

    modules = [_modules(module) for module in (denoiser, *text_encoders)]
    alphas = _alphas(lora.file)
    changes: list[tuple[Any, Tensor]] = []
    for name, (down, up) in _pairs(state, lora.file).items():
        place, module = _find(name, modules, lora.file)
        if module.weight.shape[:2] != (up.shape[0], down.shape[1]) or module.weight.shape[2:] != down.shape[2:]:
            shapes = f"{tuple(up.shape)} and {tuple(down.shape)}, the model's weight {tuple(module.weight.shape)}"
            raise InputError(f"{lora.file}: {name}: its weights are {shapes}: it was made for another model")
        rank = len(down)
        alpha = float(state[name + ALPHA]) if name + ALPHA in state else alphas.alpha(place, name, rank)
        divisor = math.sqrt(rank) if alphas.rank_stabilised(place) else rank
        product = (up.flatten(1).double() @ down.flatten(1).double()).reshape(module.weight.shape)
        changes.append((module, lora.scale * alpha / divisor * product))
    if not all(bool(torch.isfinite(change).all()) for _, change in changes):
        raise InputError(f"{lora.file}: holds NaN or infinity")
    with torch.no_grad():
        for module, change in changes:
            module.weight += change.to(module.weight.dtype)


def _pairs(state: Mapping[str, Tensor], file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module's name as the file has it -> (down, up)."""
    downs: dict[str, Tensor] = {}
    ups: dict[str, Tensor] = {}
    for key, value in state.items():
        if kind := next((kind for mark, kind in OTHERS.items() if mark in key), None):
            raise InputError(f"{file}: {key}: is of the kind {kind}; fastgen fuses LoRA")
        if key.endswith(ALPHA):
            continue
        end = next((end for end in (*DOWN, *UP) if key.endswith(end)), None)
        if match := PROCESSOR.search(key):
            name = f"{key[: match.start()]}.{match[1]}" + (".0" if match[1] == "to_out" else "")
            (downs if match[2] == "down" else ups)[name] = value.float()
        elif end:
            (downs if end in DOWN else ups)[key.removesuffix(end)] = value.float()
        else:
            raise InputError(f"{file}: {key}: is no LoRA weight that fastgen knows")
    if downs.keys() != ups.keys() or not downs:
        single = sorted(downs.keys() ^ ups.keys())
        raise InputError(f"{file}: {f'{single[0]} has one half of a pair' if single else 'holds no LoRA weights'}")
    return {name: (downs[name], ups[name]) for name in downs}


def _modules(network: nn.Module) -> dict[str, Any]:
    """Linear and convolution layers by their names, with dots and as kohya-ss writes them, with and without `text_model.`."""
    from torch import nn

    layers = {name: module for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for name, module in list(layers.items()):
        other = name.removeprefix("text_model.") if name.startswith("text_model.") else f"text_model.{name}"
        layers[other] = module
    return layers | {name.replace(".", "_"): module for name, module in layers.items()}


def _find(name: str, modules: Sequence[Mapping[str, Any]], file: Path) -> tuple[int, Any]:
    """(place of the network, the layer) that a name stands for; without a prefix it is the denoiser's."""
    prefix, place = next(((p, i) for p, i in {**KOHYA, **PLAIN}.items() if name.startswith(p)), ("", 0))
    if place >= len(modules):
        raise InputError(f"{file}: {name}: this model has no text encoder {place}")
    if (module := modules[place].get(name.removeprefix(prefix))) is None:
        raise InputError(f"{file}: {name}: the model has no such layer: it was made for another model")
    return place, module


class _Alphas:
    """PEFT's settings of each network, where the file has them."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings

    def alpha(self, place: int, name: str, rank: int) -> float:
        for pattern, value in dict(self._get(place, "alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return float(value)
        value = self._get(place, "lora_alpha")
        return float(rank if value is None else value)

    def rank_stabilised(self, place: int) -> bool:
        return bool(self._get(place, "use_rslora"))

    def _get(self, place: int, key: str) -> Any:
        prefixes = [prefix for prefix, i in PLAIN.items() if i == place]
        return next((self._settings[p + key] for p in prefixes if p + key in self._settings), None)


def _check_pattern(pattern: str, place: str) -> None:
    """InputError for what is no regular expression, or one whose search may take forever: repeated groups, many repetitions."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise InputError(f"{place}: found {brief(pattern)}, expected a regular expression: {error}") from None
    if len(pattern) > 500 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise InputError(f"{place}: found {brief(pattern)}, expected at most 4 repetitions, and none of a group")


def _alphas(file: Path) -> _Alphas:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        text = (opened.metadata() or {}).get(METADATA, "{}")
    place = f"{file}: metadata {METADATA}"
    settings = to_record(parse_json(text.encode(), place), dict[Name, Any], place)
    for key, value in settings.items():
        if (kind := SETTINGS.get(key.rpartition(".")[2])) is not None:
            to_record(value, kind, place, key)
        if key.endswith("alpha_pattern"):
            for pattern in value or {}:
                _check_pattern(pattern, f"{place}: {key}")
    if any(value and key.endswith("use_dora") for key, value in settings.items()):
        raise InputError(f"{file}: is of the kind DoRA; fastgen fuses LoRA")
    return _Alphas(settings)
