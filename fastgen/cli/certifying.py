"""Certifying an engine at its first run: one that was built on another machine, or computes in eight bits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.cli.common import say
from fastgen.errors import FastgenError, Say

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner


def ensure_certified(pipeline: ModelRunner, say: Say = say) -> None:
    """Certify an engine whose plans run on many cards, unless this bundle has a certificate for this kind of card; and one in
    eight bits, unless this bundle has a certificate for it.

    The certificate goes into the bundle, or into the cache if the bundle is not writable. Raises FastgenError when the engine
    misses its tolerance, after `say` got the table; InputError when the bundle lacks the reference.
    """
    from fastgen.models.signatures import EIGHT_BITS

    engine, bundle = pipeline.engine, pipeline.source
    if engine.gpu is None and engine.dtype not in EIGHT_BITS:
        return
    from export.certificate import certify, is_certified
    from fastgen.files.cachedir import cache_folder, check_private
    from fastgen.models.bundle import CERTIFICATES, Bundle

    assert isinstance(bundle, Bundle)
    folders = bundle.folder / CERTIFICATES, cache_folder(CERTIFICATES) / bundle.sha256
    if os.path.lexists(folders[1]):
        check_private(folders[1])
    if is_certified(engine, bundle, folders):
        return
    where, once = (engine.device, "bundle") if engine.gpu is None else (engine.gpu, "card and bundle")
    what = f"engine {engine.name} {engine.dtype} on {where}"
    say(f"certifying {what} against eager fp32 (once per {once})")
    networks = [name for name in bundle.spec.signatures if name != "vae_encoder"]
    certificate = certify(engine, bundle, networks, folders[0] if _writable(folders[0]) else folders[1])
    say(certificate.table())
    if not certificate.passed:
        raise FastgenError(f"not certified: {what} (see the table above); nothing was generated")


def _writable(folder: Path) -> bool:
    """Whether files can be created in a folder, which may not exist yet."""
    return os.access(folder if folder.is_dir() else folder.parent, os.W_OK)
