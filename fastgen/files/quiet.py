"""Keeping off stderr what other libraries write there themselves."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def verbose() -> bool:
    """Whether the user wants to see what the libraries say: `fastgen --verbose`, or FASTGEN_VERBOSE=1."""
    return os.environ.get("FASTGEN_VERBOSE", "") not in ("", "0")


@contextmanager
def no_panics() -> Iterator[None]:
    """Keep off stderr what a library written in Rust prints of a panic, beside Python's own stderr. For one quick call."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
