"""Networks in fp16 and bf16; norms and the time embedding stay in fp32."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastgen.errors import InputError
from fastgen.files.names import check_device

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(name: str | None) -> torch.device:
    """The device of that name, by default the GPU if there is one; InputError for one that is not there."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(default if name is None else check_device(name))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise InputError(f"device {name}: PyTorch finds {count} CUDA devices; `fastgen doctor` says why")
    return device


def in_precision(module: nn.Module, dtype: str) -> nn.Module:
    """A copy of `module` that computes in `dtype` ("fp16" | "bf16"), with float32 inputs and outputs.

    Islands in fp32: normalisations (their statistics overflow fp16 and lose bf16's eight bits) and the time embedding's
    sinusoids and first layers; timesteps are never rounded (bf16 cannot tell 999 from 1000). "fp32" returns the module.
    """
    if dtype == "fp32":
        return module
    inner = copy.deepcopy(module).to(TORCH_DTYPES[dtype])
    for parent in list(inner.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.GroupNorm | nn.LayerNorm) or name == "time_embedding":
                setattr(parent, name, _Island(child, TORCH_DTYPES[dtype]))
    return _Lowered(inner, TORCH_DTYPES[dtype]).eval()


class _Island(nn.Module):
    """A module in float32 whose output is cast back to the network's dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module, self.dtype = module.float(), dtype

    def forward(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        return self.module(x.float(), *rest, **options).to(self.dtype)


class _Lowered(nn.Module):
    """A network of `signatures` computed in another dtype; timesteps stay float32."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, *inputs: Tensor) -> Any:
        outputs = self.network(*(self._cast(x) for x in inputs))
        return outputs.float() if isinstance(outputs, Tensor) else tuple(y.float() for y in outputs)

    def _cast(self, x: Tensor) -> Tensor:
        """Timesteps, and one number per image, are the only inputs (B,); ids are integers."""
        return x.to(self.dtype) if x.is_floating_point() and x.ndim > 1 else x
