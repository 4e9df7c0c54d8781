"""TensorRT plans on an NVIDIA GPU: one per network and number of rows, built beforehand by `fastgen export --trt`.

Plans come from the cache of compiled engines. A missing one is an error: nothing is built, and no other engine runs instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastgen.engines.cache import artifacts
from fastgen.engines.cache.artifacts import Artifact
from fastgen.engines.trt.plan import BUILDER, open_context
from fastgen.engines.trt.plan_engine import TrtEngine
from fastgen.engines.trt.product import TENSORRT
from fastgen.engines.unready import ready_now
from fastgen.errors import NotReadyError
from fastgen.files.installing import Install
from fastgen.models.bundle import read_bundle
from fastgen.models.signatures import Signature

if TYPE_CHECKING:
    from pathlib import Path

    from fastgen.models.bundle import Bundle


class Engine(TrtEngine):
    name = "trt"
    product = TENSORRT
    packages = ("torch", TENSORRT.module)
    install = Install("trt", "tensorrt-cu12 beside a torch for CUDA 12")
    built_by = TENSORRT.option

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        super().__init__(source, device=device, dtype=dtype, threads=threads)
        self._built: dict[str, dict[int, Artifact]] = {}

    @classmethod
    def priority(cls, folder: Path, device: str | None) -> int:
        """The first of all where plans were ever built from graphs of this bundle."""
        if not (device or "cuda").startswith("cuda"):
            return 0
        graphs = {file.sha256 for file in read_bundle(folder).files.values()}
        return 5 if any(a.recipe.fields.get("graph_sha256") in graphs for a in artifacts.scan(cls.name)[0]) else 0

    def batch_sizes(self, network: str) -> Sequence[int]:
        """The numbers of rows that plans were built for. Raises InputError when there are none."""
        sizes = sorted(self._artifacts(network))
        if not sizes:
            raise self._missing(network)
        return sizes

    def plan(self, network: str, rows: int) -> Artifact:
        known = self._artifacts(network).get(rows)
        artifact = artifacts.find(known.recipe) if known else None
        if artifact is None:
            raise self._missing(network, rows)
        return artifact

    def bound(self, network: str) -> Mapping[str, str | float | None]:
        """The platform's fields; the builder's settings (None) match anything."""
        return self._platform.fields | dict.fromkeys(BUILDER)

    def context(self, engine: Any, what: str, signature: Signature, rows: int) -> tuple[Any, int]:
        strategy = self._platform.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        context = open_context(self._platform, engine, strategy, what, signature, rows)
        return context, engine.device_memory_size_v2

    def _artifacts(self, network: str) -> dict[int, Artifact]:
        """Rows -> the plan for this bundle, precision, GPU and TensorRT; of several that of the highest optimisation level."""
        if network not in self._built:
            near = artifacts.ranked(self.recipe(network, None), artifacts.artifacts(self.name))
            fitting = [artifact for artifact, different in near if not different]
            fitting.sort(key=lambda a: (a.recipe.fields["optimization_level"], a.built))
            self._built[network] = {int(a.recipe.fields["batch"]): a for a in fitting}  # type: ignore[arg-type]
        return self._built[network]

    def _missing(self, network: str, rows: int | None = None) -> NotReadyError:
        """The error for a missing plan: how the nearest one differs, and the command that builds it."""
        self._built.pop(network, None)  # look again next time
        recipe = self.recipe(network, rows)
        near = artifacts.ranked(recipe, artifacts.artifacts(self.name))
        different = ", ".join(map(str, near[0][1])) if near else ""
        nearest = f"in the nearest one {different}" if near else f"none of {network} was ever built here"
        what = f"{network}{f' for {rows} rows' if rows else ''} in {recipe.fields['dtype']}"
        instead = "" if rows else ready_now()
        return NotReadyError(
            f"engine trt has no plan of {what}: {nearest}; run `{self.build_command(network, rows or 1)}`{instead}"
        )
