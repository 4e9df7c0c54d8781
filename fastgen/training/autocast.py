"""Where training runs and in which precision. Weights, their average and the optimiser's state are always float32."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from fastgen.errors import InputError
from fastgen.models.precision import TORCH_DTYPES, device_of


@dataclass(frozen=True)
class Precision:
    """A device and what the networks compute in: "fp32", or autocast to "bf16" or "fp16" (with loss scaling)."""

    device: torch.device
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_DTYPES[self.name]

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")


def choose(name: str, device: str | None = None) -> Precision:
    """The precision `name` on a device; "auto" is bf16 where the hardware computes in it, else fp16 on a GPU, fp32 on a CPU.

    Raises InputError for a device that is not there, and for fp16 on a CPU.
    """
    rank = os.environ.get("LOCAL_RANK")  # set by the launcher: a GPU per process
    rank_device = f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None
    target = device_of(device or rank_device)
    if target.type == "cuda":
        automatic = "bf16" if torch.cuda.get_device_capability(target) >= (8, 0) else "fp16"
    elif name == "fp16":
        raise InputError("train.precision = 'fp16': needs a GPU; on this CPU use 'auto', 'bf16' or 'fp32'")
    else:
        has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        automatic = "bf16" if has_bf16 else "fp32"
    return Precision(target, automatic if name == "auto" else name)
