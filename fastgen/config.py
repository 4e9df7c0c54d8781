"""Presets: one TOML file describes a whole system (networks, noise schedule, training, sampling), checked when read."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from fastgen.errors import InputError, unknown

FAMILIES = ("text", "labels", "evaluator")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
OPTIMIZERS = ("adamw", "muon")
LR_SCHEDULES = ("constant", "cosine")
IMAGE_MODES = ("stretch", "pad", "crop")
COUNTS = (
    "steps",
    "batch_size",
    "accumulation",
    "checkpoint_every",
    "checkpoint_limit",
    "validate_every",
    "validation_limit",
)
CONDITIONERS = ("class_embed", "concat")
CONDITIONER_KEYS = ("kind", "dim", "hidden")
NEEDED = {
    "text": ("text_encoder", "vae", "unet", "scheduler"),
    "labels": ("conditioner", "unet", "scheduler"),
    "evaluator": ("evaluator",),
}
NETWORKS = ("unet", "text_encoder", "vae", "evaluator")


def _check(ok: bool, field_name: str, found: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{field_name} = {found!r}: expected {expected}")


def _choice(field_name: str, found: str, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise unknown(field_name, found, choices)


@dataclass(frozen=True)
class Training:
    """How one network is trained. Steps are optimiser steps; `batch_size` is the batch of one such step."""

    steps: int
    batch_size: int = 32
    accumulation: int = 1  # the batch is run in this many micro-batches
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.01
    adam_betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"  # auto: bf16 where the hardware has it, else fp32
    condition_dropout: float = 0.1  # share of examples trained with the empty prompt or all-zero labels
    flip: bool = False
    checkpoint_every: int = 500
    checkpoint_limit: int = 2
    validate_every: int = 500
    validation_fraction: float = 0.1
    validation_limit: int = 512  # examples of one validation, always the same ones
    preview_every: int = 0  # 0: only at the end
    seed: int = 0
    loss: Mapping[str, float] = field(default_factory=dict)  # weights of the loss terms, where a task has several

    def __post_init__(self) -> None:
        for name in COUNTS:
            _check(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        for name in ("warmup_steps", "preview_every", "weight_decay", "seed"):
            _check(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        _check(
            self.batch_size % self.accumulation == 0,
            "train.accumulation",
            self.accumulation,
            f"a divisor of batch_size = {self.batch_size}",
        )
        _check(self.learning_rate > 0, "train.learning_rate", self.learning_rate, "more than 0")
        _check(0 <= self.ema_decay < 1, "train.ema_decay", self.ema_decay, "0 <= decay < 1")
        _check(0 <= self.condition_dropout <= 1, "train.condition_dropout", self.condition_dropout, "a share in [0, 1]")
        _check(
            0 < self.validation_fraction < 1, "train.validation_fraction", self.validation_fraction, "a share in (0, 1)"
        )
        _check(self.max_grad_norm > 0, "train.max_grad_norm", self.max_grad_norm, "more than 0")
        _check(
            len(self.adam_betas) == 2 and all(0 <= beta < 1 for beta in self.adam_betas),
            "train.adam_betas",
            list(self.adam_betas),
            "two numbers, 0 <= beta < 1",
        )
        _choice("train.precision", self.precision, PRECISIONS)
        _choice("train.optimizer", self.optimizer, OPTIMIZERS)
        _choice("train.lr_schedule", self.lr_schedule, LR_SCHEDULES)


@dataclass(frozen=True)
class Network:
    """A network: either `path` (a local diffusers/transformers folder or a hub id, frozen), or its class's
    own keyword arguments in `config`, trained here by the recipe in `train` (the evaluator has the recipe alone)."""

    config: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    subfolder: str | None = None
    train: Training | None = None

    def __post_init__(self) -> None:
        ours = bool(self.config or self.train)
        found = self.path or dict(self.config)
        _check(ours != bool(self.path), "network", found, "either a path (frozen) or a config with its train table")


@dataclass(frozen=True)
class Sampling:
    """What `generate` does unless told otherwise."""

    scheduler: str = "ddim"
    num_inference_steps: int = 50
    guidance_scale: float = 1.0

    def __post_init__(self) -> None:
        _check(self.num_inference_steps >= 1, "sampling.num_inference_steps", self.num_inference_steps, "at least 1")
        _check(self.guidance_scale >= 0, "sampling.guidance_scale", self.guidance_scale, "0 or more")


@dataclass(frozen=True)
class Preset:
    """A system that `fastgen train` builds from a data folder."""

    name: str
    family: str
    image_size: int
    image_mode: str
    unet: Network | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # diffusers config: the noise schedule trained on
    sampling: Sampling = field(default_factory=Sampling)
    text_encoder: Network | None = None
    vae: Network | None = None
    conditioner: Mapping[str, Any] | None = None  # {"kind": "class_embed" | "concat", "dim": int, "hidden": int}
    evaluator: Network | None = None

    def __post_init__(self) -> None:
        _choice("family", self.family, FAMILIES)
        _choice("image_mode", self.image_mode, IMAGE_MODES)
        _check(8 <= self.image_size <= 4096, "image_size", self.image_size, "8 to 4096 px")
        needed = NEEDED[self.family]
        given = {name for name in (*NETWORKS, "conditioner", "scheduler") if getattr(self, name)}
        wanted = ", ".join(f"[{name}]" for name in needed)
        _check(given == set(needed), f"tables of family {self.family!r}", sorted(given), f"exactly {wanted}")
        for name in NETWORKS:
            part: Network | None = getattr(self, name)
            if part is not None and part.path is None:
                _check(part.train is not None, f"{name}.train", None, "a table: the network is trained here")
        if self.conditioner is not None:
            _check_conditioner(self.conditioner)


def _check_conditioner(table: Mapping[str, Any]) -> None:
    for key in table:
        if key not in CONDITIONER_KEYS:
            raise unknown("key", f"conditioner.{key}", [f"conditioner.{name}" for name in CONDITIONER_KEYS])
    _choice("conditioner.kind", str(table.get("kind")), CONDITIONERS)
    for key, low in (("dim", 1), ("hidden", 0)):
        value = table.get(key, low)
        _check(type(value) is int and value >= low, f"conditioner.{key}", value, f"a whole number, at least {low}")


def preset_names() -> list[str]:
    """The presets that come with the package, sorted."""
    folder = resources.files("fastgen") / "presets"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_preset(name_or_file: str | Path, overrides: Sequence[str] = ()) -> Preset:
    """Read a preset by its name, or from a TOML file of the user's, with some keys replaced.

    `overrides` are "KEY=VALUE" with a dotted key and a TOML value, such as "unet.train.steps=300"; a bare word is a
    string. Raises InputError for an unknown name, malformed TOML (with its position), or an unknown or invalid key.
    """
    path = Path(name_or_file)
    if path.suffix == ".toml":
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as a preset: {error}") from None
        return _parse(path.stem, text, str(path), overrides)
    if str(name_or_file) not in preset_names():
        raise unknown("preset", str(name_or_file), preset_names())
    text = (resources.files("fastgen") / "presets" / f"{name_or_file}.toml").read_text(encoding="utf-8")
    return _parse(str(name_or_file), text, f"preset {name_or_file}", overrides)


def _parse(name: str, text: str, where: str, overrides: Sequence[str] = ()) -> Preset:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not valid TOML: {error}") from None
    try:
        _apply(table, overrides)
        values = {"name": name, "image_mode": "stretch", **table}
        for key in NETWORKS:
            if key in values:
                values[key] = _network(values[key], key)
        values["sampling"] = _build(Sampling, values.get("sampling", {}), "sampling")
        return _build(Preset, values, "")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _apply(table: dict[str, Any], overrides: Sequence[str]) -> None:
    for override_text in overrides:
        dotted, equals, text = override_text.partition("=")
        *parents, key = dotted.strip().split(".")
        _check(bool(equals and key), "override", override_text, "KEY=VALUE, such as unet.train.steps=300")
        inner = table
        for depth, parent in enumerate(parents):
            if not isinstance(inner.get(parent), dict):
                tables = [name for name, value in inner.items() if isinstance(value, dict)]
                raise unknown(
                    "table", ".".join(parents[: depth + 1]), [".".join([*parents[:depth], t]) for t in tables]
                )
            inner = inner[parent]
        inner[key] = _toml_value(text.strip(), dotted.strip())


def _toml_value(text: str, where: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        _check(re.fullmatch(r"[\w./~:+-]+", text) is not None, where, text, "a TOML value, such as 300 or [1, 2]")
        return text


def _network(table: Any, where: str) -> Network:
    _check(isinstance(table, Mapping), where, table, "a table")
    values = dict(table)
    if "train" in values:
        values["train"] = _build(Training, values["train"], f"{where}.train")
    return _build(Network, values, where)


def _build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """cls(**values), with unknown, missing and mistyped keys as one-line errors."""
    _check(isinstance(values, Mapping), where, values, "a table")
    fields = {f.name: f for f in dataclasses.fields(cls)}
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise unknown("key", f"{prefix}{key}", [f"{prefix}{name}" for name in fields])
    converted = {}
    for name, spec in fields.items():
        if name not in values:
            if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise InputError(f"{prefix}{name} is missing")
            continue
        converted[name] = _convert(values[name], spec, f"{prefix}{name}")
    return cls(**converted)


def _convert(value: Any, spec: dataclasses.Field[Any], where: str) -> Any:
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    kind = str(spec.type).removesuffix(" | None")
    if kind in kinds:
        right = isinstance(value, kinds[kind]) and (kind == "bool" or not isinstance(value, bool))
        _check(right, where, value, f"a value of type {kind}")
    elif kind.startswith("tuple"):
        _check(isinstance(value, list) and all(map(_is_number, value)), where, value, "a list of numbers")
        return tuple(value)
    elif kind == "Mapping[str, float]":
        right = isinstance(value, Mapping) and all(map(_is_number, value.values()))
        _check(right, where, value, "a table of numbers")
    elif kind.startswith("Mapping"):
        _check(isinstance(value, Mapping), where, value, "a table")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
