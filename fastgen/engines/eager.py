"""The reference: the model's own PyTorch modules, run as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.engines import base
from fastgen.errors import InputError

if TYPE_CHECKING:
    from fastgen.networks import Model


class Engine(base.Engine):
    name = "eager"
    source_kind = "model"
    packages = ("torch", "diffusers", "transformers")
    install = 'pip install "fastgen-diffusion[train]"'
    dtypes = ("fp32", "bf16", "fp16")

    def __init__(
        self, source: Model, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        import torch

        self._torch = torch
        self.xp = torch
        self.device = _checked_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = base.choose_dtype(Engine, dtype, "fp32")
        if threads:
            torch.set_num_threads(threads)
        self._torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        self.signatures = source.spec.signatures
        self._modules = {k: m.to(self.device, self._torch_dtype) for k, m in source.networks().items()}

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        torch = self._torch
        with torch.inference_mode():
            names = [t.name for t in self.signatures[network].inputs]
            cast = [self._cast(name, x) for name, x in zip(names, inputs, strict=True)]
            outputs = self._modules[network](*cast)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(y.float() for y in outputs)

    def _cast(self, name: str, x: Any) -> Any:
        """Timesteps stay float32, as in diffusers: bf16 cannot tell 999 from 1000."""
        return x.to(self._torch_dtype) if x.is_floating_point() and name != "timestep" else x

    def array(self, values: np.ndarray) -> Any:
        return self._torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def numpy(self, values: Any) -> np.ndarray:
        return values.cpu().numpy()


def _checked_device(device: str) -> str:
    """`device`, if it is the CPU or a GPU that torch sees; InputError otherwise."""
    import torch

    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or device.endswith(":"):
        raise InputError(f"device {device!r}: engine eager runs on cpu, cuda or cuda:N")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = f"{torch.cuda.device_count()} CUDA GPUs" if torch.cuda.is_available() else "no CUDA GPU"
        raise InputError(f"device {device}: torch {torch.__version__} sees {found} here")
    return device
