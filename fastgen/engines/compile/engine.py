"""torch.compile's code generator, ahead of time: inductor compiles each network, exported at a fixed number of rows, into a
package (AOTInductor) in the cache of compiled engines, so that a second process starts warm.

A number of rows that the cache lacks is compiled when it is first needed, with a line on stderr. The default precision is fp16
on a GPU (older ones have no bf16, and the tolerance of fp16 is tighter). On a CPU it is bf16 where the CPU multiplies that
natively, as in engine openvino, else fp32.

Measured on a CPU with avx512_bf16, UNets of 3 to 140 million parameters. Used: freezing (weights are folded and laid out for
oneDNN beforehand) saves 7 to 17% of a forward. Not used: fused attention projections and cheaper upsampling (3% at most,
within the noise), autotuning (8%, for five times the compile time), and compiling the text encoder and the VAE encoder, which
would pay after 5,000 prompts. On a GPU packages hold code only: all numbers of rows share one copy of the weights.
"""

from __future__ import annotations

import copy
import json
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen import __version__
from fastgen.engines import base
from fastgen.engines.base import announce
from fastgen.engines.cache import artifacts
from fastgen.engines.cache.artifacts import Recipe
from fastgen.engines.torch_base import TorchEngine
from fastgen.errors import FastgenError, InputError, first_line
from fastgen.files.installing import Install

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastgen.engines.compile.package import Package
    from fastgen.engines.doctor.diagnosis import Machine, Problem
    from fastgen.models.folder import Model

FORMAT = 2  # of what is compiled: raise it when packages change although no field of the recipe does
COMPILED = "unet", "vae_decoder"  # the others run once per prompt or picture: compiling pays after thousands of them


class Engine(TorchEngine):
    name = "compile"
    source_kind = "model"
    packages = ("torch", "diffusers", "transformers")
    install = Install("train")
    dtypes = ("fp16", "bf16", "fp32")
    static_shapes = True

    def __init__(
        self, source: Model, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        from fastgen.engines.compile.package import check_torch, cpu_dtypes, options

        self.open_device(device, threads)
        check_torch(self._torch.__version__)
        on_gpu = self.device.startswith("cuda")
        possible = list(Engine.dtypes) if on_gpu else cpu_dtypes()
        self.dtype = base.choose_dtype(Engine, dtype, possible[0])
        if self.dtype not in possible:
            raise InputError(f"engine compile: this CPU has no {self.dtype}; it has {', '.join(possible)}")
        self.capturable = on_gpu  # once a package is loaded, that is after a first call
        self.signatures = source.spec.signatures
        self._options = options(on_gpu)
        self._source, self._networks = source, source.networks()
        self._modules: dict[str, nn.Module] = {}
        self._packages: dict[tuple[str, int], Package] = {}
        self._weights: list[Tensor] = []  # on a GPU; packages keep references to theirs for ever (torch 2.13)
        weakref.finalize(self, _free, self._weights)

    @classmethod
    def library_problems(cls, machine: Machine) -> Iterator[Problem]:
        from fastgen.engines.compile.package import tool_problems

        yield from super().library_problems(machine)
        yield from tool_problems(machine)

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        """One forward of `network`, compiled first if the cache lacks it for so many rows."""
        rows = self.checked_rows(network, inputs)
        if network not in COMPILED:
            return self._run_module(network, inputs)
        package = self._packages.get((network, rows)) or self._load(network, rows)
        failed = f"engine compile: {network} at {rows} rows failed"
        with self._failing(failed), self.precisely(network), self._active():
            # On the current stream of the current device; a package ignores strides.
            return package.run([x.contiguous() for x in inputs])

    def recipe(self, network: str, rows: int | None) -> Recipe | None:
        """Cache key of a package; None for a network that is not compiled."""
        if network not in COMPILED:
            return None
        import diffusers

        from fastgen.engines.compile.package import hardware

        shapes = [f"{t.name} {','.join(map(str, t.shape))}" for t in self.signatures[network].inputs]
        fields = {
            "network": network,
            "batch": rows,
            "dtype": self.executed(network),
            "weights_sha256": self._source.spec.sha256,
            "shapes": "; ".join(shapes),
            "fastgen": __version__,
            "torch": self._torch.__version__,
            "diffusers": diffusers.__version__,
            "options": json.dumps(self._options, sort_keys=True),
            "format": FORMAT,
        }
        return Recipe(self.name, fields | hardware(self._torch.device(self.device)))

    def probe(self, network: str, rows: int) -> None:
        """One forward of the module itself, without compiling; it takes no less memory than the package."""
        self._run_module(network, self.samples(network, rows))

    def _load(self, network: str, rows: int) -> Package:
        """The package of a network, compiled first if there is none; `obtain` verifies its bytes."""
        from fastgen.engines.compile.package import named_weights, open_package

        recipe = self.recipe(network, rows)
        assert recipe is not None
        artifact = artifacts.obtain(recipe, lambda folder: self._build(network, rows, folder), announce)
        weights = None if "freezing" in self._options else named_weights(self._module(network))
        with self._failing(f"{artifact.folder}: cannot be loaded"), self._active():
            self._packages[network, rows] = open_package(artifact.folder, self._torch.device(self.device), weights)
        return self._packages[network, rows]

    def _active(self) -> AbstractContextManager[Any]:
        """Within it the engine's GPU is the current one."""
        return self._torch.cuda.device(self.device) if self.capturable else nullcontext()

    def _build(self, network: str, rows: int, folder: Path) -> None:
        from fastgen.engines.compile.package import build, check_tools

        check_tools(self.capturable)
        with self._failing(f"engine compile: {network} at {rows} rows cannot be compiled"), self.precisely(network):
            build(self._module(network), self.samples(network, rows), self._options, folder)

    def _run_module(self, network: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The network as it is, without compiling."""
        with self.precisely(network), self._torch.inference_mode():
            outputs = self._module(network)(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def _module(self, network: str) -> nn.Module:
        """The network in the precision that it is executed in, on the device."""
        from fastgen.engines.compile.package import named_weights
        from fastgen.models.precision import in_precision

        if network not in self._modules:
            with self._torch.inference_mode(False):  # in inference mode weights could not be changed later
                module = in_precision(self._networks[network], self.executed(network))
                if module is self._networks[network] and self.capturable:
                    module = copy.deepcopy(module)  # as `_free` takes its memory away
                module = module.to(self.device).to(memory_format=self._torch.channels_last)  # type: ignore[call-overload]
            self._modules[network] = module
            if self.capturable:
                self._weights += named_weights(module).values()
        return self._modules[network]

    @contextmanager
    def _failing(self, what: str) -> Iterator[None]:
        """Raise torch's errors inside as FastgenError or OutOfMemoryError. A package raises the same error for exhausted memory
        as for other failures, but torch counts the allocations that failed."""
        before = self._allocations_failed()
        try:
            yield
        except RuntimeError as error:
            if self.is_out_of_memory(error):
                raise
            if self._allocations_failed() > before:
                raise self._torch.OutOfMemoryError(f"{what}: CUDA out of memory") from error
            raise FastgenError(f"{what}: {type(error).__name__}: {first_line(error)}") from error

    def _allocations_failed(self) -> int:
        if not self.capturable:
            return 0
        return int(self._torch.cuda.memory_stats_as_nested_dict(self.device).get("num_ooms", 0))


def _free(tensors: list[Tensor]) -> None:
    """Free the memory of these tensors, even if there are other references to them."""
    for tensor in tensors:
        tensor.untyped_storage().resize_(0)
    tensors.clear()
