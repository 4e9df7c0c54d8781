"""What a bundle is asked to hold besides the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.models.bundle import plan_graph
from fastgen.models.bundle_record import Weights
from fastgen.models.signatures import EIGHT_BITS, network_dtype

if TYPE_CHECKING:
    from export.task_score import Task
    from fastgen.models.folder import Model


@dataclass(frozen=True)
class BundleOptions:
    """What a bundle holds besides the model itself: tables of `solvers`, `NAME:STEPS[:NOISE_STEPS]`, and graphs in `dtype`.

    `plans`: whether TensorRT builds plans from them, which has graphs in eight bits of its own. `calibration`: a request file
    for graphs in eight bits; None: the certificate's requests. `task`: of the certificate, which is checked before anything is
    exported. `feature_cache`: the networks of a split UNet too, in fp32. `weights`: the precision in which graphs that compute
    in fp32 keep theirs on disk; None: fp32 in a new bundle, as it is in an old one.
    """

    solvers: Sequence[str] = ()
    dtype: str = "fp32"
    plans: bool = False
    calibration: Path | None = None
    task: Task | None = None
    feature_cache: bool = False
    weights: Weights | None = None

    def graphs(self, model: Model) -> dict[str, str]:
        """Network -> precision, of all graphs in less than fp32; see `graph_name`."""
        dtypes = {name: network_dtype(name, self.dtype) for name in model.spec.signatures}
        return {name: plan_graph(dtype) if self.plans else dtype for name, dtype in dtypes.items() if dtype != "fp32"}

    def distances(self) -> list[str]:
        """Precisions whose distance from fp32 in eager certificates need: `dtype`, and bf16, a CPU's default."""
        return ["bf16"] if self.dtype in ("fp32", "bf16", *EIGHT_BITS) else ["bf16", self.dtype]
