"""One run: requests with settings on a pipeline, in batches that share a solver table, conditions and a start."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.engines.batches import Batch, cut
from fastgen.errors import InputError
from fastgen.generate.conditions import Conditions
from fastgen.generate.decoder import Pictures
from fastgen.generate.feature_cache import CachingDenoiser, check_cache, networks_of_rows
from fastgen.generate.requests import Request, resolve_seed
from fastgen.generate.settings import Settings
from fastgen.generate.start import Start
from fastgen.generate.strips import Frames, StripPlan
from fastgen.sampling.loop import guided_rows, initial_latents, sample_steps

if TYPE_CHECKING:
    from fastgen.engines.base import Array
    from fastgen.generate.runner import ModelRunner
    from fastgen.sampling.tables import SolverTable


class Run:
    """Requests with settings on a pipeline. All batches share `table`, `conditions`, and the guided rows of the table: `guided`
    = (first, last + 1); `networks`: that each row runs.

    `start`: where images start, None for noise. `strip`: training timesteps at which each image's denoising is shown.
    `table`, `conditions`: of an earlier run of the same settings, and the same conditions, on this pipeline.
    Raises InputError for requests of the wrong kind, a solver or guidance interval that this model cannot have, a late start
    in `settings` without `start` or the reverse, and timesteps that training never saw.
    """

    def __init__(
        self,
        pipeline: ModelRunner,
        requests: Sequence[Request],
        settings: Settings,
        start: Start | None = None,
        *,
        strip: Sequence[int] | None = None,
        table: SolverTable | None = None,
        conditions: Conditions | None = None,
    ) -> None:
        self.pipeline, self.requests, self.settings, self.start = pipeline, requests, settings, start
        if (start is None) != (settings.noise_steps is None):
            raise InputError("noise_steps and the latents to start from go together: give both or neither")
        if settings.cache_interval > 1:
            check_cache(pipeline)
        spec = pipeline.spec
        self.table = table or pipeline.source.table(settings.solver)
        self.conditions = conditions or Conditions(
            pipeline.engine, spec.condition, pipeline.tokenizers, requests, settings.guidance_scale
        )
        self.scale = settings.guidance_scale if self.conditions.guided else 1.0  # of the loop's guidance
        if settings.guidance_interval is not None and spec.condition.guidance_width:
            raise InputError(
                "guidance_interval: this model takes the guidance scale as an input, the same at every step"
            )
        self.guided = guided_rows(self.table, self.scale, True, settings.guidance_interval)
        first, last = self.guided
        rows = [first <= i < last for i in range(len(self.table))]
        self.networks = networks_of_rows(rows, settings.cache_interval)
        timesteps = int(spec.scheduler_config.get("num_train_timesteps", 1000))
        self.strip = None if strip is None else StripPlan.of(self.table, strip, timesteps)

    def batches(self, limit: int) -> list[Batch]:
        """All requests in batches of at most `limit`, of sizes that the engine has, see `batches.cut`. Raises InputError."""
        return cut(len(self.requests), limit, self.pipeline.buckets(self.settings))

    def begin(
        self, batch: Batch, *, decode_batch_size: int | None = None, on_row: Callable[[int], None] | None = None
    ) -> Callable[[], Pictures]:
        """Begin with one batch, and return a function that waits for its pictures.

        On a GPU this returns when all work is queued: begin with the next batch before you wait for this one.
        `decode_batch_size`: images per forward of the VAE decoder, by default `Decoder.most`. `on_row(i)` is called when row i
        of the table has run (on a GPU: is queued), and with -1 before the first row.
        """
        frames = None if self.strip is None else Frames(self.strip, len(batch))
        with np.errstate(over="ignore", invalid="ignore"):  # the decoder checks for broken images
            for row, x in self.steps(batch):
                if frames is not None:
                    frames.keep(row, x)
                if on_row is not None:
                    on_row(row)
        decode = partial(self.pipeline.decoder.start, normalize=self.settings.normalize, limit=decode_batch_size)
        wait = decode(x[: len(batch)])
        return wait if frames is None else frames.start(decode, wait)

    def images(self, batch: Batch) -> np.ndarray:
        """The batch's images (B, channels, H, W) float32, nominally in [-1, 1], not checked."""
        return self.pipeline.engine.numpy(self.pipeline.decoder.decode(self.latents(batch)))

    def latents(self, batch: Batch) -> Array:
        """The batch's final states (B, C, h, w) float32, an array of the engine."""
        with np.errstate(over="ignore", invalid="ignore"):
            return deque(self.steps(batch), maxlen=1)[0][1][: len(batch)]

    def steps(self, batch: Batch) -> Iterator[tuple[int, Array]]:
        """The loop: yields (i, state after row i of the table); i = -1 for the state it starts from. States are arrays of the
        engine (B, C, h, w), with B = bucket where it has static shapes. On a GPU the next row may overwrite them."""
        pipeline, settings = self.pipeline, self.settings
        engine, requests = pipeline.engine, self.requests[batch.rows]
        if engine.static_shapes:  # the last request fills the batch up
            requests = [*requests, *[requests[-1]] * (batch.bucket - len(batch))]
        seeds = engine.array(np.array([resolve_seed(r, settings.seed) for r in requests], np.int64))
        clean = None if self.start is None else engine.array(self.start.latents(requests))
        x = initial_latents(self.table, seeds, pipeline.spec.space.shape, clean)
        yield -1, x
        cond = self.conditions(requests)
        options: dict[str, Any] = {
            "seeds": seeds,
            "guidance_scale": self.scale,
            "uncond": self.conditions.uncond(requests) if self.conditions.guided else None,
            "guidance_interval": settings.guidance_interval,
        }
        if pipeline.on_gpu:
            yield from pipeline.loop(self.table, x, cond).steps(x, cond, **options)
        elif settings.cache_interval > 1:
            denoiser = CachingDenoiser(engine, self.networks)
            yield from sample_steps(denoiser.plain, self.table, x, cond, guided=denoiser.guided, **options)
        else:
            network = lambda *inputs: engine.run("unet", *inputs)[0]  # noqa: E731
            yield from sample_steps(network, self.table, x, cond, guided=engine.run_guided, **options)
