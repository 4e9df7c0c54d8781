"""The GPU's loop computes what THE loop computes, without waiting for the host; the same structure runs here on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from fastgen.errors import InputError  # noqa: E402
from fastgen.files.names import ICLEVR_OBJECTS  # noqa: E402
from fastgen.generate.pipeline import load  # noqa: E402
from fastgen.sampling.compile import TableCompiler  # noqa: E402
from fastgen.sampling.device_loop import DeviceLoop  # noqa: E402
from fastgen.sampling.loop import initial_latents, sample, sample_steps  # noqa: E402

SCHEDULE = {"_class_name": "DDIMScheduler", "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
SOLVERS = [
    "ddim:6",
    "ddpm:6",
    "pndm:6",
    "pndm-prk:5",
    "dpmpp-2m:6",
    "dpmpp-2m-sde:6",
    "unipc:6",
    "heun:10:5",
    "ddpm:6:3",
]
SEEDS = [3, 2**62 + 1, 7]
SHAPE = (3, 16, 16)
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "is_nonzero",
    "item",
    "equal",
    "masked_select",
}  # aten calls that read on the host

on_every_device = pytest.mark.parametrize(
    ("device", "graphs"), [("cpu", False), pytest.param("cuda", False, marks=pytest.mark.gpu),
                           pytest.param("cuda", True, marks=pytest.mark.gpu)]
)  # fmt: skip


class NoHostReads(TorchDispatchMode):
    """Fails at an operation for which a GPU would have to finish its queue."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


class OneDevice(TorchDispatchMode):
    """Fails at an operation that sees a tensor of another device than `meta`: on a GPU, a copy that no recording can hold."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, output)):
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", f"{func} on {value.device}"
        return output


@pytest.fixture(scope="module")
def pipelines(label_model):
    return {}


def open_pipeline(pipelines, label_model, device):
    if device not in pipelines:
        pipelines[device] = load(label_model, "eager", device=device)
    return pipelines[device]


def inputs(pipeline, table):
    clean = None
    if table.noise_steps is not None:
        clean = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)).to(pipeline.engine.device)
    x = initial_latents(table, SEEDS, SHAPE, clean, xp=torch, device=pipeline.engine.device)
    cond = torch.zeros(3, 24)
    cond[0, 3] = cond[1, 7] = cond[2, 9] = 1
    return x, (cond.to(pipeline.engine.device),), (torch.zeros(1, 24, device=pipeline.engine.device),)


def device_loop(pipeline, table, graphs):
    cond = (torch.zeros(3, 24, device=pipeline.engine.device),)
    return DeviceLoop(pipeline.engine, table, (3, *SHAPE), cond, graphs=graphs)


def seeds_on(pipeline):
    return pipeline.engine.array(np.array(SEEDS, np.int64))


@on_every_device
@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0}, {"guidance_scale": 3.0, "guidance_interval": (1, 4)}])
@pytest.mark.parametrize("key", SOLVERS)
def test_it_equals_the_loop_for_every_kind_of_solver(pipelines, label_model, device, graphs, key, options):
    pipeline = open_pipeline(pipelines, label_model, device)
    table = TableCompiler(SCHEDULE).table(key)
    if "guidance_interval" in options and len(table) < 4:
        options = options | {"guidance_interval": (1, 2)}
    x, cond, uncond = inputs(pipeline, table)
    expected = sample(
        lambda *a: pipeline.engine.run("unet", *a)[0], table, x, cond, seeds=SEEDS, uncond=uncond, **options
    )
    loop = device_loop(pipeline, table, graphs)
    for _ in range(2):  # nothing is left behind in the buffers
        found = loop.run(x, cond, seeds=seeds_on(pipeline), uncond=uncond, **options)
        torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-3)


@on_every_device
def test_results_are_not_overwritten_by_the_next_run(pipelines, label_model, device, graphs):
    pipeline = open_pipeline(pipelines, label_model, device)
    table = TableCompiler(SCHEDULE).table("ddpm:4")
    x, cond, _ = inputs(pipeline, table)
    loop = device_loop(pipeline, table, graphs)
    first = loop.run(x, cond, seeds=seeds_on(pipeline))
    kept = first.clone()
    loop.run(2 * x, cond, seeds=seeds_on(pipeline) + 1)
    assert torch.equal(first, kept)


@on_every_device
def test_steps_yield_the_state_after_every_row(pipelines, label_model, device, graphs):
    pipeline = open_pipeline(pipelines, label_model, device)
    table = TableCompiler(SCHEDULE).table("ddpm:4")
    x, cond, _ = inputs(pipeline, table)
    loop, seeds = device_loop(pipeline, table, graphs), seeds_on(pipeline)
    states = [(i, state.clone()) for i, state in loop.steps(x, cond, seeds=seeds)]
    network = pipeline.engine.run
    expected = sample_steps(lambda *a: network("unet", *a)[0], table, x, cond, seeds=SEEDS)
    for (i, state), (row, reference) in zip(states, expected, strict=True):
        assert i == row
        torch.testing.assert_close(state, reference, atol=5e-4, rtol=1e-3)
    assert torch.equal(states[-1][1], loop.run(x, cond, seeds=seeds))
    assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("key", SOLVERS)
def test_no_row_reads_the_device(pipelines, label_model, key):
    pipeline = open_pipeline(pipelines, label_model, "cpu")
    table = TableCompiler(SCHEDULE).table(key)
    x, cond, uncond = inputs(pipeline, table)
    loop, seeds = device_loop(pipeline, table, False), seeds_on(pipeline)
    with NoHostReads():
        loop.run(x, cond, seeds=seeds, guidance_scale=2.0, uncond=uncond)


def test_the_check_for_host_reads_can_fail():
    with NoHostReads(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()


class Shapes:
    """An engine on `meta` tensors, which have shapes and no values."""

    device, capturable = "meta", True

    def run(self, network, sample, timestep, cond):
        assert len(sample) == len(timestep) == len(cond)
        return (torch.empty_like(sample),)

    def run_guided(self, sample, timestep, conds):
        assert len(conds) == 2 * len(sample)
        return torch.cat([sample, sample])


@pytest.mark.parametrize("key", SOLVERS)
def test_no_row_needs_a_value_on_the_host_not_even_inside_an_operation(key):
    """A boolean mask, for one, is looked up by an operation that reads the device inside."""
    table = TableCompiler(SCHEDULE).table(key)
    assert (table.clip is not None) == key.startswith(("ddim", "ddpm", "heun"))  # clipping is among what is looked at
    new = {"device": "meta"}
    x, cond, uncond = torch.empty(3, *SHAPE, **new), (torch.empty(3, 24, **new),), (torch.empty(1, 24, **new),)
    loop = DeviceLoop(Shapes(), table, (3, *SHAPE), cond, graphs=False)
    seeds = torch.empty(3, dtype=torch.int64, **new)
    for options in ({}, {"guidance_scale": 2.0, "uncond": uncond}):
        with OneDevice():
            assert loop.run(x, cond, seeds=seeds, **options).shape == (3, *SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["monsters-pndm-rag", "monsters-ddim", "monsters-best", "iclevr-class-embed", "iclevr-concat"]
)
def test_no_reference_network_needs_a_value_on_the_host(name, dtype):
    from benchmarks.models import architecture, build
    from fastgen.models.condition import CLASS, STATES
    from fastgen.models.networks.denoiser import Denoiser
    from fastgen.models.networks.labels import conditioner_for

    preset = architecture(name)
    with torch.device("meta"):
        unet = build(preset, "unet")
        if preset.conditioner is None:
            network, cond = Denoiser(unet, [STATES]), torch.empty(2, 77, unet.config.cross_attention_dim)
        else:
            network = Denoiser(unet, [CLASS], conditioner_for(preset.conditioner, unet.config, ICLEVR_OBJECTS, 24))
            cond = torch.empty(2, 24)
        size = unet.config.sample_size
        x, timestep = torch.empty(2, unet.config.out_channels, size, size), torch.empty(2)
    network = network.to(dtype)
    with torch.inference_mode(), OneDevice():
        assert network(x.to(dtype), timestep, cond.to(dtype)).shape == x.shape


def test_the_checks_on_meta_tensors_can_fail():
    x = torch.empty(3, device="meta")
    for reads in (lambda: x[x > 1], lambda: x.item(), lambda: bool(x[0] > 0)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            reads()
    for mixes in (lambda: x + torch.tensor(1.0), lambda: torch.tensor([1.0, 2.0, 3.0]).to("meta")):
        with pytest.raises(AssertionError, match="on cpu"), OneDevice():
            mixes()


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("key", ["pndm:6", "ddpm:6"])
def test_a_gpu_is_never_waited_for_between_steps(pipelines, label_model, key, graphs):
    pipeline = open_pipeline(pipelines, label_model, "cuda")
    table = TableCompiler(SCHEDULE).table(key)
    x, cond, uncond = inputs(pipeline, table)
    loop, seeds = device_loop(pipeline, table, graphs), seeds_on(pipeline)
    loop.run(x, cond, seeds=seeds, guidance_scale=2.0, uncond=uncond)  # records
    torch.cuda.set_sync_debug_mode("error")
    try:
        loop.run(x, cond, seeds=seeds, guidance_scale=2.0, uncond=uncond)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class SelfRecording:
    """An engine that records its own graphs, such as onnxruntime's: its calls stay outside ours."""

    def __init__(self, engine):
        self._engine, self.calls = engine, 0
        self.device, self.capturable = engine.device, False

    def run(self, *inputs):
        self.calls += 1
        return self._engine.run(*inputs)

    def run_guided(self, *inputs):
        self.calls += 1
        return self._engine.run_guided(*inputs)


@pytest.mark.gpu
def test_an_engine_that_records_its_own_graphs_runs_between_two_of_ours(pipelines, label_model):
    pipeline = open_pipeline(pipelines, label_model, "cuda")
    table = TableCompiler(SCHEDULE).table("dpmpp-2m-sde:6")
    x, cond, uncond = inputs(pipeline, table)
    options = {"seeds": seeds_on(pipeline), "guidance_scale": 3.0, "uncond": uncond, "guidance_interval": (1, 4)}
    engine = SelfRecording(pipeline.engine)
    expected = device_loop(pipeline, table, False).run(x, cond, **options)
    loop = DeviceLoop(engine, table, (3, *SHAPE), cond, graphs=True)
    torch.testing.assert_close(loop.run(x, cond, **options), expected, atol=5e-4, rtol=1e-3)
    engine.calls = 0
    loop.run(x, cond, **options)
    assert engine.calls == len(table)


def test_half_the_rows_where_nothing_is_guided(pipelines, label_model):
    pipeline = open_pipeline(pipelines, label_model, "cpu")
    table = TableCompiler(SCHEDULE).table("ddim:6")
    x, cond, uncond = inputs(pipeline, table)
    counted, rows = SelfRecording(pipeline.engine), []
    counted.run = lambda name, s, t, c: rows.append(len(c)) or pipeline.engine.run(name, s, t, c)
    counted.run_guided = lambda s, t, c: rows.append(len(c)) or pipeline.engine.run_guided(s, t, c)
    loop = DeviceLoop(counted, table, (3, *SHAPE), cond, graphs=False)
    loop.run(x, cond, seeds=seeds_on(pipeline), guidance_scale=2.0, uncond=uncond, guidance_interval=(2, 4))
    assert rows == [3, 3, 6, 6, 3, 3]
    rows.clear()
    loop.run(x, cond, seeds=seeds_on(pipeline), guidance_scale=1.0)
    assert rows == [3] * 6


def test_guidance_without_an_unconditional_row_is_refused(pipelines, label_model):
    pipeline = open_pipeline(pipelines, label_model, "cpu")
    table = TableCompiler(SCHEDULE).table("ddim:6")
    x, cond, _ = inputs(pipeline, table)
    with pytest.raises(InputError, match="needs the unconditional row"):
        device_loop(pipeline, table, False).run(x, cond, seeds=seeds_on(pipeline), guidance_scale=2.0)
