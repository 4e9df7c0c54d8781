"""A server under stress: ten times too much, clients that leave, and the death of its worker. Rows as in serving_sections."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time

from benchmarks.report import percentile
from benchmarks.serving_client import Reply, call, generate, open_loop
from benchmarks.serving_sections import Bench, Row, statuses
from benchmarks.serving_simulation import POOL

KILL_S, LEAST_KILLS = 10.0, 4
LEAVE_SHARE = 0.1
OVERLOAD = 10


def overload(bench: Bench, max_wait_s: float) -> list[Row]:
    """Ten times what can be served; then a request at a time until one is answered as fast as before."""
    before = [asyncio.run(generate(bench.server.port, bench.local.body(seed, 10))) for seed in range(5)]
    usual_s = percentile([reply.latency_s for reply in before], 95)
    replies = bench.send(bench.load(OVERLOAD * bench.most))
    end = time.monotonic()
    probes = list[Reply]()
    while not probes or (probes[-1].latency_s > 2 * usual_s and len(probes) < 100):
        probes.append(asyncio.run(generate(bench.server.port, bench.local.body(len(probes) % POOL, 10, "probe"))))
        time.sleep(0.2)
    served, refused = ([r for r in replies if r.status == status] for status in (200, 429))
    odd = len(replies) - len(served) - len(refused)
    share = len(served) / (max(r.ended for r in served) - min(r.ended - r.latency_s for r in replies)) / bench.most
    slowest_ms = 1000 * max((r.latency_s for r in refused), default=0.0)
    told = all(int(r.headers["retry-after"]) >= 1 for r in refused)
    p99, own_s = percentile([r.latency_s for r in served], 99), 50 / 10 * usual_s * 1.5
    recovery_s = probes[-1].ended - end
    name = f"{OVERLOAD}x overload: "
    return [
        bench.row(
            f"{name}share of capacity served", share, ">= 0.9", share >= 0.9 and not odd, served, statuses(replies)
        ),
        bench.row(f"{name}slowest 429, ms", slowest_ms, "< 100", slowest_ms < 100 and told, ()),
        bench.row(f"{name}p99 of the served, s", p99, f"<= {max_wait_s + own_s:.1f}", p99 <= max_wait_s + own_s, ()),
        bench.row(f"{name}recovered after, s", recovery_s, "<= 5", recovery_s <= 5, probes),
    ]


def soak(bench: Bench) -> list[Row]:
    """0.8 of the one-by-one capacity; every tenth client leaves."""
    draw = random.Random(11)
    leave = [draw.uniform(0, 1) if draw.random() < LEAVE_SHARE else None for _ in range(1000)]
    part_s, replies, uses = bench.seconds / 8, list[Reply](), []
    for _ in range(8):
        replies += bench.send(bench.load(0.8 * bench.singly, part_s), leave_after_s=leave)
        time.sleep(1.0)
        uses.append(bench.server.use())
    rss = [use.rss_mib for use in uses]
    growth = 100 * (rss[-1] / rss[1] - 1)
    bad = [reply for reply in replies if reply.status not in (200, -1)]
    more = [uses[-1].fds - uses[1].fds, uses[-1].threads - uses[1].threads]
    note = f"{statuses(replies)}; {rss[-1]:.0f} MiB; file descriptors {more[0]:+d}, threads {more[1]:+d}"
    return [
        bench.row(
            "soak: growth of resident memory, %",
            growth,
            "< 5",
            growth < 5 and not bad and max(more) <= 0,
            replies,
            note,
        )
    ]


def kills(bench: Bench) -> list[Row]:
    """The worker is killed every ten seconds, at half of the one-by-one capacity."""
    kills = max(LEAST_KILLS, round(bench.seconds / KILL_S))
    load = bench.local.bodies(bench.load(0.5 * bench.singly, (kills + 1) * KILL_S))
    told_s, away_s = list[float](), list[float]()

    async def kill() -> None:
        for _ in range(kills):
            await asyncio.sleep(KILL_S)
            start = time.monotonic()
            for pid in bench.server.workers():
                os.kill(pid, signal.SIGKILL)
            for ready, times in ((False, told_s), (True, away_s)):
                while ((await call(bench.server.port, "GET", "/health/ready")).status == 200) != ready:
                    await asyncio.sleep(0.02)
                times.append(time.monotonic() - start)

    async def together() -> list[Reply]:
        found, _ = await asyncio.gather(open_loop(bench.server.port, load), kill())
        return found

    replies = asyncio.run(together())
    hung = sum(reply.status == 0 for reply in replies)
    allowed = all(reply.status in (200, 503) for reply in replies)
    name = f"worker killed {kills} times: "
    return [
        bench.row(f"{name}requests without an answer", hung, "0", not hung and allowed, replies, statuses(replies)),
        bench.row(f"{name}not ready after, s", max(told_s), "<= 1", max(told_s) <= 1, ()),
        bench.row(f"{name}ready again after, s", statistics.median(away_s), "", None, ()),
    ]
