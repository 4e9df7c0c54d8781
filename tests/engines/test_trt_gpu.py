"""TensorRT itself on a GPU: tiny plans are built, certified, and recorded into CUDA graphs."""

from __future__ import annotations

import numpy as np
import pytest
from trt_helpers import build, inputs

from fastgen.engines import create_engine
from fastgen.models.bundle import read_bundle

torch = pytest.importorskip("torch")
pytest_plugins = ("trt_fixtures",)
pytestmark = pytest.mark.gpu("tensorrt")


@pytest.fixture(params=["fp32", "fp16"])
def engine(request, half_bundle):
    bundle = read_bundle(half_bundle)
    build(bundle, dtype=request.param, batch_sizes=[2])
    return create_engine("trt", bundle, dtype=request.param)


def on_gpu(engine, rows):
    return [value.to(engine.device) for value in inputs(engine._bundle, "unet", rows)]


def test_plans_agree_with_onnxruntime_on_the_same_graph(engine):
    values = on_gpu(engine, 4)
    expected = create_engine("ort", engine._bundle, device="cpu").run("unet", *(v.cpu().numpy() for v in values))[0]
    found = engine.run("unet", *values)[0].cpu().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4 if engine.dtype == "fp32" else 0.05, rtol=1e-2)


def test_it_is_certified(engine):
    from export.certificate import certify

    assert certify(engine, engine._bundle).passed


def test_run_waits_for_nothing(engine):
    values = on_gpu(engine, 2)
    engine.run("unet", *values)  # loads the plan
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.run("unet", *values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_recorded_run_replays_with_new_inputs_and_equals_a_call(engine):
    values = on_gpu(engine, 2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        engine.run("unet", *values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = engine.run("unet", *values)[0]
    for factor in (0.5, -1.0):
        values[0].mul_(factor)
        expected = engine.run("unet", *values)[0].clone()
        graph.replay()
        torch.cuda.synchronize()
        torch.testing.assert_close(recorded, expected, atol=0, rtol=0)


def test_graphs_of_two_batch_sizes_share_memory_and_keep_their_results(engine):
    recorded = {}
    for rows in (4, 2):
        values = on_gpu(engine, rows)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            expected = engine.run("unet", *values)[0]
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            found = engine.run("unet", *values)[0]
        recorded[rows] = graph, values, found, expected
    for _ in range(2):
        for graph, _, found, expected in recorded.values():
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_a_second_build_takes_nothing_and_a_damaged_plan_is_built_again(engine):
    artifact = engine._artifacts("unet")[2]
    lines: list[str] = []
    build(engine._bundle, dtype=engine.dtype, batch_sizes=[2], say=lines.append)
    assert lines == []
    plan = artifact.folder / "engine.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    build(engine._bundle, dtype=engine.dtype, batch_sizes=[2], say=lines.append)
    assert "truncated" in lines[0]
    artifact.verify()
