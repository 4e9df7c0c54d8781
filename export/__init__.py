"""export: a model folder becomes a bundle (ONNX, TensorRT) with a certificate."""

from typing import Any

__all__ = ["export"]


def __getattr__(name: str) -> Any:
    """`export.export`, imported when it is used: it needs torch."""
    if name != "export":
        raise AttributeError(f"module 'export' has no attribute {name!r}")
    from export.bundle import export

    return export
