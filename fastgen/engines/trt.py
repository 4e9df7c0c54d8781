"""TensorRT plans on an NVIDIA GPU: one per network and number of rows, built beforehand by `fastgen export --trt`.

Plans are looked up in the cache of compiled engines when they are first needed; nothing is built, and nothing else is run,
where one is missing. `run` queues work on the current stream and never waits for it, so that it can be recorded into a CUDA
graph once its plan is loaded, that is after a first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastgen import artifacts
from fastgen.artifacts import Artifact, Recipe
from fastgen.engines import base, base_trt
from fastgen.engines.base_torch import TorchEngine
from fastgen.engines.base_trt_plan import BUILDER, PLAN, make_recipe, open_plan, read_verified
from fastgen.errors import InputError
from fastgen.signatures import Signature, Tensor

if TYPE_CHECKING:
    from fastgen.bundle import Bundle

ALIGNMENT = 256  # bytes, of a context's device memory


@dataclass
class _Loaded:
    """A plan ready to run. `memory`: the tensor its context computes in, kept for as long as a graph may replay it.
    `addresses`: where its inputs and outputs were bound last."""

    engine: Any
    context: Any
    signature: Signature
    rows: int
    memory: Any
    addresses: dict[str, int] = field(default_factory=dict)


class Engine(TorchEngine):
    name = "trt"
    source_kind = "bundle"
    packages = ("torch", "tensorrt")
    install = "pip install tensorrt-cu13 (tensorrt-cu12 beside a torch for CUDA 12)"
    dtypes = ("fp16", "bf16", "fp32")
    static_shapes = True

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        self.dtype = base.choose_dtype(Engine, dtype, "fp16")
        self._platform = base_trt.open_platform(device)
        self.open_device(self._platform.gpu.device, threads)
        self.signatures = source.spec.signatures
        self.capturable = True
        self._bundle = source
        self._built: dict[str, dict[int, Artifact]] = {}
        self._loaded: dict[tuple[str, int], _Loaded] = {}
        self._memory: dict[str, Any] = {}

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        """One forward of `network`. The outputs are tensors of their own: while a graph is recorded, of the graph's pool."""
        rows = len(inputs[0])
        plan = self._loaded.get((network, rows)) or self._load(network, rows)
        signature = plan.signature
        inputs = tuple(self._checked(x, t, rows) for x, t in zip(inputs, signature.inputs, strict=True))
        outputs = tuple(self._empty(t, rows) for t in signature.outputs)
        with self._platform.gpu.stream() as stream:
            for tensor, value in zip((*signature.inputs, *signature.outputs), (*inputs, *outputs), strict=True):
                self._bind(plan, tensor.name, value.data_ptr())
            if not plan.context.execute_async_v3(stream):
                raise self._platform.failure(f"engine trt: {network} at {rows} rows failed")
        return outputs

    def batch_sizes(self, network: str) -> Sequence[int]:
        """The numbers of rows that plans were built for. Raises InputError when there are none."""
        sizes = sorted(self._artifacts(network))
        if not sizes:
            raise self._missing(network)
        return sizes

    def executed(self, network: str) -> str:
        from fastgen.precision import network_dtype

        return network_dtype(network, self.dtype)

    def recipe(self, network: str, rows: int) -> Recipe:
        """What a plan for so many rows is made of and for; how much effort its builder spent is left open (None)."""
        return make_recipe(self._bundle, network, rows, self.dtype, self._platform)

    def _load(self, network: str, rows: int) -> _Loaded:
        """Open a plan of the cache, its bytes verified, and give its context memory to compute in.

        Plans of one network share that memory: they run one after another, on one stream at a time. Networks do not share
        it, as the VAE decodes one batch while the UNet samples the next. A plan that needs more than there is gets a new
        block, and older plans keep theirs, which recorded graphs point into: load the largest batch first.
        """
        listed = self._artifacts(network).get(rows)
        artifact = artifacts.find(listed.recipe) if listed else None
        if artifact is None:
            raise self._missing(network, rows)
        torch, signature, what = self._torch, self.signatures[network], f"engine trt: {artifact.recipe}"
        engine, context = open_plan(self._platform, read_verified(artifact, PLAN), what, signature, rows)
        size = engine.device_memory_size_v2
        memory = self._memory.get(network)
        if memory is None or memory.numel() < size:
            memory = torch.empty(max(size, ALIGNMENT), dtype=torch.uint8, device=self.device)  # torch aligns to 512
            self._memory[network] = memory
        context.set_device_memory(memory.data_ptr(), memory.numel())
        plan = self._loaded[network, rows] = _Loaded(engine, context, signature, rows, memory)
        return plan

    def _bind(self, plan: _Loaded, name: str, address: int) -> None:
        if plan.addresses.get(name) != address:
            if not plan.context.set_tensor_address(name, address):
                raise self._platform.failure(f"engine trt: {name} cannot be bound")
            plan.addresses[name] = address

    def _empty(self, tensor: Tensor, rows: int) -> Any:
        dtype = getattr(self._torch, tensor.dtype)
        return self._torch.empty(tensor.with_batch(rows), dtype=dtype, device=self.device)

    def _checked(self, value: Any, tensor: Tensor, rows: int) -> Any:
        """A contiguous input; TensorRT reads addresses, and would read past a tensor of another shape or dtype."""
        expected = tensor.with_batch(rows)
        if tuple(value.shape) != expected or value.dtype != getattr(self._torch, tensor.dtype):
            raise ValueError(f"{tensor.name} is {value.dtype} {tuple(value.shape)}, expected {tensor.dtype} {expected}")
        return value.contiguous()

    def _artifacts(self, network: str) -> dict[int, Artifact]:
        """Rows -> the plan for this bundle, precision, GPU and TensorRT; of several the one optimised most."""
        if network not in self._built:
            wanted = _essence(self.recipe(network, 0))
            fitting = [a for a in artifacts.artifacts(self.name) if _essence(a.recipe) == wanted]
            fitting.sort(key=lambda a: (a.recipe.fields["optimization_level"], a.built))
            self._built[network] = {int(a.recipe.fields["batch"]): a for a in fitting}  # type: ignore[arg-type]
        return self._built[network]

    def _missing(self, network: str, rows: int | None = None) -> InputError:
        """Which fields differ from the nearest plan, and the command that builds the one that is missing."""
        self._built.pop(network, None)  # look again next time
        wanted, ignored = self.recipe(network, rows or 1), (*BUILDER, *(() if rows else ("batch",)))
        found = artifacts.nearest(wanted)
        differences = [d for d in (found[1] if found else []) if d.partition(" ")[0] not in ignored]
        nearest = f"in the nearest one {', '.join(differences)}" if found else f"none of {network} was ever built here"
        size = max(1, (rows or 1) // 2) if network == "unet" else rows or 1  # a guided image takes two rows
        command = f"fastgen export {self._bundle.folder} --trt --dtype {self.dtype} --batch-sizes {size}"
        where = f"{network}{f' for {rows} rows' if rows else ''} in {wanted.fields['dtype']}"
        return InputError(f"engine trt has no plan of {where}: {nearest}; run `{command}`")


def _essence(recipe: Recipe) -> dict[str, Any]:
    """What a plan must agree in to be run here, whatever its batch size and the effort spent on it."""
    return {name: value for name, value in recipe.fields.items() if name not in ("batch", *BUILDER)}
