"""The base class of engines that run TensorRT plans; they differ in where their plans come from, and in how one is opened.

`run` queues work on the current stream and never waits for it, so that it can be recorded into a CUDA graph once its plan is
loaded, that is after a first call.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastgen.engines import base
from fastgen.engines.cache.artifacts import Artifact, Recipe
from fastgen.engines.cache.listing import build_command
from fastgen.engines.torch_base import TorchEngine
from fastgen.engines.trt import platform
from fastgen.engines.trt.plan import PLAN, make_recipe, open_engine, read_verified
from fastgen.engines.trt.product import Product
from fastgen.models.signatures import EIGHT_BITS, Signature, TensorSpec

if TYPE_CHECKING:
    from fastgen.engines.doctor.diagnosis import Machine, Problem
    from fastgen.models.bundle import Bundle

ALIGNMENT = 256  # bytes, of a context's device memory


@dataclass
class OpenPlan:
    """A plan ready to run `rows` rows. `memory`: the tensor its context computes in, kept for as long as a graph may replay it.
    `addresses`: of its inputs and outputs, as bound last. `ran`: whether it was executed before."""

    engine: Any
    context: Any
    signature: Signature
    rows: int
    memory: Any
    addresses: dict[str, int] = field(default_factory=dict)
    ran: bool = False


class TrtEngine(TorchEngine):
    """Runs plans of a TensorRT product on a GPU."""

    source_kind = "bundle"
    dtypes = ("fp16", "bf16", "fp32", *EIGHT_BITS)
    static_shapes = True
    product: ClassVar[Product]

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        self.dtype = base.choose_dtype(type(self), dtype, "fp16")
        self._platform = platform.open_platform(device, self.product)
        self.open_device(self._platform.gpu.device, threads)
        self.signatures = source.spec.signatures
        self.capturable = True
        self._bundle = source
        self._engines: dict[Path, Any] = {}  # TensorRT's, by the folder of their plan
        self._plans: dict[tuple[str, int], OpenPlan] = {}
        self._memory: dict[str, Any] = {}

    @classmethod
    def problems(cls, machine: Machine) -> list[Problem]:
        """Only the GPU's problem if no GPU can run its plans. It does not run on a CPU: a "gpu" problem stops the engine."""
        from fastgen.engines.trt.problems import hardware_problem

        if problem := hardware_problem(cls.product, machine):
            return [problem]
        return [replace(p, scope="engine") if p.scope == "gpu" else p for p in super().problems(machine)]

    @classmethod
    def library_problems(cls, machine: Machine) -> Iterator[Problem]:
        from fastgen.engines.trt.problems import tensorrt_problems

        yield from super().library_problems(machine)
        yield from tensorrt_problems(cls.product, machine)

    @abc.abstractmethod
    def plan(self, network: str, rows: int) -> Artifact:
        """The plan for so many rows of a network. Raises InputError, with the command that helps, when there is none."""

    @abc.abstractmethod
    def bound(self, network: str) -> Mapping[str, str | float | None]:
        """The fields of a recipe that bind a plan to library and hardware, see `make_recipe`."""

    @abc.abstractmethod
    def context(self, engine: Any, what: str, signature: Signature, rows: int) -> tuple[Any, int]:
        """An execution context for so many rows, and the bytes of device memory that it computes in."""

    def after_first_run(self, plan: OpenPlan) -> None:
        """Called after the first run of a plan at its number of rows, never while a graph is recorded."""

    def build_command(self, network: str, rows: int) -> str:
        """The `fastgen export` that builds a plan of `rows` rows; a guided image takes two rows of the UNet."""
        size = max(1, rows // 2) if network == "unet" else rows
        return build_command(self._bundle.folder, self, size)

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        """One forward of `network`. The outputs are new tensors, in the graph's pool while a graph is recorded."""
        rows = self.checked_rows(network, inputs)
        plan = self._plans.get((network, rows)) or self._open(network, rows)
        signature = plan.signature
        inputs = tuple(x.contiguous() for x in inputs)  # TensorRT reads addresses
        outputs = tuple(self._empty(t, rows) for t in signature.outputs)
        with self._platform.gpu.stream() as stream:
            for tensor, value in zip((*signature.inputs, *signature.outputs), (*inputs, *outputs), strict=True):
                self._bind(plan, tensor.name, value.data_ptr())
            if not plan.context.execute_async_v3(stream):
                raise self._platform.failure(f"engine {self.name}: {network} at {rows} rows failed")
        if not plan.ran:
            plan.ran = True
            self.after_first_run(plan)
        return outputs

    def recipe(self, network: str, rows: int | None) -> Recipe:
        """Cache key of a plan for so many rows; a None field matches anything."""
        return make_recipe(self._bundle, network, rows, self.dtype, self.product, self.bound(network))

    def release_memory(self) -> None:
        """Drop all plans with their weights and memory; they are opened again when they are needed."""
        self.synchronize()
        self._plans.clear()
        self._engines.clear()
        self._memory.clear()
        super().release_memory()

    def _open(self, network: str, rows: int) -> OpenPlan:
        """Open a plan, its bytes verified, and give its context memory to compute in.

        Plans of one network share that memory: they run one after another, on one stream at a time. Networks do not share
        it, as the VAE decodes one batch while the UNet samples the next. A plan that needs more than there is gets a new
        block, and older plans keep theirs, which recorded graphs point into: load the largest batch first.
        """
        artifact = self.plan(network, rows)
        torch, signature, what = self._torch, self.signatures[network], f"engine {self.name}: {artifact.recipe}"
        if artifact.folder not in self._engines:
            data = read_verified(artifact, PLAN)
            self._engines[artifact.folder] = open_engine(self._platform, data, what, signature)
        engine = self._engines[artifact.folder]
        context, size = self.context(engine, what, signature, rows)
        memory = self._memory.get(network)
        if memory is None or memory.numel() < size:
            memory = torch.empty(max(size, ALIGNMENT), dtype=torch.uint8, device=self.device)  # torch aligns to 512
            self._memory[network] = memory
        context.set_device_memory(memory.data_ptr(), memory.numel())
        plan = self._plans[network, rows] = OpenPlan(engine, context, signature, rows, memory)
        return plan

    def _bind(self, plan: OpenPlan, name: str, address: int) -> None:
        if plan.addresses.get(name) != address:
            if not plan.context.set_tensor_address(name, address):
                raise self._platform.failure(f"engine {self.name}: {name} cannot be bound")
            plan.addresses[name] = address

    def _empty(self, tensor: TensorSpec, rows: int) -> Any:
        dtype = getattr(self._torch, tensor.dtype)
        return self._torch.empty(tensor.with_batch(rows), dtype=dtype, device=self.device)
