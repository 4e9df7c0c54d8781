"""Where a GPU's time goes: kernels of a short run, by name and by kind."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

KINDS = (
    ("attention", r"flash|fmha|attention|sdpa"),
    ("convolution", r"conv|fprop|dgrad|implicit"),
    ("matrix product", r"gemm|gemv|cutlass|nvjet|xmma|matmul|mm$"),
    ("normalisation", r"norm|welford|var_mean"),
    ("copy and layout", r"memcpy|memset|copy|transpose|nchw|nhwc|cat|permute|fill"),
    ("fused by a compiler", r"triton"),
    ("element-wise", r"elementwise|vectorized|unrolled|reduce|softmax|silu|gelu"),
)


def kernel_profile(call: Callable[[], Any], top: int = 15) -> dict[str, Any]:
    """{"wall_ms", "busy_percent", "kinds", "kernels"}: device time by kind and by kernel; on a CPU, by operator.

    The profiler's own cost makes `wall_ms` a little longer than without it.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    call()
    with profile(activities=activities) as recorded:
        start = time.perf_counter()
        call()
        if cuda:
            torch.cuda.synchronize()
        wall_ms = 1000 * (time.perf_counter() - start)
    events = [(e.key, e.count, _self_ms(e, cuda)) for e in recorded.key_averages()]
    events = sorted((e for e in events if e[2] > 0), key=lambda e: -e[2])
    busy_ms = sum(ms for *_, ms in events)
    kinds: dict[str, float] = {}
    for name, _, ms in events:
        kinds[kind(name)] = kinds.get(kind(name), 0.0) + ms
    return {
        "wall_ms": wall_ms,
        "busy_percent": 100 * busy_ms / wall_ms,
        "kinds": [
            {"kind": k, "ms": ms, "percent": 100 * ms / busy_ms} for k, ms in sorted(kinds.items(), key=lambda i: -i[1])
        ],
        "kernels": [
            {"ms": ms, "percent": 100 * ms / busy_ms, "calls": calls, "kernel": name[:90]}
            for name, calls, ms in events[:top]
        ],
    }


def kind(name: str) -> str:
    """The first kind of KINDS that a kernel's name speaks of."""
    return next((label for label, pattern in KINDS if re.search(pattern, name.lower())), "other")


def _self_ms(event: Any, cuda: bool) -> float:
    """Kernels alone: an operator's row repeats the time of what it launched."""
    if not cuda:
        return event.self_cpu_time_total / 1000
    from torch.autograd import DeviceType

    return event.self_device_time_total / 1000 if event.device_type == DeviceType.CUDA else 0.0
