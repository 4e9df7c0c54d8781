"""What a worker tells of itself when it is ready, after a first image."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastgen.errors import FastgenError
from fastgen.models.bundle import Bundle
from fastgen.sampling.compile import COMMON
from fastgen.sampling.tables import parse_key
from fastgen.serving.batch import Batcher
from fastgen.serving.messages import Condition, Failed, Finished, ImageTask, Ready, Refused, Submit
from fastgen.serving.preparing import Preparer
from fastgen.serving.warm import Warm

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner


def ready_of(pipeline: ModelRunner, warm: Warm, preparer: Preparer) -> Ready:
    """The facts about a model that clients and the service need."""
    spec, engine, default = pipeline.spec, pipeline.engine, pipeline.spec.sampling
    condition = spec.condition
    return Ready(
        condition=Condition(
            kind=condition.kind,
            takes=condition.takes,
            names=tuple(condition.names or ()),
            one=condition.labels is None and (condition.classes is not None or condition.number),
            tokens=condition.text.tokens[0] if condition.text else None,
        ),
        defaults={
            "scheduler": default.scheduler,
            "num_inference_steps": default.num_inference_steps,
            "guidance_scale": default.guidance_scale,
        },
        size=(spec.space.image[1], spec.space.image[2]),
        engine=engine.name,
        dtype=engine.dtype,
        device=engine.device,
        sha256=spec.sha256,
        checkpoint=spec.checkpoint,
        slots=warm.slots,
        exact=warm.exact,
        schedulers=tuple(dict.fromkeys((default.scheduler, *solver_names(pipeline)))),
        costs=warm.costs,
        rag=preparer.has_index,
        guidable=condition.guidable or bool(condition.guidance_width),
    )


def solver_names(pipeline: ModelRunner) -> Sequence[str]:
    """Solvers to offer: those that a bundle stores, the common ones of a model folder. More can be asked for."""
    source = pipeline.source
    return sorted({parse_key(key)[0] for key in source.solver_keys()}) if isinstance(source, Bundle) else COMMON


def first_image(batcher: Batcher, task: ImageTask) -> None:
    """Make one image from end to end. Raises FastgenError where that fails."""
    batcher.submit(Submit(0, task, "", time.monotonic()))
    while True:
        for outcome in batcher.advance(time.monotonic()):
            if isinstance(outcome, Finished):
                batcher.report()
                return
            if isinstance(outcome, Failed | Refused):
                raise FastgenError(f"the first image failed: {outcome.message}")
        if batcher.preparing:
            time.sleep(0.001)


def example_task(pipeline: ModelRunner) -> ImageTask:
    """A task that the model takes, with its defaults."""
    condition = pipeline.spec.condition
    names = list(condition.names or ())
    labels = (names[0],) if names else ("0",) if condition.number else None
    return ImageTask(seed=0, prompt="a picture" if condition.text is not None else None, labels=labels)
