"""What lies at `--out` already: the bundle that is kept and extended, or what is said and kept of one that is replaced."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from export.contents import config_files, versions
from export.extend import check_replaceable
from export.options import BundleOptions
from export.reference import is_current
from fastgen.errors import InputError, Say
from fastgen.files.hashes import sha256_file
from fastgen.models.bundle import COMPILED, LOWERED, REFERENCE, Bundle, is_bundle, read_bundle
from fastgen.models.spec import Spec

if TYPE_CHECKING:
    from fastgen.models.folder import Model


def existing(out: Path, model: Model, options: BundleOptions, overwrite: bool) -> Bundle | None:
    """The bundle at `out` to keep; None where a new one is written. Raises InputError where neither is allowed."""
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return None
    if not is_bundle(out):
        raise InputError(f"{out}: exists and is not a bundle; choose another --out")
    if overwrite:
        check_replaceable(out)
        return None
    bundle = read_bundle(out)
    if other := _differences(bundle, model):
        raise InputError(f"{out}: holds another bundle ({other[0]} differs); choose another --out, or --overwrite")
    if options.weights not in (None, bundle.weights):
        raise InputError(
            f"{out}: holds weights in {bundle.weights}; --overwrite exports it again, in {options.weights}"
        )
    if missing := [key for key in options.solvers if key not in bundle.solver_keys()]:
        raise InputError(f"{out}: holds a bundle without solver {missing[0]}; --overwrite exports it again")
    return bundle


def say_lost(out: Path, model: Model, options: BundleOptions, say: Say) -> None:
    """Say what a bundle that is being replaced holds, and the new one will not."""
    if not is_bundle(out):
        return
    try:
        bundle = read_bundle(out)
    except InputError:  # it is being replaced, which mends what is wrong with it
        return
    held = {part for name in bundle.files if name.endswith(".onnx") for part in name.split(".")}
    lost = [f"graphs in {dtype}" for dtype in sorted((held & {*LOWERED}) - {*options.graphs(model).values()})]
    lost += ["networks for --cache-interval"] if bundle.spec.deep_feature and not options.feature_cache else []
    lost += ["weights in fp16"] if bundle.weights == "fp16" and options.weights != "fp16" else []
    rtx = any(name.startswith(f"{COMPILED}/") for name in bundle.files)
    lost += ["plans for RTX cards"] if rtx and not options.plans else []
    if lost:
        say(
            f"--overwrite: {out} had {', '.join(lost)}; the new bundle has not, unless the same options are given again"
        )


def _differences(bundle: Bundle, model: Model) -> list[str]:
    """Config files and fields of the spec, such as the weights' hash, in which a model differs from a bundle."""
    configs = {name: sha256_file(file) for name, file in config_files(model).items()}
    files = [name for name, sha256 in configs.items() if _sha256(bundle, name) != sha256]
    compared = [f.name for f in fields(Spec) if f.compare]
    return files + [name for name in compared if getattr(bundle.spec, name) != getattr(model.spec, name)]


def _sha256(bundle: Bundle, name: str) -> str | None:
    """The hash that a bundle states of a file; None for one that it does not hold."""
    return bundle.files[name].sha256 if name in bundle.files else None


def stored_reference(out: Path, model: Model) -> Path | None:
    """The reference of the bundle that is being replaced, if the same model made it with the same versions, as today's code
    would."""
    if not is_bundle(out):
        return None
    try:
        bundle = read_bundle(out)
        same = bundle.versions == versions() and not _differences(bundle, model)
        return bundle.file(REFERENCE) if same and is_current(bundle) else None
    except InputError:  # it is being replaced, which mends what is wrong with it
        return None
