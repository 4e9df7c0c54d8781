"""Adding files to a bundle and removing them, so that it is valid at every moment."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastgen.files.folders import sync_tree
from fastgen.files.hashes import record_files
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.files.temporary import remove_leftovers
from fastgen.models.bundle import CERTIFICATES, COMPILED, MANIFEST, Bundle, read_bundle
from fastgen.models.bundle_record import EXTENDS, record_digest, sealed


def add_files(bundle: Bundle, partial: Path, dropped: Collection[str] = ()) -> None:
    """Move the files below `partial` into a bundle, and remove those called `dropped`.

    A file is there before bundle.json lists it, and is deleted when it no longer does.
    """
    out = bundle.folder
    added = record_files(partial)
    sync_tree(partial)
    if replaced := [name for name in added if name in bundle.files]:
        _list_files(out, {}, replaced)
    for name in added:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).replace(out / name)
    _list_files(out, added, dropped)
    _carry_certificates(bundle, {name.partition("/")[0] for name in (*added, *dropped)})
    for name in dropped:
        (out / name).unlink(missing_ok=True)
    _remove_empty({(out / name).parent for name in dropped} - {out})


def _list_files(out: Path, added: Mapping[str, Any], dropped: Collection[str]) -> None:
    """Change the files that bundle.json lists."""
    manifest = read_json(out / MANIFEST)
    files = {name: file for name, file in manifest["files"].items() if name not in dropped} | dict(added)
    before = [*manifest.get(EXTENDS, []), record_digest(manifest)]
    write_json(out / MANIFEST, sealed(manifest | {"files": dict(sorted(files.items())), EXTENDS: before}))


def sweep(bundle: Bundle) -> None:
    """Remove the files that a killed `add_files` left: those under a bundle's names that bundle.json does not list."""
    patterns = [
        *(f"{name}/model.*" for name in bundle.spec.signatures),
        "reference.*",
        f"{COMPILED}/*/*",
    ]
    for folder in (bundle.folder, bundle.folder / CERTIFICATES):
        remove_leftovers(folder)
    for file in (file for pattern in patterns for file in bundle.folder.glob(pattern)):
        if file.relative_to(bundle.folder).as_posix() not in bundle.files:
            file.unlink()
    _remove_empty(bundle.folder.glob(f"{COMPILED}/*"))


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _carry_certificates(before: Bundle, changed: Collection[str]) -> None:
    """Give certificates the hash of the changed bundle: the files that they certify are the same, except those of an engine
    whose plans are in a `changed` folder."""
    after = read_bundle(before.folder)
    for path in sorted((before.folder / CERTIFICATES).glob("*.json")):
        certificate = read_json(path)
        if certificate.get("bundle_sha256") == before.sha256 and certificate.get("engine") not in changed:
            write_json(path, certificate | {"bundle_sha256": after.sha256})
