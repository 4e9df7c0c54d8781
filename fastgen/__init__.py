"""fastgen: generate with the conditional diffusion model you trained, fast, with proof that it is still the same model."""

__version__ = "0.1.0"

from typing import Any

__all__ = ["build_index", "check_copies", "load", "load_preset", "open_index", "score", "train"]

_API = {
    "build_index": "fastgen.retrieval.indexing",
    "check_copies": "fastgen.retrieval.copies",
    "load": "fastgen.generate.pipeline",
    "load_preset": "fastgen.presets",
    "open_index": "fastgen.retrieval.index",
    "score": "fastgen.scoring",
    "train": "fastgen.training",
}


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is used: `import fastgen` stays light."""
    if name not in _API:
        raise AttributeError(f"module 'fastgen' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_API[name]), name)
