"""Exact fp32: while a network runs in fp32, torch may not round its products to TF32 or bf16.

By default torch rounds the inputs of cuDNN's convolutions to TF32 (10 bits of mantissa). After
`torch.set_float32_matmul_precision` it also rounds those of matrix products, on CPUs to bf16. These are settings of the whole
process, which other code may need: they are changed only while a network runs, which includes warming up and recording.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

_lock = threading.Lock()
_inside = 0  # threads and nested calls within `exact_fp32`
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
    """Set everything to fp32, and return a function that restores the settings.

    torch 2.9 and newer have a setting per library and operation, beside the older ones for all operations. Both change each
    other. An older one cannot be read if the user gave the newer ones different values: then it has no effect, and stays.
    """
    import torch

    older: list[Any] = [
        (lambda: torch.backends.cudnn.allow_tf32, partial(setattr, torch.backends.cudnn, "allow_tf32"), False),
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
