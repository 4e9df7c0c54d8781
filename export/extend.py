"""Adding files to a bundle and removing them, so that it is valid at every moment."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from export.certificate import read_certificate
from fastgen.errors import InputError
from fastgen.files.folders import sync_tree
from fastgen.files.hashes import record_files
from fastgen.files.jsonfiles import brief, read_json, write_json
from fastgen.files.temporary import is_temporary, remove_leftovers
from fastgen.models.bundle import CERTIFICATES, COMPILED, LOWERED, MANIFEST, Bundle, read_bundle
from fastgen.models.bundle_record import EXTENDS, record_digest, sealed

KEPT = 1000  # digests of earlier states that bundle.json lists
_LOWERED = "|".join(LOWERED)
_GRAPH = rf"(unet(_whole|_shallow)?|vae_decoder|vae_encoder|text_encoder)/model(\.({_LOWERED}))?(\.ort)?\.onnx(\.data)?"
_TABLE = r"reference\.(safetensors|fp16\.json|bf16\.json)|(unet|vae_decoder)/model\.(int8|int8-fp16|fp8-fp16)\.json"
# Files that `add_files` adds to a bundle, and all that an export writes.
_ADDED = re.compile(rf"{_GRAPH}|{_TABLE}|{COMPILED}/[0-9a-f]{{64}}/[\w.-]+")
_WRITTEN = re.compile(
    rf"{_ADDED.pattern}|bundle\.json|model_index\.json|labels\.json|{CERTIFICATES}/[^/]+\.json|tokenizer(_2)?/[^/]+"
    r"|(unet|vae_decoder|vae_encoder|text_encoder(_2)?|conditioner)/config\.json"
    r"|scheduler/(scheduler_config\.json|tables\.npz)"
)


def add_files(
    bundle: Bundle, partial: Path, dropped: Collection[str] = (), facts: Mapping[str, Any] | None = None
) -> None:
    """Move the files below `partial` into a bundle, and remove those called `dropped`. `facts`: fields of bundle.json that come
    with the files.

    A file is there before bundle.json lists it, and is deleted when it no longer does.
    """
    out = bundle.folder
    added = record_files(partial)
    sync_tree(partial)
    if replaced := [name for name in added if name in bundle.files]:
        _list_files(out, {}, replaced, {})
    for name in added:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(out / name)
    _list_files(out, added, dropped, facts or {})
    _carry_certificates(bundle, {name.partition("/")[0] for name in (*added, *dropped)})
    for name in dropped:
        (out / name).unlink(missing_ok=True)
    _remove_empty({(out / name).parent for name in dropped} - {out})


def check_replaceable(out: Path) -> None:
    """InputError where a bundle's folder holds files that no export writes: replacing the folder would delete them."""
    foreign = [
        name for name in file_names(out) if not (_WRITTEN.fullmatch(name) or is_temporary(name.rpartition("/")[2]))
    ]
    if foreign:
        found = f"holds {brief(foreign[0])}{f' and {len(foreign) - 1} more files' if len(foreign) > 1 else ''}"
        raise InputError(f"{out}: {found}, which no export writes and --overwrite would delete; move them away first")


def file_names(folder: Path) -> list[str]:
    """Relative names of all files and links below a folder; links are not followed."""
    names = []
    for parent, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        names += [Path(parent, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(names)


def _list_files(out: Path, added: Mapping[str, Any], dropped: Collection[str], facts: Mapping[str, Any]) -> None:
    """Change the files that bundle.json lists, and the fields `facts`."""
    manifest = read_json(out / MANIFEST)
    files = {name: file for name, file in manifest["files"].items() if name not in dropped} | dict(added)
    before = [*manifest.get(EXTENDS, []), record_digest(manifest)][-KEPT:]
    write_json(out / MANIFEST, sealed(manifest | facts | {"files": dict(sorted(files.items())), EXTENDS: before}))


def sweep(bundle: Bundle) -> None:
    """Remove the files that a killed `add_files` left: those under names of its own that bundle.json does not list."""
    for folder in (bundle.folder, bundle.folder / CERTIFICATES):
        remove_leftovers(folder)
    for name in file_names(bundle.folder):
        if _ADDED.fullmatch(name) and name not in bundle.files:
            (bundle.folder / name).unlink()
    _remove_empty(bundle.folder.glob(f"{COMPILED}/*"))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _carry_certificates(before: Bundle, changed: Collection[str]) -> None:
    """Give certificates the hash of the changed bundle: the files that they certify are the same, except those of an engine
    whose plans are in a `changed` folder. What is no certificate stays as it is."""
    after = read_bundle(before.folder)
    for path in sorted((before.folder / CERTIFICATES).glob("*.json")):
        try:
            filed = read_certificate(path)
        except InputError:
            continue
        if filed.bundle_sha256 == before.sha256 and filed.engine not in changed:
            certificate = read_json(path)
            write_json(path, certificate | {"bundle_sha256": after.sha256})
