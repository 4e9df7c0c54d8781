"""The lines of benchmarks/first.py that need a card run here over a double of torch.cuda.

Graphs are recorded and replayed on CPU tensors (tests/cuda_double.py), memory is what a test says, and every name and signature
is torch's own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import cuda_double  # noqa: E402

import fastgen  # noqa: E402
from benchmarks import first, first_facts, first_memory, first_speed  # noqa: E402
from benchmarks.parts import Fact, Run  # noqa: E402
from fastgen.sampling import streams  # noqa: E402

MIB = 2**20
TOTAL, WANTED = 1000 * MIB, 100 * MIB


class Card:
    """torch.cuda with memory: `allocated` and `reserved` in bytes, and the share of it that this process may have."""

    def __init__(self, monkeypatch: Any) -> None:
        self.allocated, self.reserved, self.fractions, self.modes = 10 * MIB, 20 * MIB, [1.0], []
        self.state = cuda_double.install(monkeypatch)
        answers: dict[str, Callable[..., Any]] = {
            "memory_allocated": lambda device=None: self.allocated,
            "memory_reserved": lambda device=None: self.reserved,
            "max_memory_reserved": lambda device=None: self.reserved + WANTED,
            "reset_peak_memory_stats": lambda device=None: None,
            "mem_get_info": lambda device=None: (TOTAL - self.reserved, TOTAL),
            "set_per_process_memory_fraction": self.limit,
            "set_sync_debug_mode": self.modes.append,
            "default_stream": lambda device=None: self.state.default,
        }
        for name, answer in answers.items():
            real = getattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, mock.create_autospec(real, side_effect=answer))

    def limit(self, fraction: float, device: Any = None) -> None:
        assert isinstance(fraction, float)
        assert device is None or isinstance(device, int), "torch refuses `cuda` without a number"
        self.fractions.append(fraction)

    @property
    def share(self) -> float:
        """Of what the job wants, what it may have."""
        return (self.fractions[-1] * TOTAL - self.reserved) / WANTED


@pytest.fixture(autouse=True)
def _young_garbage_only(monkeypatch):
    """To look at everything that a long test run holds takes a second, and each dropped loop asks for it."""
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collect(0))


@pytest.fixture
def card(monkeypatch) -> Iterator[Card]:
    opened: dict[Any, Any] = {}

    def pipeline(model, device, dtype, graphs=None, engine="eager"):
        """Pipelines of the double's card: eager on CPU tensors, recorded where graphs are asked for."""
        key = (model, device, dtype, graphs, engine)
        if key not in opened:
            pipe = opened[key] = fastgen.load(model, engine, device="cpu", dtype="bf16" if dtype == "fp16" else dtype)
            if device == "cuda":
                pipe.on_gpu, pipe.graphs, pipe.engine.capturable = True, bool(graphs), True
        return opened[key]

    pipeline.cache_clear = opened.clear  # type: ignore[attr-defined]
    for module in (first_facts, first_memory, first_speed):
        monkeypatch.setattr(module, "pipeline", pipeline)
    yield Card(monkeypatch)
    streams._streams.cache_clear()


@pytest.fixture
def run(tmp_path) -> Run:
    return Run("cuda", tmp_path, tmp_path, tiny=False, deadline=time.monotonic() + 300)


def failed(facts: list[Fact]) -> list[str]:
    assert [fact["error"] for fact in facts if "error" in fact] == []
    return [fact["what"] for fact in facts if first.verdict(fact) == "failed"]


def test_graphs_are_compared_with_no_graphs_with_the_cpu_and_with_themselves(card, run, label_model):
    facts = list(first_facts.agreement(run, str(label_model)))
    assert failed(facts) == []
    for kind in first_facts.KINDS:
        for dtype in ("fp32", "fp16"):
            told = {
                fact["what"].partition(": ")[2] for fact in facts if fact["what"].startswith(f"{kind}, {dtype}, graphs")
            }
            assert told == {"the CPU's pictures", "those without", "a second run"}
    assert len(card.state.recorded_on) >= len(first_facts.KINDS)


def test_graphs_that_go_wrong_are_noticed(card, run, label_model, monkeypatch):
    monkeypatch.setattr(cuda_double.CUDAGraph, "replay", lambda graph: None)
    found = [
        what for what in failed(list(first_facts.agreement(run, str(label_model)))) if ", graphs: those without" in what
    ]
    assert len(found) == 2 * len(first_facts.KINDS)


def test_batches_overlap_again_after_many_tables(card, run, label_model, monkeypatch):
    monkeypatch.setattr(first_facts, "TABLES", range(2, 10))
    facts = list(first_facts.overlap(run, str(label_model)))
    assert failed(facts) == []
    assert facts[-1]["what"] == "overlapped batches after 8 tables"
    assert len(card.state.recorded_on) > 8
    assert len({stream.number for stream in card.state.recorded_on}) == 1


def test_the_loop_is_queued_where_waiting_is_an_error(card, run, label_model):
    facts = list(first_memory.nothing_waits(run, str(label_model)))
    assert failed(facts) == []
    assert card.modes == ["error", "default"]


def test_a_loop_that_waits_is_noticed(card, run, label_model, monkeypatch):
    from fastgen.sampling.device_loop import DeviceLoop

    queue = DeviceLoop.run

    def waiting(self, *given, **options):
        if card.modes[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")
        return queue(self, *given, **options)

    monkeypatch.setattr(DeviceLoop, "run", waiting)
    facts = list(first_memory.nothing_waits(run, str(label_model)))
    assert facts[0]["error"]["message"] == "called a synchronizing CUDA operation"
    assert (card.modes, facts[1]["passed"]) == (["error", "default"], True)


def test_memory_that_comes_back_is_told_from_memory_that_does_not(card, run, label_model, monkeypatch):
    assert failed(list(first_memory.memory_comes_back(run, str(label_model)))) == []
    images = first_memory.images

    def leaking(pipe, *given, **options):
        card.allocated += 5 * MIB
        return images(pipe, *given, **options)

    monkeypatch.setattr(first_memory, "images", leaking)
    facts = list(first_memory.memory_comes_back(run, str(label_model)))
    assert failed(facts) == ["memory after free_memory is what it was", "memory does not grow with solver tables"]
    assert facts[1]["grown"] == 35.0


@pytest.fixture
def short_of_memory(card, monkeypatch):
    """An engine that runs out where a batch wants more than the process may have."""
    from fastgen.engines.eager.engine import Engine

    whole = Engine.run

    def run(self, network, *inputs):
        if network == "unet" and card.fractions[-1] < 1 and len(inputs[0]) > card.share * 2 * 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(self, network, *inputs)

    monkeypatch.setattr(Engine, "run", run)
    monkeypatch.setattr(first_memory, "IMAGES", (16, 8))


def test_memory_is_short_the_job_goes_on_and_everything_is_as_it_was(card, short_of_memory, run, text_model):
    facts = list(first_memory.out_of_memory(run, str(text_model)))
    assert failed(facts) == []
    assert [fact["said"] for fact in facts if "said" in fact] == [
        ["cpu: out of memory with a batch of 16; going on with 8"],
        [
            "cpu: out of memory with a batch of 16; going on with 8",
            "cpu: out of memory with a batch of 8; going on with 4",
        ],
    ]
    assert card.fractions == [1.0, pytest.approx(0.08), 1.0, pytest.approx(0.055), 1.0]
    assert [fact["what"].partition(": ")[2] for fact in facts if "stream" in fact] == 2 * [
        "the default stream is current afterwards"
    ]


def test_a_stream_that_stays_switched_and_memory_that_stays_are_noticed(
    card, short_of_memory, run, text_model, monkeypatch
):
    little = first_memory.little_memory

    def careless(*given):
        card.allocated += 100 * MIB
        card.state.current = cuda_double.Stream()
        return little(*given)

    monkeypatch.setattr(first_memory, "little_memory", careless)
    found = {what.partition(": ")[2] for what in failed(list(first_memory.out_of_memory(run, str(text_model))))}
    assert found == {"the default stream is current afterwards", "memory afterwards"}


def test_speeds_with_and_without_graphs_at_one_and_at_64(card, run, label_model):
    facts = list(first_speed.speed(run, str(label_model)))
    assert [fact["what"] for fact in facts] == [
        f"fp16, batch {batch}, {graphs}" for batch in (1, 64) for graphs in ("no graphs", "graphs")
    ]
    assert all(fact["images_per_s"] > 0 for fact in facts)
