"""A run of one image as a sample for the slots."""

from __future__ import annotations

import numpy as np

from fastgen.generate.requests import resolve_seed
from fastgen.generate.run import Run
from fastgen.sampling.loop import initial_latents
from fastgen.serving.advance import Sample


def sample_of(run: Run) -> Sample:
    """The sample of a run's only request: its table, conditions and the state that it starts from."""
    (request,), engine = run.requests, run.pipeline.engine
    seed = resolve_seed(request, run.settings.seed)
    clean = None if run.start is None else engine.array(run.start.latents([request]))
    seeds = engine.array(np.array([seed], np.int64))
    x = initial_latents(run.table, seeds, run.pipeline.spec.space.shape, clean)
    uncond = tuple(u[:1] for u in run.conditions.uncond([request])) if run.conditions.guided else ()
    return Sample(run.table, seed, x, run.conditions([request]), uncond, run.scale, run.guided)
