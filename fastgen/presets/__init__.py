"""Presets: one TOML file describes a whole system (networks, noise schedule, training, sampling), checked when read."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, field

from fastgen.errors import InputError, unknown
from fastgen.files.records import MAX_WIDTH, Extent, Name, Record, Width, to_record
from fastgen.files.tomlfiles import check_values, parse_toml, read_toml
from fastgen.presets.recipe import Training, check
from fastgen.sampling.config import NoiseSchedule
from fastgen.sampling.defaults import Sampling

OPTIONAL = ("loss", "loss_from_epoch", "preview", "sampling", "config")  # tables that a preset may leave out
FAMILIES = {
    "text": "text_encoder",
    "labels": "conditioner",
    "evaluator": "evaluator",
}  # an older key -> the table it meant
NETWORKS = ("unet", "text_encoder", "vae", "evaluator")

MAX_LAYERS = 512  # of a block, or of a whole network
Table = Annotated[dict[Name, Any], Meta(max_length=200)]


class ConditionerTable(Record, frozen=True):
    """How labels reach the UNet: keyword arguments of `models.networks.labels.LabelConditioner`."""

    kind: Literal["class_embed", "concat", "broadcast", "tokens"]
    dim: Width | None = None
    hidden: Extent | None = None
    embed: Literal["linear", "identity", "embedding", "tokens", "words"] | None = None


class EvaluatorTable(Record, frozen=True):
    """`width`: channels of the evaluator's first layer."""

    width: Annotated[int, Meta(ge=1, le=256)] = 64


class NetworkPreset(Record, frozen=True):
    """A network: either frozen, from `path` (a local diffusers/transformers folder or a hub id), or of its class's keyword
    arguments in `config` (an evaluator needs none), trained by the recipe in `train`."""

    config: Table = field(default_factory=dict)
    path: Name | None = None
    subfolder: Name | None = None
    train: Training | None = None

    def __post_init__(self) -> None:
        trained, value = bool(self.config or self.train), self.path or dict(self.config)
        for key, item in self.config.items():
            largest = MAX_LAYERS if "layers" in key else MAX_WIDTH
            for number in item if isinstance(item, list | tuple) else (item,):
                fits = not isinstance(number, int | float) or abs(number) <= largest
                check(fits, f"config.{key}", number, f"at most {largest}")
        check(
            trained != bool(self.path), "path, config", value, "either a path (frozen) or a config with its train table"
        )


class Preset(Record, frozen=True):
    """A system that `fastgen train` builds from a data folder: an evaluator, or a diffusion model.

    The tables say what it is: with [text_encoder] it is conditioned on text, with [conditioner] on labels or a class, with
    neither on nothing; with [vae] it works on latents, else on pixels.
    """

    name: Annotated[str, Meta(min_length=1, max_length=150)]
    image_size: Annotated[int, Meta(ge=8, le=4096)]  # px
    image_mode: Literal["stretch", "pad", "crop", "figure"] = "stretch"
    unet: NetworkPreset | None = None
    scheduler: Table = field(default_factory=dict)  # diffusers config: the noise schedule trained on
    sampling: Sampling = Sampling()
    text_encoder: NetworkPreset | None = None
    vae: NetworkPreset | None = None
    conditioner: Table | None = None  # a ConditionerTable
    evaluator: NetworkPreset | None = None
    preview: Table = field(default_factory=dict)  # {"prompts": [...]} or {"labels": [[...], ...]}

    def __post_init__(self) -> None:
        check(_is_plain(self.name), "name", self.name, "a name that a folder can have")
        self._check_tables()
        for name in NETWORKS:
            part: NetworkPreset | None = getattr(self, name)
            if part is not None and part.path is None:
                check(part.train is not None, f"{name}.train", None, "a table: the network is trained here")
        to_record(self.scheduler, NoiseSchedule, field="scheduler")
        if self.conditioner is not None:
            to_record(self.conditioner, ConditionerTable, field="conditioner")
        if self.evaluator is not None:
            to_record(self.evaluator.config, EvaluatorTable, field="evaluator.config")
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


def _is_plain(name: str) -> bool:
    return name not in (".", "..") and not re.search(r"[/\\\x00-\x1f\x7f]", name)


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
        return _preset(path.stem, read_toml(path), str(path), overrides)
    if str(name_or_file) not in preset_names():
        raise unknown("preset", str(name_or_file), preset_names())
    text = (resources.files("fastgen") / "presets" / f"{name_or_file}.toml").read_text(encoding="utf-8")
    where = f"preset {name_or_file}"
    return _preset(str(name_or_file), parse_toml(text, where), where, overrides)


def _preset(name: str, table: dict[str, Any], where: str, overrides: Sequence[str]) -> Preset:
    try:
        _drop_family(table)
        _apply(table, overrides)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return to_record({"name": name, **table}, Preset, where)


def _drop_family(table: dict[str, Any]) -> None:
    """Presets once named a family, which the tables say. InputError where the two differ."""
    if "family" in table:
        family = str(table.pop("family"))
        if family not in FAMILIES:
            raise unknown("family", family, FAMILIES)
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
        if key == "path" and parents in (["vae"], ["text_encoder"]):  # frozen, instead of what the preset trains
            inner.pop("config", None), inner.pop("train", None)
        inner[key] = _toml_value(text.strip(), dotted.strip())


def _toml_value(text: str, where: str) -> Any:
    try:
        table = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        check(re.fullmatch(r"[\w./~:+-]+", text) is not None, where, text, "a TOML value, such as 300 or [1, 2]")
        return text
    check(list(table) == ["value"], where, text, "one TOML value, such as 300 or [1, 2]")
    check_values(table["value"], where)
    return table["value"]
