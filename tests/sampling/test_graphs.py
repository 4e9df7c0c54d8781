"""Recorded rows: they compute what the loop computes, hold nothing when they are dropped, and fail as what they are.

Over a double of torch's streams and graphs (tests/cuda_double.py); on a GPU, test_device_loop.py runs the same loop.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import cuda_double  # noqa: E402

from fastgen.files.png import read_pixels  # noqa: E402
from fastgen.generate.decoder import Decoder  # noqa: E402
from fastgen.generate.job import run_job  # noqa: E402
from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.generate.requests import Request  # noqa: E402
from fastgen.generate.run import Run  # noqa: E402
from fastgen.sampling import streams  # noqa: E402
from fastgen.sampling.compile import TableCompiler  # noqa: E402
from fastgen.sampling.device_loop import DeviceLoop  # noqa: E402
from fastgen.sampling.graphs import Graph  # noqa: E402
from fastgen.sampling.loop import initial_latents, sample  # noqa: E402

SCHEDULE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
SOLVERS = ["ddim:6", "ddpm:6", "pndm:6", "dpmpp-2m:6", "dpmpp-2m-sde:6", "unipc:6", "heun:10:5", "ddpm:6:3"]
SEEDS = [3, 2**62 + 1, 7]
SHAPE = (3, 16, 16)


@pytest.fixture
def cuda(monkeypatch):
    """The double, and what is current in it."""
    yield cuda_double.install(monkeypatch)
    streams._streams.cache_clear()


@pytest.fixture(scope="module")
def engine(label_model):
    return load(label_model, "eager").engine


class Capturable:
    """An engine that may be recorded, or one that records its own graphs; `fails` is raised by its next calls."""

    def __init__(self, engine, capturable=True):
        self._engine, self.capturable, self.device = engine, capturable, "cpu"
        self.fails: Iterator[BaseException | None] = iter(())

    def run(self, *inputs):
        error = next(self.fails, None)
        if error is not None:
            raise error
        return self._engine.run(*inputs)

    def run_guided(self, *inputs):
        error = next(self.fails, None)
        if error is not None:
            raise error
        return self._engine.run_guided(*inputs)


def inputs(table):
    clean = None
    if table.noise_steps is not None:
        clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    cond = torch.zeros(3, 24)
    cond[0, 3] = cond[1, 7] = cond[2, 9] = 1
    return initial_latents(table, SEEDS, SHAPE, clean, xp=torch), (cond,), (torch.zeros(1, 24),)


def recorded_loop(engine, table):
    return DeviceLoop(engine, table, (3, *SHAPE), (torch.zeros(3, 24),), graphs=True)


def run(loop, table, **options):
    x, cond, uncond = inputs(table)
    return loop.run(x, cond, seeds=torch.tensor(SEEDS), uncond=uncond, **options)


@pytest.mark.parametrize("capturable", [True, False])
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_interval": (1, 3)}])
@pytest.mark.parametrize("key", SOLVERS)
def test_replayed_rows_compute_what_the_loop_computes(cuda, engine, key, options, capturable):
    table = TableCompiler(SCHEDULE).table(key)
    x, cond, uncond = inputs(table)
    expected = sample(lambda *a: engine.run("unet", *a)[0], table, x, cond, seeds=SEEDS, uncond=uncond, **options)
    loop = recorded_loop(Capturable(engine, capturable), table)
    for _ in range(2):  # nothing is left behind in the buffers
        torch.testing.assert_close(run(loop, table, **options), expected, atol=5e-4, rtol=1e-3)
    assert cuda.current == cuda.default


def test_the_double_computes_nothing_while_it_records_and_replays_on_the_same_tensors(cuda):
    x, y = torch.zeros(2), []

    def function():
        y.append(x * 2 + 1)
        x.add_(1)

    graph = Graph(function, "cpu")
    assert x.tolist() == [3, 3]  # of the calls that warm up
    assert y[-1].isnan().all()
    x.fill_(5)
    graph()
    assert (x.tolist(), y[-1].tolist()) == ([6, 6], [11, 11])


@pytest.mark.parametrize("reads", [lambda x: x.item(), lambda x: x[x > 0], lambda x: bool(x > 0)])
def test_a_recording_that_reads_the_device_fails_in_the_double_as_on_a_gpu(cuda, reads):
    x = torch.ones(1)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        Graph(lambda: reads(x) if cuda.recording else None, "cpu")
    assert cuda.current == cuda.default


@pytest.mark.parametrize("capturable", [True, False])
def test_a_dropped_loop_is_gone_at_once_with_its_graphs_and_state(cuda, engine, capturable):
    table = TableCompiler(SCHEDULE).table("dpmpp-2m-sde:4")
    loop = recorded_loop(Capturable(engine, capturable), table)
    run(loop, table, guidance_scale=3.0, guidance_interval=(1, 3))
    graphs = [graph for recorded in loop._recorded.values() for graph in recorded]
    assert len(graphs) == (2 if capturable else 4)
    held = [weakref.ref(one) for one in (loop, loop._x, *graphs)]
    gc.disable()
    try:
        del loop, graphs
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()


def test_every_recording_is_on_one_stream_that_nothing_else_runs_on(cuda, engine):
    decode = streams.stream("cpu", streams.DECODE)
    table = TableCompiler(SCHEDULE).table("ddpm:2")
    for _ in range(22):
        run(recorded_loop(Capturable(engine), table), table, guidance_scale=2.0, guidance_interval=(0, 1))
    assert len(cuda.recorded_on) == 44  # more than torch has streams
    assert set(cuda.recorded_on) == {streams.stream("cpu", streams.CAPTURE)}
    assert decode not in cuda.recorded_on


def test_each_use_has_a_stream_of_its_own_made_once_per_device(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    for other in range(40):  # somebody else's
        torch.cuda.Stream(other)
    made = {use: streams.stream("cuda:1", use) for use in streams.USES}
    assert len(set(made.values())) == len(streams.USES)
    assert all(streams.stream("cuda", use) is stream for use, stream in made.items())
    assert streams.stream("cuda:0", streams.CAPTURE) is not made[streams.CAPTURE]


def test_graphs_of_one_loop_share_a_pool(cuda, engine):
    table = TableCompiler(SCHEDULE).table("ddim:4")
    loop = recorded_loop(Capturable(engine), table)
    run(loop, table, guidance_scale=3.0, guidance_interval=(1, 3))
    assert len({recorded[0].pool for recorded in loop._recorded.values()}) == 1


def test_other_threads_may_use_cuda_while_a_graph_is_recorded(cuda):
    assert Graph(lambda: None, "cpu")._graph.mode == "thread_local"


# Failures. A recording calls the network four times: three to warm up, one that is recorded.


@pytest.mark.parametrize("calls", [0, 2, 3], ids=["first warm-up", "last warm-up", "recording"])
@pytest.mark.parametrize("key", ["ddim:4", "dpmpp-2m-sde:4"])
def test_out_of_memory_while_recording_is_raised_as_what_it_is(cuda, engine, key, calls):
    table = TableCompiler(SCHEDULE).table(key)
    failing = Capturable(engine)
    loop = recorded_loop(failing, table)
    failing.fails = iter([*[None] * calls, torch.OutOfMemoryError("CUDA out of memory")])
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run(loop, table)
    assert engine.is_out_of_memory(raised.value)
    assert cuda.current == cuda.default
    assert cuda.recording is None
    expected = sample(lambda *a: engine.run("unet", *a)[0], table, *inputs(table)[:2], seeds=SEEDS)
    torch.testing.assert_close(run(loop, table), expected, atol=5e-4, rtol=1e-3)  # and it can be tried again


@pytest.mark.parametrize("part", ["noise", "step"])
def test_memory_that_runs_out_beside_the_network_is_known_too(cuda, engine, monkeypatch, part):
    table = TableCompiler(SCHEDULE).table("ddpm:4")
    loop = recorded_loop(Capturable(engine), table)
    calls = []

    def fails(*arguments):
        calls.append(part)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    name = {"noise": "normal", "step": "step"}[part]
    original = getattr(__import__("fastgen.sampling.device_loop", fromlist=[name]), name)
    monkeypatch.setattr(f"fastgen.sampling.device_loop.{name}", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run(loop, table)
    assert cuda.current == cuda.default


def test_a_recording_that_cannot_be_ended_raises_the_first_error_on_the_callers_stream(cuda):
    side = streams.stream("cpu", streams.NOISE)

    def forks_and_fails():
        side.wait_stream(torch.cuda.current_stream())
        if cuda.recording is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        Graph(forks_and_fails, "cpu")
    assert cuda.current == cuda.default

    with pytest.raises(RuntimeError, match="unjoined work"):
        Graph(lambda: side.wait_stream(torch.cuda.current_stream()), "cpu")
    assert cuda.current == cuda.default

    x = torch.ones(1)  # the allocator waits for nothing, and records again
    torch.cuda.empty_cache()
    assert len(cuda.released) == 2
    Graph(lambda: x.add_(1), "cpu")()
    assert x.item() == 5


def test_memory_that_runs_out_when_a_recording_is_made_ready_is_known_too(cuda):
    """Then the graph itself gives its pool back."""
    cuda.fails_at_end = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        Graph(lambda: None, "cpu")
    assert (cuda.current, cuda.underway, cuda.released) == (cuda.default, set(), [])


def test_what_the_calls_before_left_is_gone_when_the_recording_begins(cuda, engine, monkeypatch):
    table = TableCompiler(SCHEDULE).table("dpmpp-2m-sde:4")
    loop = recorded_loop(Capturable(engine), table)
    begin, held = cuda_double.CUDAGraph.capture_begin, []

    def noted(graph, *arguments, **options):
        held.append((dict(loop._prepared), dict(loop._prediction)))
        return begin(graph, *arguments, **options)

    monkeypatch.setattr(cuda_double.CUDAGraph, "capture_begin", noted)
    run(loop, table)
    assert held == [({}, {})]


def test_the_collector_does_not_run_during_a_recording(cuda):
    seen = []
    Graph(lambda: seen.append(gc.isenabled()), "cpu")
    assert seen == [True] * 3 + [False]
    assert gc.isenabled()


def test_another_thread_records_only_after_this_one(cuda):
    order, inside = [], threading.Event()

    def slow():
        if cuda.recording is not None:
            order.append("first")
            inside.set()
            time.sleep(0.2)
            order.append("first is done")

    first = threading.Thread(target=lambda: Graph(slow, "cpu"))
    first.start()
    assert inside.wait(10)
    Graph(lambda: order.append("second"), "cpu")
    first.join()
    assert order[:3] == ["first", "first is done", "second"]


def test_a_failed_recording_keeps_nothing_alive(cuda, engine):
    table = TableCompiler(SCHEDULE).table("dpmpp-2m-sde:4")
    failing = Capturable(engine)
    loop = recorded_loop(failing, table)
    failing.fails = iter([None, None, None, torch.OutOfMemoryError("CUDA out of memory")])
    held = weakref.ref(loop)
    gc.disable()
    try:
        with pytest.raises(torch.OutOfMemoryError) as raised:
            run(loop, table)
        raised.value.with_traceback(None)
        del loop, raised
        assert held() is None
    finally:
        gc.enable()


def test_a_gpu_loop_takes_no_memory_per_row_outside_its_graphs(cuda, engine, monkeypatch):
    """The prediction of an engine that records its own graphs is copied to one fixed place."""
    table = TableCompiler(SCHEDULE).table("ddim:6")
    loop = recorded_loop(Capturable(engine, capturable=False), table)
    run(loop, table)
    made = []
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: made.append(1) or empty_like(*a, **k))
    run(loop, table)
    assert made == []


def test_seeds_reach_a_replay(cuda, engine):
    table = TableCompiler(SCHEDULE).table("ddpm:4")
    loop, (x, cond, _) = recorded_loop(Capturable(engine), table), inputs(table)
    first = loop.run(x, cond, seeds=torch.from_numpy(np.array(SEEDS)))
    assert not torch.equal(loop.run(x, cond, seeds=torch.from_numpy(np.array(SEEDS) + 1)), first)


# Whole batches: sampling, decoding beside the next batch, the host's reading. Nothing may run before what it needs.


@pytest.fixture
def on_a_gpu(cuda, monkeypatch):
    """(model, device) -> its pipeline as if eager ran on a GPU, with recorded rows."""

    def make(model, device="cpu"):
        pipeline = load(model, "eager")
        pipeline.engine.device, pipeline.engine.capturable = cuda_double.Device(device), True
        pipeline.on_gpu = pipeline.graphs = True
        config = pipeline.source.scheduler_config
        pipeline.source.table = {
            key: TableCompiler(config).table(key) for key in ("ddim:4", "dpmpp-2m-sde:4")
        }.get  # on the host
        return pipeline

    return make


def requests(kind):
    given = {"prompt": "a red dragon"} if kind == "text" else {"labels": ("red cube",)}
    return [Request(str(i), f"{i}.png", seed=i, **given) for i in range(7)]


def pixels(folder):
    return np.stack([read_pixels(folder / f"{i}.png") for i in range(7)]).astype(int)


@pytest.mark.parametrize("kind", ["text", "labels"])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp-2m-sde"])
def test_a_job_on_a_gpu_is_in_order_and_gives_the_pictures_of_a_cpu(
    on_a_gpu, monkeypatch, request, tmp_path, kind, solver
):
    model = request.getfixturevalue("text_model" if kind == "text" else "label_model")
    settings = {"scheduler": solver, "num_inference_steps": 4, "guidance_scale": 3.0, "guidance_interval": (1, 3)}
    plain = load(model, "eager")
    run_job(Run(plain, requests(kind), plain.settings(**settings)), tmp_path / "cpu", batch_size=3)
    pipeline = on_a_gpu(model)
    with cuda_double.ordered(monkeypatch):
        report = run_job(Run(pipeline, requests(kind), pipeline.settings(**settings)), tmp_path / "gpu", batch_size=3)
    assert report.errors == {}
    assert np.abs(pixels(tmp_path / "gpu") - pixels(tmp_path / "cpu")).max() <= 1
    assert len(pipeline._loops) == 2  # batches of 3 and of 2 ...
    assert len({loop.pool for loop in pipeline._loops.values()}) == 1  # ... in one pool
    (size, loop), *_ = pipeline._loops.items()
    held = weakref.ref(loop)
    del loop, size
    pipeline.free_memory()
    assert held() is None


@pytest.mark.parametrize("left_out", ["decode", "capture"])
def test_a_wait_that_is_left_out_is_noticed(on_a_gpu, monkeypatch, text_model, left_out):
    pipeline = on_a_gpu(text_model)
    wait, use = cuda_double.Stream.wait_stream, {"decode": streams.DECODE, "capture": streams.CAPTURE}[left_out]
    blind = streams.stream("cpu", use)
    monkeypatch.setattr(cuda_double.Stream, "wait_stream", lambda one, other: one == blind or wait(one, other))
    with pytest.raises(AssertionError, match="may still use"), cuda_double.ordered(monkeypatch):
        pipeline.generate(["a red dragon"], seeds=[0], scheduler="ddim", num_inference_steps=4)


def test_an_event_that_is_not_waited_for_is_noticed(on_a_gpu, monkeypatch, text_model):
    pipeline = on_a_gpu(text_model)
    monkeypatch.setattr(cuda_double.Event, "synchronize", lambda event: None)
    with pytest.raises(AssertionError, match="the host reads"), cuda_double.ordered(monkeypatch):
        pipeline.generate(["a red dragon"], seeds=[0], scheduler="ddim", num_inference_steps=4)


def test_a_broken_picture_is_decoded_again_in_order_beside_the_next_batch(on_a_gpu, monkeypatch, text_model):
    pipeline, exact = on_a_gpu(text_model), on_a_gpu(text_model).engine
    engine, run = pipeline.engine, pipeline.engine.run
    x = torch.randn(4, *pipeline.spec.space.shape)
    expected = pipeline.decoder.start(x)().pixels
    engine.dtype = "fp16"

    def breaks(network, *inputs):
        outputs = run(network, *inputs)
        return (torch.cat([outputs[0][:2], outputs[0][2:] * torch.nan]),)

    monkeypatch.setattr(engine, "run", breaks)
    decoder = Decoder(engine, pipeline.spec, lambda: exact)
    with cuda_double.ordered(monkeypatch):
        pictures = decoder.start(x)()
    assert pictures.problems == [None] * 4
    assert np.array_equal(pictures.pixels, expected)


def test_an_engine_that_compiles_per_size_decodes_broken_pictures_one_by_one(on_a_gpu, monkeypatch, text_model):
    pipeline, exact = on_a_gpu(text_model), on_a_gpu(text_model).engine
    sizes, run = [], exact.run
    monkeypatch.setattr(exact, "run", lambda name, x: sizes.append(len(x)) or run(name, x))
    pipeline.engine.dtype, pipeline.engine.static_shapes = "fp16", True
    exact.static_shapes = True
    broken = pipeline.engine.run
    monkeypatch.setattr(pipeline.engine, "run", lambda name, x: (broken(name, x)[0] * torch.nan,))
    pictures = Decoder(pipeline.engine, pipeline.spec, lambda: exact).start(
        torch.randn(3, *pipeline.spec.space.shape)
    )()
    assert pictures.problems == [None] * 3
    assert sizes == [1, 1, 1]


def test_work_on_the_second_gpu_makes_no_context_on_the_first(cuda, on_a_gpu, monkeypatch, text_model):
    pipeline, device, made = on_a_gpu(text_model), torch.cuda.device, streams._streams(1)
    monkeypatch.setattr(streams, "stream", lambda device, use: made[use])  # `cpu` stands for the second GPU
    monkeypatch.setattr(torch.cuda, "device", lambda name: device(1))
    pipeline.generate(["a red dragon"], seeds=[0], scheduler="ddim", num_inference_steps=4)
    assert cuda.contexts == {1}
