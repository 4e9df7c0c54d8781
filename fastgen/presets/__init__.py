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
from fastgen.files.records import to_record
from fastgen.presets.recipe import Training, check, choice
from fastgen.sampling.defaults import Sampling

IMAGE_MODES = ("stretch", "pad", "crop", "figure")
OPTIONAL = ("loss", "loss_from_epoch", "preview", "sampling", "config")  # tables that a preset may leave out
CONDITIONERS = ("class_embed", "concat", "broadcast", "tokens")
EMBEDS = ("linear", "identity", "embedding", "tokens", "words")
CONDITIONER_KEYS = ("kind", "dim", "hidden", "embed")
FAMILIES = {
    "text": "text_encoder",
    "labels": "conditioner",
    "evaluator": "evaluator",
}  # an older key -> the table it meant
NETWORKS = ("unet", "text_encoder", "vae", "evaluator")


@dataclass(frozen=True)
class NetworkPreset:
    """A network: either frozen, from `path` (a local diffusers/transformers folder or a hub id), or of its class's keyword
    arguments in `config` (an evaluator needs none), trained by the recipe in `train`."""

    config: Mapping[str, Any] = field(default_factory=dict)
    path: str | None = None
    subfolder: str | None = None
    train: Training | None = None

    def __post_init__(self) -> None:
        trained, value = bool(self.config or self.train), self.path or dict(self.config)
        check(trained != bool(self.path), "network", value, "either a path (frozen) or a config with its train table")


@dataclass(frozen=True)
class Preset:
    """A system that `fastgen train` builds from a data folder: an evaluator, or a diffusion model.

    The tables say what it is: with [text_encoder] it is conditioned on text, with [conditioner] on labels or a class, with
    neither on nothing; with [vae] it works on latents, else on pixels.
    """

    name: str
    image_size: int
    image_mode: str
    unet: NetworkPreset | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)  # diffusers config: the noise schedule trained on
    sampling: Sampling = field(default_factory=Sampling)
    text_encoder: NetworkPreset | None = None
    vae: NetworkPreset | None = None
    conditioner: Mapping[str, Any] | None = (
        None  # {"kind": one of CONDITIONERS, "dim": int, "hidden": int, "embed": one of EMBEDS}
    )
    evaluator: NetworkPreset | None = None
    preview: Mapping[str, Any] = field(default_factory=dict)  # {"prompts": [...]} or {"labels": [[...], ...]}

    def __post_init__(self) -> None:
        choice("image_mode", self.image_mode, IMAGE_MODES)
        check(8 <= self.image_size <= 4096, "image_size", self.image_size, "8 to 4096 px")
        self._check_tables()
        for name in NETWORKS:
            part: NetworkPreset | None = getattr(self, name)
            if part is not None and part.path is None:
                check(part.train is not None, f"{name}.train", None, "a table: the network is trained here")
        if self.conditioner is not None:
            _check_conditioner(self.conditioner)
        if self.evaluator is not None:
            _check_evaluator(self.evaluator.config)
        if self.preview:
            key = {"text": "prompts", "labels": "labels"}.get(self.kind) if self.evaluator is None else None
            expected = f"a list of {key}" if key else "none: such a preset has no conditions to preview"
            check(list(self.preview) == [key], "preview", dict(self.preview), expected)

    @property
    def kind(self) -> str:
        """What its data hold: "text", "labels", or "nothing" for images alone."""
        if self.evaluator is not None or self.conditioner is not None:
            return "labels"
        return "text" if self.text_encoder is not None else "nothing"

    @property
    def described(self) -> str:
        """`text -> latents`"""
        return "evaluator" if self.evaluator else f"{self.kind} -> {'latents' if self.vae else 'pixels'}"

    def _check_tables(self) -> None:
        tables = {name for name in (*NETWORKS, "conditioner", "scheduler") if getattr(self, name)}
        if self.evaluator is not None:
            check(tables == {"evaluator"}, "tables of an evaluator", sorted(tables), "exactly [evaluator]")
            return
        missing = {"unet", "scheduler"} - tables
        check(not missing, "tables", sorted(tables), "[unet] and [scheduler] at least, or [evaluator] alone")
        both = {"text_encoder", "conditioner"} <= tables
        check(not both, "tables", sorted(tables), "[text_encoder] for text, or [conditioner] for labels, not both")


def _check_conditioner(table: Mapping[str, Any]) -> None:
    for key in table:
        if key not in CONDITIONER_KEYS:
            raise unknown("key", f"conditioner.{key}", [f"conditioner.{name}" for name in CONDITIONER_KEYS])
    choice("conditioner.kind", str(table.get("kind")), CONDITIONERS)
    choice("conditioner.embed", str(table.get("embed", EMBEDS[0])), EMBEDS)
    for key, low in (("dim", 1), ("hidden", 0)):
        value = table.get(key, low)
        check(type(value) is int and value >= low, f"conditioner.{key}", value, f"a whole number, at least {low}")


def _check_evaluator(table: Mapping[str, Any]) -> None:
    for key in table:
        if key != "width":
            raise unknown("key", f"evaluator.config.{key}", ["evaluator.config.width"])
    value = table.get("width", 64)
    check(type(value) is int and 1 <= value <= 256, "evaluator.config.width", value, "a whole number, 1 to 256")


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


def _parse(name: str, text: str, where: str, overrides: Sequence[str]) -> Preset:
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{where}: not valid TOML: {error}") from None
    try:
        _drop_family(table)
        _apply(table, overrides)
        values = {"name": name, "image_mode": "stretch", **table}
        for key in NETWORKS:
            if key in values:
                values[key] = _network(values[key], key)
        values["sampling"] = to_record(values.get("sampling", {}), Sampling, field="sampling")
        return _build(Preset, values, "")
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _drop_family(table: dict[str, Any]) -> None:
    """Presets once named a family, which the tables say. InputError where the two differ."""
    if "family" in table:
        family = str(table.pop("family"))
        choice("family", family, tuple(FAMILIES))
        needed = FAMILIES[family]
        check(
            needed in table,
            f"family {family!r}",
            sorted(k for k, v in table.items() if isinstance(v, dict)),
            f"[{needed}]",
        )


def _apply(table: dict[str, Any], overrides: Sequence[str]) -> None:
    for override_text in overrides:
        dotted, equals, text = override_text.partition("=")
        *parents, key = dotted.strip().split(".")
        check(bool(equals and key), "override", override_text, "KEY=VALUE, such as unet.train.steps=300")
        inner = table
        for depth, parent in enumerate(parents):
            if parent in OPTIONAL:
                inner.setdefault(parent, {})
            if not isinstance(inner.get(parent), dict):
                tables = [name for name, value in inner.items() if isinstance(value, dict)]
                choices = [".".join([*parents[:depth], name]) for name in tables]
                raise unknown("table", ".".join(parents[: depth + 1]), choices)
            inner = inner[parent]
        if parents[-1:] == ["train"] and key in ("steps", "epochs"):  # one of the two says how long
            inner.pop("epochs" if key == "steps" else "steps", None)
        inner[key] = _toml_value(text.strip(), dotted.strip())


def _toml_value(text: str, where: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        check(re.fullmatch(r"[\w./~:+-]+", text) is not None, where, text, "a TOML value, such as 300 or [1, 2]")
        return text


def _network(table: Any, where: str) -> NetworkPreset:
    check(isinstance(table, Mapping), where, table, "a table")
    values = dict(table)
    if "train" in values:
        values["train"] = _build(Training, values["train"], f"{where}.train")
    return _build(NetworkPreset, values, where)


def _build(cls: type[Any], values: Mapping[str, Any], where: str) -> Any:
    """cls(**values), with unknown, missing and mistyped keys as one-line errors."""
    check(isinstance(values, Mapping), where, values, "a table")
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
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "bool | str": (bool, str),
        "str": (str,),
    }
    kind = str(spec.type).removesuffix(" | None")
    if kind in kinds:
        right = isinstance(value, kinds[kind]) and (bool in kinds[kind] or not isinstance(value, bool))
        check(right, where, value, f"a value of type {kind}")
    elif kind.startswith("tuple"):
        check(isinstance(value, list) and all(map(_is_number, value)), where, value, "a list of numbers")
        return tuple(value)
    elif kind == "Mapping[str, float]":
        right = isinstance(value, Mapping) and all(map(_is_number, value.values()))
        check(right, where, value, "a table of numbers")
    elif kind.startswith("Mapping"):
        check(isinstance(value, Mapping), where, value, "a table")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
