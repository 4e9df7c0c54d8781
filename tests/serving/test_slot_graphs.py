"""Slots on a GPU: each number of images is recorded once, joins are copies, and nothing waits for the host.

Over a double of torch's streams and graphs (tests/cuda_double.py); the same tests run on a GPU where there is one.
"""

from __future__ import annotations

import random

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cuda_double  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.generate.requests import Request  # noqa: E402
from fastgen.generate.run import Run  # noqa: E402
from fastgen.sampling import streams  # noqa: E402
from fastgen.serving.sampling import sample_of  # noqa: E402
from fastgen.serving.slots import Slots  # noqa: E402

SOLVERS = [("ddim", 6), ("ddpm", 5), ("pndm", 6), ("dpmpp-2m", 6), ("dpmpp-2m-sde", 6), ("pndm-prk", 4)]
SIZES = (1, 2, 4)
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "equal", "masked_select"}


@pytest.fixture
def cuda(monkeypatch):
    yield cuda_double.install(monkeypatch)
    streams._streams.cache_clear()


@pytest.fixture(scope="module")
def pipeline(label_model):
    return load(label_model, "eager", device="cpu")


class Capturable:
    """The engine as one that may be recorded, or one that records its own graphs."""

    device = "cpu"

    def __init__(self, engine, capturable):
        self._engine, self.capturable = engine, capturable

    def array(self, values):
        return torch.from_numpy(np.array(values))

    def run(self, *inputs):
        return self._engine.run(*inputs)

    def run_guided(self, *inputs):
        return self._engine.run_guided(*inputs)


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def runs_of(pipeline, count):
    rng, names = random.Random(0), sorted(pipeline.spec.condition.labels)
    for i in range(count):
        scheduler, steps = SOLVERS[i % len(SOLVERS)]
        settings = pipeline.settings(
            scheduler=scheduler, num_inference_steps=steps, guidance_scale=rng.choice([1.0, 2.5]),
            guidance_interval=rng.choice([None, (1, 3)]),
        )  # fmt: skip
        request = Request(str(i), f"{i}.png", labels=tuple(rng.sample(names, 2)), seed=rng.randrange(2**63))
        yield Run(pipeline, [request], settings)


def drive(slots, samples):
    """All samples, which join in turn while others are on their way: the final states."""
    rng, active, results, waiting = random.Random(1), {}, {}, list(enumerate(samples))
    while waiting or active:
        if waiting and slots.free:
            position, sample = waiting.pop(0)
            active[slots.add(sample)] = position
        for number in slots.tick(rng.sample(sorted(active), rng.randint(1, min(4, len(active))))):
            results[active.pop(number)] = slots.states([number])[0].clone().cpu()
            slots.remove(number)
    return [results[i] for i in range(len(samples))]


@pytest.mark.parametrize("capturable", [True, False])
def test_recorded_ticks_end_as_each_image_does_alone(cuda, pipeline, capturable):
    runs = list(runs_of(pipeline, 12))
    slots = Slots(
        Capturable(pipeline.engine, capturable), pipeline.spec.scheduler_config, capacity=5, sizes=lambda guided: SIZES,
        graphs=True,
    )  # fmt: skip
    results = drive(slots, [sample_of(run) for run in runs])
    for run, result in zip(runs, results, strict=True):
        expected = run.latents(run.batches(1)[0])[0]
        torch.testing.assert_close(result, expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
    assert {size for size, _, _ in slots._recorded} <= set(SIZES)


def test_a_tick_does_not_wait_for_the_device(pipeline):
    slots = Slots(
        Capturable(pipeline.engine, True), pipeline.spec.scheduler_config, capacity=4, sizes=lambda guided: SIZES
    )
    numbers = [slots.add(sample_of(run)) for run in runs_of(pipeline, 4)]
    with NoHostReads():
        slots.tick(numbers)
        slots.states(numbers)
        slots.clean(numbers)


def test_a_deeper_history_and_a_larger_store_are_recorded_anew(cuda, pipeline):
    def run_of(scheduler, steps):
        settings = pipeline.settings(scheduler=scheduler, num_inference_steps=steps, guidance_scale=1.0)
        return Run(pipeline, [Request("0", "0.png", labels=("red cube",), seed=3)], settings)

    slots = Slots(
        Capturable(pipeline.engine, True), pipeline.spec.scheduler_config, capacity=3, sizes=lambda guided: SIZES, graphs=True
    )  # fmt: skip
    first, deep, long = run_of("ddim", 6), run_of("pndm-prk", 4), run_of("ddpm", 1000)
    one = slots.add(sample_of(first))
    slots.tick([one])
    recorded = dict(slots._recorded)
    two, three = (
        slots.add(sample_of(deep)),
        slots.add(sample_of(long)),
    )  # one deepens the history, one makes the store grow
    while slots.tick([one, two]) != [one]:
        pass
    assert not set(recorded.values()) & set(slots._recorded.values())
    expected = first.latents(first.batches(1)[0])[0]
    torch.testing.assert_close(slots.states([one])[0], expected, atol=2e-4 * float(expected.abs().max()), rtol=0)
    assert slots[three].row == 0


@pytest.mark.gpu
def test_on_a_gpu_recorded_ticks_end_as_each_image_does_alone(label_model):
    pipeline = load(label_model, "eager", device="cuda")
    runs = list(runs_of(pipeline, 12))
    slots = Slots(pipeline.engine, pipeline.spec.scheduler_config, capacity=5, sizes=lambda guided: SIZES, graphs=True)
    for run, result in zip(runs, drive(slots, [sample_of(run) for run in runs]), strict=True):
        expected = run.latents(run.batches(1)[0])[0].cpu()
        torch.testing.assert_close(result, expected, atol=1e-3 * float(expected.abs().max()), rtol=0)
