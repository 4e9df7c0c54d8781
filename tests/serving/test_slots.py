"""Images that join a running batch at any step end as they do alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.sampling.tables import SolverTable
from fastgen.serving.advance import Sample
from fastgen.serving.sampling import sample_of
from fastgen.serving.slots import Slots

SOLVERS = [
    ("ddim", 8),
    ("dpmpp-2m", 10),
    ("ddpm", 12),
    ("unipc", 6),
    ("pndm", 8),
    ("euler-ancestral", 7),
    ("pndm-prk", 5),
]
CONFIG = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2"}


def runs_of(pipeline, labels, count, seed):
    """Random requests of a label model, each a run of its own."""
    rng = random.Random(seed)
    names = sorted(pipeline.spec.condition.labels)
    for i in range(count):
        scheduler, steps = rng.choice(SOLVERS)
        interval = rng.choice([None, None, (1, steps - 1)])
        options = pipeline.settings(
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=rng.choice([1.0, 1.5, 3.0]),
            guidance_interval=interval,
        )
        request = Request(
            str(i), f"{i}.png", labels=tuple(rng.sample(names, rng.randint(1, 3))), seed=rng.randrange(2**63)
        )
        yield Run(pipeline, [request], options)


def drive(slots, samples, seed, room=5, cancel=()):
    """Random joins, rests and leaves until all are done: position of each sample -> its final state."""
    rng, waiting, active, results = random.Random(seed), list(enumerate(samples)), {}, {}
    while waiting or active:
        while waiting and slots.free and rng.random() < 0.5:
            position, sample = waiting.pop(0)
            active[slots.add(sample)] = position
        for number in [number for number, position in active.items() if position in cancel and rng.random() < 0.3]:
            slots.remove(number)
            del active[number]
        chosen = rng.sample(sorted(active), rng.randint(0, min(room, len(active))))
        for number in slots.tick(chosen):
            results[active.pop(number)] = np.asarray(slots.states([number])[0])
            slots.remove(number)
    return results


@pytest.mark.parametrize(("engine", "dtype"), [("ort", None), ("openvino", None), ("openvino", "fp32")])
def test_a_state_has_the_bytes_that_it_has_alone(label_bundle, engine, dtype):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    pipeline = load(label_bundle, engine, dtype=dtype)
    runs = list(runs_of(pipeline, None, 24, seed=1))
    sizes = [1, 2, 3, 4] if pipeline.engine.static_shapes else None
    slots = Slots(pipeline.engine, pipeline.spec.scheduler_config, capacity=7, sizes=lambda guided: sizes)
    results = drive(slots, [sample_of(run) for run in runs], seed=2)
    for position, run in enumerate(runs):
        (batch,) = run.batches(1)
        np.testing.assert_array_equal(results[position], run.latents(batch)[0], err_msg=run.table.key)
    assert len(slots) == 0
    assert slots.free == 7


def test_the_reference_engine_agrees_to_rounding(label_model):
    pytest.importorskip("torch")
    pipeline = load(label_model, "eager", threads=1)
    runs = list(runs_of(pipeline, None, 12, seed=3))
    slots = Slots(pipeline.engine, pipeline.spec.scheduler_config, capacity=5, sizes=lambda guided: None)
    results = drive(slots, [sample_of(run) for run in runs], seed=4)
    for position, run in enumerate(runs):
        (batch,) = run.batches(1)
        expected = run.latents(batch)[0].numpy()
        np.testing.assert_allclose(results[position], expected, atol=2e-4 * np.abs(expected).max())


class Counting:
    """An engine whose network adds up what it is given; it records the forwards' rows."""

    device, capturable = "cpu", False

    def __init__(self):
        self.forwards = []

    def array(self, values):
        return np.ascontiguousarray(values)

    def run(self, network, sample, timestep, *conds):
        self.forwards.append((False, len(sample)))
        return (sample * 0.5 + conds[0].reshape(-1, 1, 1, 1) + timestep.reshape(-1, 1, 1, 1) / 1000,)

    def run_guided(self, sample, timestep, *conds):
        both = [np.concatenate([v, v]) for v in (sample, timestep)]
        prediction = self.run("unet", *both, *conds)[0]
        self.forwards[-1] = (True, len(sample))
        return prediction


def table_of(rows, depth, seed):
    """A solver table of random coefficients; every third row draws noise."""
    rng = np.random.default_rng([rows, depth, seed])
    columns = {name: rng.normal(size=rows) * 0.3 for name in ("p", "q", "x0_p", "x0_q", "a")}
    zero = np.zeros(rows)
    c = np.where(np.arange(rows) % 3 == 1, 0.1, 0.0)
    clip = None if seed % 2 else 0.7
    more = {"r": zero, "d": zero + 0.1} if clip else {"r": zero, "d": zero}
    return SolverTable(
        timesteps=np.linspace(900, 1, rows), scale=rng.uniform(0.5, 1, rows), b=rng.normal(size=(rows, depth)) * 0.2,
        c=c, streams=1 + np.arange(rows), clip=clip, init_alpha=0.0, init_sigma=1.0, name=f"table{seed}-{depth}",
        num_inference_steps=rows, noise_steps=None, prediction_type="epsilon", basis="net", **columns, **more,
    )  # fmt: skip


def sample_for(rows, depth, seed, guided):
    table = table_of(rows, depth, seed % 5)
    value = np.full((1, 1), seed / 10, np.float32)
    x = np.random.default_rng(seed).normal(size=(1, 2, 3, 3)).astype(np.float32)
    span = (0, rows) if guided == 1 else (0, 0) if guided == 0 else (rows // 2, rows)
    return Sample(table, seed, x, (value,), (value * 0,) if guided else (), 2.0, span)


samples = st.builds(sample_for, st.integers(1, 9), st.integers(1, 6), st.integers(0, 40), st.integers(0, 2))


@settings(max_examples=60, deadline=None)
@given(st.lists(samples, min_size=1, max_size=12), st.integers(0, 2**32), st.sets(st.integers(0, 11), max_size=3),
       st.sampled_from([None, (1, 2, 4), (3,)]))  # fmt: skip
def test_no_image_is_lost_doubled_or_mixed_up(samples, seed, cancel, sizes):
    engine = Counting()
    slots = Slots(engine, CONFIG, capacity=6, sizes=lambda guided: sizes)
    together = drive(slots, samples, seed, room=6, cancel=cancel)
    assert set(together) >= set(range(len(samples))) - cancel
    assert slots.free == 6
    for position, final in together.items():
        alone = Slots(Counting(), CONFIG, capacity=1, sizes=lambda guided: None)
        number = alone.add(samples[position])
        for row in range(len(samples[position].table)):
            assert alone[number].row == row
            done = alone.tick([number])
        assert done == [number]
        np.testing.assert_array_equal(final, alone.states([number])[0])
    if sizes is not None:
        assert {rows for _, rows in engine.forwards} <= set(sizes)


def test_forwards_tell_what_a_tick_will_run():
    engine = Counting()
    slots = Slots(engine, CONFIG, capacity=6, sizes=lambda guided: (1, 2, 4))
    numbers = [slots.add(sample_for(4, 2, seed, guided)) for seed, guided in enumerate([0, 1, 1, 1, 0])]
    told = slots.forwards(numbers)
    slots.tick(numbers)
    assert told == engine.forwards == [(False, 2), (True, 4)]


def test_an_image_leaves_nothing_behind_for_the_next_one_in_its_slot():
    slots = Slots(Counting(), CONFIG, capacity=1, sizes=lambda guided: None)
    poison = sample_for(5, 4, 3, 0)
    number = slots.add(Sample(poison.table, 0, np.full_like(poison.x, np.nan), poison.cond))
    slots.tick([number])
    slots.remove(number)
    number = slots.add(sample_for(5, 4, 4, 0))
    for _ in range(5):
        slots.tick([number])
    assert np.isfinite(slots.states([number])).all()


def test_many_tables_share_the_store_and_unused_ones_make_room():
    slots = Slots(Counting(), CONFIG, capacity=2, sizes=lambda guided: None)
    for steps in range(1, 120):
        sample = Sample(table_of(steps, 2, 1), 1, *[sample_for(1, 1, 7, 0).x], sample_for(1, 1, 7, 0).cond)
        number = slots.add(sample)
        slots.tick([number])
        slots.remove(number)
    assert len(slots._store._values) == 1024  # 7,140 rows have been there
