"""fp32 that is fp32: while a network runs in it, torch may not round its products to TF32 or bf16.

torch rounds the inputs of cuDNN's convolutions to TF32 (10 bits of mantissa) unless it is told otherwise, and those of matrix
products, on CPUs to bf16 too, after `torch.set_float32_matmul_precision`. These are settings of the whole process, where other
code may want them: they are changed only while a network runs, which includes warming up and recording.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_lock = threading.Lock()
_inside = 0  # threads and nested calls that want fp32
_restore: Callable[[], None]


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Within it torch computes fp32 convolutions and matrix products in fp32, on every device; afterwards as before."""
    global _inside, _restore
    with _lock:
        if _inside == 0:
            _restore = _set_exact()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore()


def _set_exact() -> Callable[[], None]:
    """Set everything to fp32; returns what sets it back.

    torch 2.9 and newer have a setting per library and operation beside the older ones for all, which they change too. An older
    one cannot be read where the user has set the newer ones apart from it; it then decides nothing, and is left as it is.
    """
    import torch

    older: list[Any] = [
        (lambda: torch.backends.cudnn.allow_tf32, _allow_tf32, False),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    ]
    legacy: list[tuple[Callable[[Any], None], Any, Any]] = []
    for read, write, exact in older:
        with contextlib.suppress(RuntimeError):
            legacy.append((write, read(), exact))
    cudnn, mkldnn = torch.backends.cudnn, torch.backends.mkldnn
    settings: list[Any] = [cudnn, mkldnn]  # setting one of these sets its operations: before them
    settings += [getattr(library, name, None) for library in (cudnn, mkldnn) for name in ("conv", "rnn", "matmul")]
    settings.append(torch.backends.cuda.matmul)
    newer = [(one, one.fp32_precision) for one in settings if hasattr(one, "fp32_precision")]
    for write, _, exact in legacy:
        write(exact)
    for one, _ in newer:
        one.fp32_precision = "ieee"

    def restore() -> None:
        for write, value, _ in legacy:
            write(value)
        for one, value in newer:
            one.fp32_precision = value

    return restore


def _allow_tf32(value: bool) -> None:
    import torch

    torch.backends.cudnn.allow_tf32 = value
