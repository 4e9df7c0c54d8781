"""Files are added to a bundle, and taken out of it, without ever breaking it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastgen.files.folders import sync_tree
from fastgen.files.hashes import record_files
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.models.bundle import CERTIFICATES, COMPILED, MANIFEST, Bundle, read_bundle


def add_files(held: Bundle, partial: Path, dropped: Collection[str] = ()) -> None:
    """Move the files below `partial` into a bundle, and take out those that are `dropped`.

    The bundle is whole at every moment: a file is there before bundle.json lists it, and is deleted when it no longer does.
    """
    out = held.folder
    added = record_files(partial)
    sync_tree(partial)
    if again := [name for name in added if name in held.files]:
        _list_files(out, {}, again)
    for name in added:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(out / name)
    _list_files(out, added, dropped)
    _carry_certificates(held, {name.partition("/")[0] for name in (*added, *dropped)})
    for name in dropped:
        (out / name).unlink(missing_ok=True)
    _remove_empty({(out / name).parent for name in dropped} - {out})


def _list_files(out: Path, added: Mapping[str, Any], dropped: Collection[str]) -> None:
    """Change the files that bundle.json lists."""
    manifest = read_json(out / MANIFEST)
    kept = {name: file for name, file in manifest["files"].items() if name not in dropped}
    write_json(out / MANIFEST, manifest | {"files": dict(sorted((kept | dict(added)).items()))})


def sweep(held: Bundle) -> None:
    """Remove what an extension that was killed left behind: files of our names that bundle.json does not list."""
    patterns = [
        *(f"{name}/model.*" for name in held.spec.signatures),
        "reference.*",
        ".tmp-*",
        f"{CERTIFICATES}/.tmp-*",
        f"{COMPILED}/*/*",
    ]
    for file in (file for pattern in patterns for file in held.folder.glob(pattern)):
        if file.relative_to(held.folder).as_posix() not in held.files:
            file.unlink()
    _remove_empty(held.folder.glob(f"{COMPILED}/*"))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _carry_certificates(before: Bundle, changed: Collection[str]) -> None:
    """Certificates stay valid when files are added: those that they vouch for are the same. Not so those of an engine whose
    plans lie in a folder that was `changed`."""
    after = read_bundle(before.folder)
    for path in sorted((before.folder / CERTIFICATES).glob("*.json")):
        certificate = read_json(path)
        if certificate.get("bundle_sha256") == before.sha256 and certificate.get("engine") not in changed:
            write_json(path, certificate | {"bundle_sha256": after.sha256})
