"""What is measured of a server, a function each: they return rows, every one beside the check of its pictures' bytes."""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.report import percentile
from benchmarks.serving_client import Body, Reply, closed_loop, generate, open_loop
from benchmarks.serving_local import Local
from benchmarks.serving_server import Server
from benchmarks.serving_simulation import MIX, POOL, Arrival, Outcome, Served, one_by_one, poisson, static

CLIENTS = 32  # of a closed loop
WARM = 10  # requests to a second model, that are not measured
SOLVERS = ("ddim", "ddpm", "dpmpp-2m", "euler-ancestral", "pndm", "unipc")
Row = dict[str, Any]


@dataclass
class Bench:
    """A server and the same model in this process. `seconds`: of each load. `singly`: images/s one by one of the mix."""

    server: Server
    local: Local
    seconds: float
    seed: int = 0
    singly: float = 0.0
    most: float = 0.0  # images/s of the mix from a closed loop

    def load(self, rate: float, seconds: float | None = None, key: str = "") -> list[Arrival]:
        self.seed += 1
        return poisson(rate, self.seconds if seconds is None else seconds, self.seed, key=key)

    def send(self, arrivals: Iterable[Arrival], **options: Any) -> list[Reply]:
        return asyncio.run(open_loop(self.server.port, self.local.bodies(arrivals), **options))

    def row(
        self,
        measure: str,
        value: float | None,
        wanted: str,
        holds: bool | None,
        replies: Sequence[Reply],
        note: str = "",
    ) -> Row:
        """`holds`: None where there is no limit. A picture with other bytes than those of `fastgen generate` never holds."""
        pictures, wrong = self.local.wrong(replies)
        held = None if holds is None and not wrong else bool(holds is not False and not wrong)
        return {
            "measure": measure,
            "value": value,
            "wanted": wanted,
            "holds": held,
            "pictures": pictures,
            "wrong_bytes": wrong,
            "note": note,
        }


def parity(bench: Bench, count: int) -> list[Row]:
    """Requests of other solvers, steps, scales and starts at the same time, in a closed loop."""
    draw = random.Random(7)
    solvers = [name for name in SOLVERS if name in bench.server.info["schedulers"]]
    guidable, rag = bench.server.info["guidable"], bench.server.info["rag"]

    def body(seed: int) -> Body:
        steps = draw.choice((1, 4, 8, 12, 20, 30, 50))
        more: Body = {"scheduler": draw.choice(solvers)}
        if guidable:
            more["guidance_scale"] = draw.choice((1.0, 1.5, 3.0, 5.0))
        if rag and draw.random() < 0.3:
            start = draw.choice(({}, {"noise_steps": draw.randint(1, steps)}, {"strength": draw.choice((0.5, 0.7))}))
            more |= {"rag": True, "rag_top_k": draw.randint(1, 5), **start}
        elif guidable and draw.random() < 0.3:  # which may lie outside the steps of a late start
            more["guidance_interval"] = sorted(draw.sample(range(steps + 1), 2))
        return bench.local.body(seed, steps, **more)

    replies = asyncio.run(closed_loop(bench.server.port, [body(seed) for seed in range(count)], 12))
    served = sum(reply.status == 200 for reply in replies)
    late = sum("rag" in reply.body for reply in replies)
    note = f"{statuses(replies)}; {late} start from a training image" if rag else statuses(replies)
    return [bench.row("parity: answers to mixed requests", served, f"{count}", served == count, replies, note)]


def lone(bench: Bench, count: int) -> list[Row]:
    """A request at a time, in turns with Pipeline.generate."""
    local = bench.local
    replies, alone = list[Reply](), list[float]()
    for seed in range(count):
        body = local.body(seed)
        replies.append(asyncio.run(generate(bench.server.port, body)))
        start = time.monotonic()
        local.generate(body)
        alone.append(time.monotonic() - start)
    served_ms, alone_ms = (1000 * statistics.median(v) for v in ([r.latency_s for r in replies], alone))
    most = 1.15 * alone_ms + 15
    note = f"Pipeline.generate {alone_ms:.1f} ms"
    return [bench.row("lone request, ms", served_ms, f"<= {most:.1f}", served_ms <= most, replies, note)]


def throughput(bench: Bench, images: int) -> list[Row]:
    """A closed loop against `fastgen generate`, in turns."""
    local, slots, port = bench.local, bench.server.info["slots"], bench.server.port
    replies, served, jobs = list[Reply](), list[float](), list[float]()
    for _ in range(3):
        found = asyncio.run(closed_loop(port, [local.body(seed) for seed in range(images)], CLIENTS))
        served.append(rate(found))
        replies += found
        jobs.append(local.images_per_s(images, slots))
    ratio = statistics.median(a / b for a, b in zip(served, jobs, strict=True))
    note = f"{statistics.median(served):.2f} images/s; generate {statistics.median(jobs):.2f} at batch size {slots}"
    return [bench.row(f"closed loop of {CLIENTS} clients over generate", ratio, ">= 0.9", ratio >= 0.9, replies, note)]


def capacity(bench: Bench, images: int) -> list[Row]:
    """A closed loop of the mix, which sets `bench.most`; of so few clients that none is refused."""
    bodies = [body for _, body in bench.local.bodies(bench.load(images / 2, 2))]
    replies = asyncio.run(closed_loop(bench.server.port, bodies, 2 * bench.server.info["slots"]))
    bench.most = rate(replies)
    return [bench.row("closed loop of the mix, images/s", bench.most, "", None, replies, statuses(replies))]


def latency(bench: Bench, loads: Sequence[float]) -> tuple[list[Row], list[Row]]:
    """(rows, a line for each load and server): the same arrivals at the server, at static batches and one by one."""
    rows, lines = list[Row](), list[Row]()
    largest = max(bench.local.pipeline.buckets(bench.local.pipeline.settings()) or [16])
    bench.local.warm(largest)
    for load in loads:
        arrivals = bench.load(load * bench.singly)
        taken = {"step-level": bench.send(arrivals), "static": list[Reply](), "one by one": list[Reply]()}
        outcomes = {
            "step-level": outcome(arrivals, taken["step-level"]),
            "static": static(arrivals, bench.local.executor(taken["static"]), largest),
            "one by one": one_by_one(arrivals, bench.local.executor(taken["one by one"])),
        }
        for name, found in outcomes.items():
            pictures, wrong = bench.local.wrong(taken[name])
            lines.append({"load": load, "server": name, **found.facts(), "pictures": pictures, "wrong_bytes": wrong})
        ours, theirs = outcomes["step-level"], outcomes["static"]
        replies = [reply for name in taken for reply in taken[name]]
        for what, percent, steps, limit in (("p95 of 10 steps", 95, 10, 2.0), ("p50", 50, None, 1.0)):
            factor = _over(theirs.latencies(steps), ours.latencies(steps), percent)
            wanted = load == 0.9 and factor is not None
            holds = factor >= limit and not ours.refused if wanted and factor is not None else None
            measure = f"{what} at {load:g} of one-by-one capacity, static over step-level"
            note = statuses(taken["step-level"])
            rows.append(bench.row(measure, factor, f">= {limit:g}" * wanted, holds, replies, note))
    return rows, lines


def _over(others: Sequence[float], ours: Sequence[float], percent: float) -> float | None:
    return percentile(others, percent) / percentile(ours, percent) if others and ours else None


def fairness(bench: Bench) -> list[Row]:
    """A client floods with n = 10 x 50 steps; another asks for 10 steps every second."""
    other = [Arrival(float(second), 10, "other", second % POOL) for second in range(int(bench.seconds))]
    alone = bench.send(other)
    flood = bench.local.body(0, 50, "flood", n=10)
    flooded = list[Reply]()

    async def together() -> list[Reply]:
        port = bench.server.port
        until = time.monotonic() + bench.seconds
        bodies = itertools.takewhile(lambda _: time.monotonic() < until, itertools.repeat(flood))
        tasks = closed_loop(port, bodies, 16), open_loop(port, bench.local.bodies(other))
        found, replies = await asyncio.gather(*tasks)
        flooded.extend(found)
        return replies

    replies = asyncio.run(together())
    p95 = [1000 * percentile([r.latency_s for r in taken if r.status == 200], 95) for taken in (alone, replies)]
    served = sum(reply.status == 200 for reply in replies)
    note = f"alone {p95[0]:.0f} ms; {served} of {len(other)} served; flood: {statuses(flooded)}"
    waited = max((reply.queue_s for reply in (*flooded, *replies)), default=0.0)
    return [
        bench.row(
            "p95 beside a flood over p95 alone",
            p95[1] / p95[0],
            "<= 4",
            p95[1] <= 4 * p95[0] and served == len(other),
            replies,
            note,
        ),
        bench.row("longest wait beside and in the flood, s", waited, "<= 30", waited <= 30, flooded),
    ]


def neighbours(bench: Bench) -> list[Row]:
    """Two models in one server, `second` and the first: one gets ten times what the server can do, the other one a request of
    10 steps every second."""
    other = [Arrival(float(second), 10, "other", second % POOL) for second in range(int(bench.seconds))]
    bodies = [(at, {**body, "model": "second"}) for at, body in bench.local.bodies(other)]
    asyncio.run(open_loop(bench.server.port, bodies[:WARM]))
    alone = asyncio.run(open_loop(bench.server.port, bodies))
    load = bench.local.bodies(bench.load(10 * bench.singly))
    name = bench.server.name

    async def together() -> tuple[list[Reply], list[Reply]]:
        flood = open_loop(bench.server.port, [(at, {**body, "model": name}) for at, body in load])
        return await asyncio.gather(flood, open_loop(bench.server.port, bodies))

    flooded, replies = asyncio.run(together())
    p95 = [1000 * percentile([r.latency_s for r in taken if r.status == 200], 95) for taken in (alone, replies)]
    served = sum(reply.status == 200 for reply in replies)
    note = f"alone {p95[0]:.0f} ms; {served} of {len(other)} served; other model: {statuses(flooded)}"
    factor, holds = p95[1] / p95[0], p95[1] <= 1.5 * p95[0] and served == len(other)
    return [bench.row("p95 beside a model with 10x its load over p95 alone", factor, "<= 1.5", holds, replies, note)]


def outcome(arrivals: Sequence[Arrival], replies: Sequence[Reply]) -> Outcome:
    """A load's requests and their answers, as the simulation tells them."""
    found = Outcome()
    for arrival, reply in zip(arrivals, replies, strict=True):
        if reply.status == 200:
            found.served.append(Served(arrival, arrival.at + reply.latency_s))
        else:
            found.refused.append(arrival)
    return found


def singly(local: Local, rounds: int = 3) -> float:
    """Images/s of the mix one by one, without a server."""
    seconds = 0.0
    for steps, share in MIX.items():
        taken = list[float]()
        for seed in range(rounds):
            start = time.monotonic()
            local.pictures([local.body(seed, steps)])
            taken.append(time.monotonic() - start)
        seconds += share * statistics.median(taken)
    return 1 / seconds


def rate(replies: Sequence[Reply]) -> float:
    """Images/s from the first request to the last answer."""
    images = sum(len(reply.digests) for reply in replies)
    return images / (max(r.ended for r in replies) - min(r.ended - r.latency_s for r in replies))


def statuses(replies: Iterable[Reply]) -> str:
    """How many of each status, and the errors."""
    counts = Counter(f"{r.status}{f' {r.error}' if r.error and r.status > 0 else ''}" for r in replies)
    return ", ".join(f"{count}x {name}" for name, count in counts.most_common())
