"""A model on an engine: the loops that are recorded for it on a GPU, its decoder, and the memory that both take."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError
from fastgen.generate.decoder import Decoder
from fastgen.generate.settings import Settings
from fastgen.sampling.device_loop import DeviceLoop
from fastgen.sampling.tables import SolverTable

if TYPE_CHECKING:
    from fastgen.engines.base import Array, Engine
    from fastgen.engines.memory import Memory
    from fastgen.models.spec import Source


class ModelRunner:
    """Runs a model on an engine.

    `graphs`: record the loop as CUDA graphs; by default on a GPU, except with the reference engine. `open_exact` builds this
    engine in fp32; NaN or flat images are decoded again on it.
    """

    def __init__(
        self,
        source: Source,
        engine: Engine,
        *,
        graphs: bool | None = None,
        open_exact: Callable[[], Engine] | None = None,
    ) -> None:
        self.source, self.engine, self.spec = source, engine, source.spec
        self.tokenizers = source.prompt_tokenizers() if self.spec.condition.text is not None else []
        self.decoder = Decoder(engine, self.spec, open_exact)
        self.on_gpu = engine.device.startswith("cuda")
        if graphs and not self.on_gpu:
            raise InputError(f"CUDA graphs need a GPU; engine {engine.name} runs on {engine.device}")
        self.graphs = self.on_gpu and not engine.reference if graphs is None else graphs
        self._loops: dict[tuple[str, int], DeviceLoop] = {}
        self.memory: dict[str, Memory] = {}  # of each network on a GPU, once a job has measured it

    def settings(self, **given: Any) -> Settings:
        """Settings of a run that starts from noise, see `Settings.of`."""
        return Settings.of(self.spec.sampling, **given)

    def loop(self, table: SolverTable, x: Array, cond: Sequence[Array]) -> DeviceLoop:
        """The loop on a GPU for this table and batch size; loops of other tables are dropped with their memory."""
        if any(other != table.key for other, _ in self._loops):
            self._drop_loops()
        key = (table.key, len(x))
        if key not in self._loops:
            pool = next((loop.pool for loop in self._loops.values() if loop.pool), None)
            self._loops[key] = DeviceLoop(self.engine, table, x.shape, cond, graphs=self.graphs, pool=pool)
        return self._loops[key]

    def _drop_loops(self) -> None:
        """Drop all loops and free their memory; the collector is needed for those in reference cycles."""
        self.engine.synchronize()  # none of them is running
        self._loops.clear()
        gc.collect()

    def guided(self, settings: Settings) -> bool:
        """Whether an image takes two rows of the denoiser: with guidance, unless the model takes its scale as an input."""
        return settings.guided and not self.spec.condition.guidance_width

    def buckets(self, settings: Settings) -> Sequence[int] | None:
        """Batch sizes in images that the engine was compiled for; None for any. With a guidance interval those that it has for
        guided and for other rows."""
        sizes = self.engine.buckets(self.guided(settings))
        if sizes is None or not self.guided(settings) or settings.guidance_interval is None:
            return sizes
        both = sorted(set(sizes) & set(self.engine.buckets(False) or ()))
        if not both:
            raise InputError(
                f"engine {self.engine.name} has no batch size for both guided and unguided rows; build for more"
            )
        return both

    def free_memory(self) -> None:
        """Drop recorded graphs and give unused device memory back."""
        self._drop_loops()
        self.engine.release_memory()
