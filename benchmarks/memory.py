"""Peak memory of this process: resident on a CPU, on the device with CUDA."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

MIB = 2**20


class Meter:
    """What happens between `begin` and `end` belongs to this meter's side; on a GPU others may have memory of their own in the
    same process. Make it before the side imports or loads anything."""

    def __init__(self, device: str) -> None:
        self._cuda: Any = None
        if device.startswith("cuda"):
            import torch

            self._cuda, self._device = torch.cuda, device
            self._cuda.init()
        self._own = self._own_driver = 0

    def begin(self) -> None:
        """Forget the peak so far, but not what is in use."""
        if self._cuda is None:
            with contextlib.suppress(OSError):  # not Linux, or not allowed: then it is the peak of the whole process
                Path("/proc/self/clear_refs").write_text("5")
            return
        self._cuda.reset_peak_memory_stats(self._device)
        self._allocated = self._cuda.memory_allocated(self._device)
        self._free = self._cuda.mem_get_info(self._device)[0]

    def end(self) -> dict[str, float | None]:
        """`peak_mib`: resident on a CPU, torch's allocations with CUDA; `driver_mib`: what the driver has handed out,
        reserves of allocators and graphs included (None on a CPU)."""
        if self._cuda is None:
            return {"peak_mib": _resident_peak() / MIB, "driver_mib": None}
        self._cuda.synchronize(self._device)
        peak = self._own + self._cuda.max_memory_allocated(self._device) - self._allocated
        self._own += self._cuda.memory_allocated(self._device) - self._allocated
        self._own_driver += self._free - self._cuda.mem_get_info(self._device)[0]
        return {"peak_mib": peak / MIB, "driver_mib": self._own_driver / MIB}


def _resident_peak() -> float:
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return float(line.split()[1]) * 1024
    import resource
    import sys

    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
