"""Where files go: a path on this machine, or the URL of a bucket. Nothing is opened here."""

from __future__ import annotations

import re
from pathlib import Path

from fastgen.errors import InputError, one_line
from fastgen.files.jsonfiles import brief

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
PROTOCOLS = (*EXTRAS, "memory")  # an object of these appears whole
DISK = ("file", "local")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://(.*)", re.DOTALL)
_PASSWORD = re.compile(r"(?<=://)([^/@:]*):[^/@]*@")


class Url(str):
    """The checked URL of a folder or a file in a bucket, without a `/` at its end. It holds no password."""


def is_url(text: str) -> bool:
    """Whether a text is a URL rather than a path."""
    return _URL.match(text) is not None


def without_secrets(text: str) -> str:
    """A URL as it may be printed: without a password, and without what follows a `?`."""
    address, mark, _ = _PASSWORD.sub(r"\1:***@", text).partition("?")
    return f"{address}?..." if mark else address


def parse_place(text: str, option: str = "--out") -> Path | Url:
    """Where `text` says that files go: a path, also of `file://...`, or the URL of a bucket. Raises InputError."""
    match = _URL.match(text)
    if match is None:
        return Path(text)
    protocol, rest = match[1], match[2].rstrip("/")
    shown = f"{option} {one_line(without_secrets(text), 90)}"
    if protocol in DISK:
        if not rest:
            raise InputError(f"{shown}: has no path, expected {protocol}:///folder")
        return Path(rest)
    if protocol not in PROTOCOLS:
        choices = ", ".join((*PROTOCOLS, DISK[0]))
        raise InputError(f"{shown}: found the protocol {brief(protocol)}, expected one of {choices}, or a path")
    expected = f"expected {protocol}://BUCKET/FOLDER"
    if _PASSWORD.search(text):
        raise InputError(f"{shown}: found a password, {expected}; give it as your provider's tools do")
    if not rest or not rest.isprintable() or re.search(r"[?\\]|::", rest):
        raise InputError(f"{shown}: {expected}, without ? \\ :: and control characters")
    if any(part in ("", ".", "..") for part in rest.split("/")):
        raise InputError(f"{shown}: {expected}, without empty parts, . and ..")
    return Url(f"{protocol}://{rest}")
