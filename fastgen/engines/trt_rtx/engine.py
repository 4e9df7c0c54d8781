"""Plans of TensorRT for RTX on an RTX card: one per network in the bundle, for any number of rows.

`fastgen export --rtx` builds them beforehand, on any machine. A missing one is an error: no other engine runs instead. When a
plan first runs at a number of rows, TensorRT compiles kernels for the card (see `kernels`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastgen.engines import machine
from fastgen.engines.cache.artifacts import Artifact, Recipe, bundled, ranked
from fastgen.engines.cache.listing import build_command
from fastgen.engines.trt.plan import CAPABILITIES, open_context
from fastgen.engines.trt.plan_engine import OpenPlan, TrtEngine
from fastgen.engines.trt.product import RTX
from fastgen.engines.trt_rtx.kernels import RuntimeCache
from fastgen.errors import InputError
from fastgen.files.installing import Install
from fastgen.models.bundle import read_bundle
from fastgen.models.signatures import Signature

if TYPE_CHECKING:
    from pathlib import Path

    from fastgen.models.bundle import Bundle

# Fields of a recipe: the fewest rows that a plan takes, and those that it is tuned for.
PROFILE = ("least_rows", "best_rows")


class Engine(TrtEngine):
    name = "trt-rtx"
    product = RTX
    packages = ("torch", RTX.module)
    install = Install("rtx", "tensorrt-rtx-cu12 beside a torch for CUDA 12")
    built_by = RTX.option

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        unets = [a.recipe.fields for a in bundled(source, self.name) if a.recipe.fields["network"] == "unet"]
        dtypes = {fields["dtype"] for fields in unets}
        default = next((name for name in self.dtypes if name in dtypes), None)
        super().__init__(source, device=device, dtype=dtype or default, threads=threads)
        self.gpu = self._platform.gpu.name
        self._runtime_cache = RuntimeCache(self._platform)
        self._artifacts: dict[str, Artifact] = {}

    @classmethod
    def priority(cls, folder: Path, device: str | None) -> int:
        """Second to `trt`, if the bundle holds plans and a card is here that plans can be built for."""
        if not (device or "cuda").startswith("cuda") or not bundled(read_bundle(folder), cls.name):
            return 0
        return 4 if any(gpu.compute_capability in RTX.capabilities for gpu in machine.gpus()[0]) else 0

    def compiled(self) -> Sequence[Artifact]:
        """The plans in the bundle, of all cards and versions."""
        return bundled(self._bundle, self.name)

    def batch_sizes(self, network: str) -> range:
        """Every number of rows that the network's plan takes. Raises InputError when there is none for this card."""
        fields = self._plan(network).recipe.fields
        return range(int(fields["least_rows"] or 1), int(fields["batch"] or 1) + 1)

    def plan(self, network: str, rows: int) -> Artifact:
        sizes = self.batch_sizes(network)
        if rows not in sizes:
            raise InputError(
                f"engine {self.name}: {network} for {rows} rows: its plan takes {sizes[0]} to {sizes[-1]}; "
                f"run `{self.build_command(network, rows)}`"
            )
        return self._plan(network)

    def bound(self, network: str) -> Mapping[str, str | float | None]:
        """The version, and the card's compute capability if no plan covers it; any profile matches."""
        capability = self._platform.gpu.compute_capability
        covered = any(a.recipe.fields["network"] == network and _covers(a.recipe, capability) for a in self.compiled())
        return {
            RTX.module: self._platform.version,
            CAPABILITIES: None if covered else capability,
            **dict.fromkeys(PROFILE),
        }

    def context(self, engine: Any, what: str, signature: Signature, rows: int) -> tuple[Any, int]:
        """A context that compiles kernels for exactly this shape at its first run, and needs memory for this shape only. It
        records no CUDA graphs itself, as the loop does."""
        trt = self._platform.trt
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        runtime_config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
        eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
        with self._platform.gpu.active():
            self._runtime_cache.attach(runtime_config, what)
            context = open_context(self._platform, engine, runtime_config, what, signature, rows)
            return context, context.update_device_memory_size_for_shapes()

    def after_first_run(self, plan: OpenPlan) -> None:
        self._runtime_cache.save()

    def _plan(self, network: str) -> Artifact:
        """The newest plan in the bundle for this network, precision, version and card. Raises InputError when there is none."""
        if network not in self._artifacts:
            recipe, gpu, elsewhere = self.recipe(network, None), self._platform.gpu, {RTX.module, CAPABILITIES}
            same = [a for a, different in ranked(recipe, self.compiled()) if {d.field for d in different} <= elsewhere]
            if not same:
                raise self._missing(f"holds no plan of {network} in {recipe.fields['dtype']} for engine {self.name}")
            here = [a for a in same if a.recipe.fields[RTX.module] == self._platform.version]
            if not here:
                versions = sorted({str(a.recipe.fields[RTX.module]) for a in same})
                raise self._missing(
                    f"holds a plan of {network} made by {RTX.title} {', '.join(versions)}; "
                    f"{self._platform.version} is installed"
                )
            fitting = [a for a in here if _covers(a.recipe, gpu.compute_capability)]
            if not fitting:
                cards = sorted({c for a in here for c in str(a.recipe.fields[CAPABILITIES]).split()}, key=float)
                raise self._missing(
                    f"holds a plan of {network} for compute capabilities {', '.join(cards)}, "
                    f"not for {gpu.name} ({gpu.compute_capability})",
                    f" --capabilities {','.join([*cards, gpu.compute_capability])}",
                )
            self._artifacts[network] = max(fitting, key=lambda a: (a.built, int(a.recipe.fields["batch"] or 0)))
        return self._artifacts[network]

    def _missing(self, what: str, options: str = "") -> InputError:
        command = build_command(self._bundle.folder, self, None)
        return InputError(f"{self._bundle.folder}: {what}; run `{command}{options}`")


def _covers(recipe: Recipe, capability: str) -> bool:
    return capability in str(recipe.fields.get(CAPABILITIES)).split()
