"""The compiled engines on disk as a table, and why one that is needed is not found."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.engines import engine_class, engine_names
from fastgen.engines.cache.artifacts import Artifact, Recipe, ranked
from fastgen.errors import InputError, unknown

if TYPE_CHECKING:
    from fastgen.engines.base import Engine
    from fastgen.models.spec import Spec


@dataclass(frozen=True)
class Finding:
    """The compiled forms of one network. `rows`: number of rows -> artifact, verified; `problem`: why one that is needed is
    missing, in words, or None."""

    network: str
    rows: Mapping[int, Artifact]
    problem: str | None

    def __str__(self) -> str:
        there = [f"batch {rows}: {a.recipe.digest[:12]}, verified" for rows, a in sorted(self.rows.items())]
        return f"{self.network}: {'; '.join([*there, *([self.problem] if self.problem else [])])}"


def check_engine(name: str | None) -> None:
    """InputError for an engine that does not exist."""
    if name is not None and name not in engine_names():
        raise unknown("engine", name, engine_names())


def row(artifact: Artifact) -> dict[str, Any]:
    """An artifact as a row of `fastgen engines ls`; times in ISO 8601, UTC."""
    fields = artifact.recipe.fields
    return {
        "engine": artifact.recipe.engine,
        "network": fields.get("network"),
        "batch": fields.get("batch"),
        "dtype": fields.get("dtype"),
        "device": next((fields[key] for key in ("gpu", "cpu", "device") if fields.get(key)), None),
        "versions": {name: str(fields[name]) for name in library_fields(artifact.recipe)},
        "bytes": artifact.bytes,
        "built": artifact.built,
        "build_seconds": artifact.build_seconds,
        "last_used": datetime.fromtimestamp(artifact.last_used, UTC).isoformat(timespec="seconds"),
        "address": artifact.recipe.digest,
        "fields": dict(fields),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of `row` as aligned lines with a header."""
    cells = [
        ("engine", "network", "batch", "dtype", "device", "versions", "size", "built", "took", "last used", "address")
    ]
    for r in rows:
        versions = " ".join(f"{name} {short_version(text)}" for name, text in r["versions"].items())
        took, when = f"{r['build_seconds']:.1f} s", [r[key][:16].replace("T", " ") for key in ("built", "last_used")]
        plain = [
            str(r[key] if r[key] is not None else "-") for key in ("engine", "network", "batch", "dtype", "device")
        ]
        cells.append((*plain, versions or "-", size_text(r["bytes"]), when[0], took, when[1], r["address"][:12]))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def explain(engine: Engine, spec: Spec, batch_size: int | None = None) -> list[Finding]:
    """`why` for the networks that generation needs, with the guidance of the model's settings."""
    networks = [name for name in spec.signatures if name != "vae_encoder"]
    return why(engine, networks, batch_size, guided=spec.sampling.guidance_scale != 1.0)


def build_command(bundle: Path, engine: Engine, batch_size: int | None) -> str:
    """The command that builds an engine of a bundle that must be built beforehand."""
    sizes = f" --batch-sizes {batch_size}" if batch_size else ""
    return f"fastgen export {bundle} {engine.built_by} --dtype {engine.dtype}{sizes}"


def why(engine: Engine, networks: Sequence[str], batch_size: int | None = None, guided: bool = True) -> list[Finding]:
    """For each network its compiled forms for this engine, and if there is none how the nearest artifact differs.

    `batch_size`: images per batch that must be there; a guided one takes twice as many rows of the UNet. Raises InputError
    for an engine that keeps nothing on disk.
    """
    recipes = {name: recipe for name in networks if (recipe := engine.recipe(name, None)) is not None}
    if not recipes:
        raise InputError(f"engine {engine.name} keeps no compiled networks on disk: there is nothing to find")
    sound, rows = engine.compiled(), None if batch_size is None else batch_size * (2 if guided else 1)
    return [_finding(name, recipe, sound, rows if name == "unet" else None) for name, recipe in recipes.items()]


def _finding(network: str, recipe: Recipe, sound: Sequence[Artifact], rows: int | None) -> Finding:
    near = ranked(recipe, sound)
    verified: dict[int, Artifact] = {}
    broken = []
    for artifact in (artifact for artifact, different in near if not different):
        try:
            artifact.verify()
            verified[int(artifact.recipe.fields["batch"] or 0)] = artifact
        except InputError as error:
            broken.append(f"damaged: {error}")
    if broken:
        return Finding(network, verified, "; ".join(broken))
    if not near:
        return Finding(network, verified, "never built")
    if not verified:
        nearest, different = near[0]
        words = ", ".join(map(str, different))
        return Finding(network, verified, f"not built; the nearest ({nearest.recipe}): {words}")
    missing = rows is not None and not any(_takes(artifact, rows) for artifact in verified.values())
    return Finding(network, verified, f"no batch of {rows} rows" if missing else None)


def _takes(artifact: Artifact, rows: int) -> bool:
    """Whether a compiled network runs so many rows: exactly `batch`, or `least_rows` to `batch` if it has that field."""
    most = int(artifact.recipe.fields["batch"] or 0)
    return int(artifact.recipe.fields.get("least_rows") or most) <= rows <= most


def library_fields(recipe: Recipe) -> list[str]:
    """The fields of a recipe that are versions of its engine's packages."""
    if recipe.engine not in engine_names():
        return []
    packages = [*engine_class(recipe.engine).packages, "triton"]
    return [name for name in packages if isinstance(recipe.fields.get(name), str)]


def size_text(count: float) -> str:
    """Bytes as text: `1.5 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; files that are deleted while this counts are left out."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:
                continue
    return total


def short_version(version: str) -> str:
    """`2026.4.1-22982-e213a1` -> `2026.4.1`."""
    return re.split(r"[-+]", version)[0]
