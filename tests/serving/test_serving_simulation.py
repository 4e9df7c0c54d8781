"""The simulation keeps the laws that hold for every queue, and holds the policy to what it was tuned for."""

from __future__ import annotations

import pytest

from benchmarks.report import percentile
from benchmarks.serving_simulation import (
    MIX,
    Arrival,
    Costs,
    StepLevel,
    capacity,
    one_by_one,
    poisson,
    static,
)
from fastgen.serving.policy import Curve

SIZES = (1, 2, 3, 4, 6, 8)


def costs(fixed_s: float, image_s: float, slots: int = 4) -> Costs:
    return Costs(Curve({n: fixed_s + image_s * n for n in SIZES}), Curve({n: 0.5 * image_s * n for n in SIZES}), slots)


BATCHED = costs(0.004, 0.005)
LARGEST = max(SIZES)
FIFO = {"ageing": 1e6, "urgent_s": -1e9}


def singly(arrivals):
    return one_by_one(arrivals, BATCHED.execute)


def batches(arrivals):
    return static(arrivals, BATCHED.execute, LARGEST)


def test_a_lone_request_takes_its_steps_and_its_decoding_and_the_window_where_there_is_one():
    alone, own_s = [Arrival(1.0, 10)], 10 * 0.009 + 0.0025
    assert one_by_one(alone, BATCHED.execute).latencies() == pytest.approx([own_s])
    assert StepLevel(BATCHED).run(alone).latencies() == pytest.approx([own_s])
    assert batches(alone).latencies() == pytest.approx([0.050 + own_s])


@pytest.mark.parametrize("serve", [singly, batches, lambda arrivals: StepLevel(BATCHED).run(arrivals)])
def test_every_request_is_served_once_with_every_step(serve):
    arrivals = poisson(8.0, 20, seed=1)
    outcome = serve(arrivals)
    assert sorted(one.arrival for one in outcome.served) == sorted(arrivals)
    assert all(s.latency >= BATCHED.alone_s(s.arrival.steps) - 1e-9 for s in outcome.served)


def test_a_batch_holds_one_number_of_steps_and_no_more_than_the_largest():
    seen = []

    def execute(batch, start):
        seen.append((start, batch))
        return BATCHED.execute(batch, start)

    arrivals = poisson(40.0, 10, seed=1)
    static(arrivals, execute, LARGEST)
    assert all(len({a.steps for a in batch}) == 1 and len(batch) <= LARGEST for _, batch in seen)
    assert max(len(batch) for _, batch in seen) == LARGEST
    assert all(a.at <= start for start, batch in seen for a in batch)


def test_every_step_of_every_image_runs_once_and_padding_is_what_the_sizes_lack():
    arrivals = poisson(8.0, 20, seed=1)
    outcome = StepLevel(BATCHED).run(arrivals)
    assert outcome.used == sum(arrival.steps for arrival in arrivals)
    assert outcome.padding == 0  # every size up to the slots exists
    assert StepLevel(costs(0.004, 0.005, slots=8)).run([Arrival(0.0, 10)] * 5).padding == 10


def test_poisson_arrivals_come_at_the_rate_and_in_the_mix_that_were_asked_for():
    arrivals = poisson(50.0, 200, seed=3)
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    for steps, share in MIX.items():
        assert sum(a.steps == steps for a in arrivals) / len(arrivals) == pytest.approx(share, abs=0.02)


def test_joining_at_any_step_halves_the_p95_of_short_requests_against_static_batches():
    arrivals = poisson(0.9 * capacity(BATCHED, 1), 120, seed=2)
    joined, batched = StepLevel(BATCHED).run(arrivals), batches(arrivals)
    assert percentile(joined.latencies(10), 95) < percentile(batched.latencies(10), 95) / 2
    assert percentile(joined.latencies(), 50) < percentile(batched.latencies(), 50)


@pytest.mark.parametrize("load", [0.9, 1.0])
def test_long_requests_pay_at_most_2_1_times_for_it_near_saturation(load):
    arrivals = poisson(load * capacity(BATCHED, BATCHED.slots), 150, seed=4)
    fair, fifo = StepLevel(BATCHED).run(arrivals), StepLevel(BATCHED, **FIFO).run(arrivals)
    assert percentile(fair.latencies(50), 95) <= 2.1 * percentile(fifo.latencies(50), 95)
    assert percentile(fair.latencies(10), 95) < percentile(fifo.latencies(10), 95)


def test_ten_times_too_much_is_refused_at_once_and_the_rest_is_served_in_time():
    most, wait_s = capacity(BATCHED, BATCHED.slots), 3.0
    arrivals = poisson(10 * most, 20, seed=5)
    outcome = StepLevel(BATCHED, admission=True, max_wait_s=wait_s).run(arrivals)
    assert len(outcome.served) + len(outcome.refused) == len(arrivals)
    assert outcome.facts()["images_per_s"] >= 0.9 * most
    own_s = 50 * BATCHED.step.seconds(BATCHED.slots)
    assert percentile(outcome.latencies(), 99) <= wait_s + 1.5 * own_s


def test_below_capacity_nothing_is_refused():
    arrivals = poisson(0.8 * capacity(BATCHED, BATCHED.slots), 60, seed=6)
    assert not StepLevel(BATCHED, admission=True).run(arrivals).refused


def test_a_flood_of_one_client_costs_another_at_most_four_times_its_time_alone():
    flood = [Arrival(0.0, 50, "flood")] * 300
    other = [Arrival(float(second), 10, "other") for second in range(20)]
    together = StepLevel(BATCHED, admission=True).run(sorted(flood + other))
    alone = StepLevel(BATCHED).run(other)
    assert percentile(together.latencies(key="other"), 95) <= 4 * percentile(alone.latencies(), 95)
    assert not [arrival for arrival in together.refused if arrival.key == "other"]
