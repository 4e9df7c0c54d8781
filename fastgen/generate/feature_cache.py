"""Caching of deep features between evaluations of the UNet, `--cache-interval` (Ma et al., DeepCache, 2023).

A UNet's deep features change little from one step to the next: most evaluations run its outermost blocks alone, and take the
deep feature that the last whole evaluation left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgen.errors import InputError
from fastgen.models.signatures import UNET_SHALLOW, UNET_WHOLE

if TYPE_CHECKING:
    from fastgen.engines.base import Array, Engine
    from fastgen.generate.runner import ModelRunner


def check_cache(pipeline: ModelRunner) -> None:
    """InputError where a pipeline cannot cache deep features."""
    engine = pipeline.engine
    if not engine.splits or pipeline.on_gpu:
        raise InputError(
            f"--cache-interval: for engines eager, ort and openvino on a CPU, not {engine.name} on {engine.device}"
        )
    if engine.dtype == "int8":
        raise InputError("--cache-interval: there are no graphs in int8 for it; give another --dtype")
    pipeline.source.check_split()


def networks_of_rows(guided: Sequence[bool], interval: int) -> list[str]:
    """The network that each row of a solver table runs. `guided`: whether the row is guided.

    Whole is every `interval`-th evaluation, the first of them, and where guidance begins or ends: its deep feature has other
    rows.
    """
    if interval == 1:
        return ["unet"] * len(guided)
    networks: list[str] = []
    age = 0  # evaluations since the last whole one
    for i, is_guided in enumerate(guided):
        age = 0 if i == 0 or age + 1 == interval or is_guided != guided[i - 1] else age + 1
        networks.append(UNET_SHALLOW if age else UNET_WHOLE)
    return networks


class CachingDenoiser:
    """The denoisers of one batch, for `loop.sample_steps`: they are called once for each row, in order.

    `networks`: of the rows, see `networks_of_rows`."""

    def __init__(self, engine: Engine, networks: Sequence[str]) -> None:
        self._engine, self._networks = engine, iter(networks)
        self._deep: Array = None

    def plain(self, sample: Array, timestep: Array, *cond: Array) -> Array:
        """The prediction (B, ...) under the conditions (B, ...)."""
        network = next(self._networks)
        return self._kept(self._engine.run(network, sample, timestep, *self._inputs(network, cond)))

    def guided(self, sample: Array, timestep: Array, *conds: Array) -> Array:
        """The predictions (2B, ...) under the conditions (2B, ...), see `Engine.run_guided`."""
        network = next(self._networks)
        return self._kept(self._engine.run_halves(network, sample, timestep, *self._inputs(network, conds)))

    def _inputs(self, network: str, cond: Sequence[Array]) -> Sequence[Array]:
        return (*cond, self._deep) if network == UNET_SHALLOW else cond

    def _kept(self, outputs: tuple[Array, ...]) -> Array:
        """The prediction; the deep feature, where the network gave one, is kept."""
        if len(outputs) > 1:
            self._deep = outputs[1]
        return outputs[0]
