"""The reference: the model's own PyTorch modules, run as they are."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from fastgen.engines import base
from fastgen.engines.torch_base import TorchEngine
from fastgen.files.installing import Install

if TYPE_CHECKING:
    from torch import nn

    from fastgen.models.folder import Model


class Engine(TorchEngine):
    name = "eager"
    source_kind = "model"
    packages = ("torch", "diffusers", "transformers")
    install = Install("train")
    dtypes = ("fp32", "bf16", "fp16")
    reference = True
    splits = True

    def __init__(
        self, source: Model, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        from fastgen.models.precision import TORCH_DTYPES

        self.open_device(device, threads)
        self.dtype = base.choose_dtype(Engine, dtype, "fp32")
        self.capturable = self.device.startswith("cuda")
        self._torch_dtype = TORCH_DTYPES[self.dtype]
        self.signatures = source.spec.all_signatures
        self._networks = source.networks() | source.split_networks()
        self._modules: dict[str, nn.Module] = {}
        self._moving = threading.Lock()

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        self.checked_rows(network, inputs)
        with self.precisely(network), self._torch.inference_mode():
            outputs = self._module(network)(*map(self._cast, inputs))
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(y.float() for y in outputs)

    def executed(self, network: str) -> str:
        return self.dtype  # of every network: the reference is what diffusers computes

    def _module(self, network: str) -> nn.Module:
        """The network on the device, moved there at its first run: a job may not need all networks."""
        # Without inference mode, in which weights would become tensors that cannot be changed.
        with self._moving, self._torch.inference_mode(False):
            if network not in self._modules:
                self._modules[network] = self._networks[network].to(self.device, self._torch_dtype)
        return self._modules[network]

    def _cast(self, x: Any) -> Any:
        """Timesteps stay float32, as in diffusers: bf16 cannot tell 999 from 1000. They, and the one number per image that some
        models are conditioned on, are the only inputs (B,)."""
        return x.to(self._torch_dtype) if x.is_floating_point() and x.ndim > 1 else x
