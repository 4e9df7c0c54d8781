"""A model folder as a bundle, for engines that run bundles: exported once into the cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fastgen import __version__
from fastgen.engines import bundle_engines, source_kind
from fastgen.errors import FastgenError, InputError
from fastgen.files.cachedir import cache_folder
from fastgen.files.hashes import sha256_json
from fastgen.models.bundle import is_bundle
from fastgen.models.find import find_model, name_of

EXPORTER = ("torch", "diffusers", "onnx", "onnxscript")  # packages of the extra `export`
FOLDER = "bundles"


def served_folder(
    model: Path, engine: str | None, checkpoint: str | None, allow_pickle: bool, say: Callable[[str], None]
) -> Path:
    """What a server loads of a model: a bundle as it is; a model folder for an engine that runs these; else its bundle in the
    cache, which is exported and certified there the first time.

    With no engine named, a model folder is exported where an engine for bundles and the exporter are installed, and runs on
    the reference engine elsewhere; `say` gets a line about either. Raises InputError for what is no model, and FastgenError
    where the export fails."""
    found = find_model(model, checkpoint)
    ready = [kind for kind in bundle_engines() if kind.built_by is None and engine in (None, kind.name)]
    if found.bundle is not None or source_kind(engine) == "model" or (engine is not None and not ready):
        return model  # as it is, or with the error of `fastgen.load`
    if engine is None and not (ready and all(map(find_spec, EXPORTER))):
        say(f"{name_of(model)}: runs on the reference engine, eager; `fastgen export` makes a bundle for faster ones")
        return model
    target = cache_folder(FOLDER) / fingerprint(model, checkpoint)
    if not is_bundle(target):
        say(f"{name_of(model)}: exporting it into the cache, once (as `fastgen export {name_of(model)}` does)")
        name = max(ready, key=lambda kind: kind.priority(target, None)).name
        _export(model, target, name, checkpoint, allow_pickle)
    return target


def fingerprint(model: Path, checkpoint: str | None) -> str:
    """A name for the bundle of a model folder, another one when any of its files has changed."""
    files = [
        [str(file.relative_to(model)), file.stat().st_size, file.stat().st_mtime_ns]
        for file in sorted(model.rglob("*"))
        if file.is_file()
    ]
    return sha256_json([__version__, str(model.resolve()), checkpoint, files])[:32]


def _export(model: Path, target: Path, engine: str, checkpoint: str | None, allow_pickle: bool) -> None:
    """`fastgen export` in a process of its own, whose memory is free again afterwards."""
    words = [sys.executable, "-m", "fastgen", "export", str(model), "--out", str(target), "--engine", engine]
    words += ["--checkpoint", checkpoint] if checkpoint else []
    words += ["--allow-pickle"] if allow_pickle else []
    done = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        error = InputError if done.returncode == 2 else FastgenError
        text = (lines or ["no reason given"])[-1].removeprefix("fastgen: error: ")
        raise error(f"{name_of(model)}: could not be exported: {text}")
