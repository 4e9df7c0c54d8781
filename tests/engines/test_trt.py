"""Engine trt: plans are found, verified, opened and run; over the recording double, whose plans run on the CPU."""

from __future__ import annotations

import sys
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tensorrt_double as double
from tensorrt_double import BEHAVIOUR, CALLS, called
from trt_helpers import STREAM, build, inputs
from wrong_inputs import refuses_wrong_inputs

from fastgen.engines import create_engine
from fastgen.engines.trt import platform
from fastgen.engines.trt.plan import PLAN
from fastgen.errors import FastgenError, InputError
from fastgen.models.bundle import read_bundle

torch = pytest.importorskip("torch")
pytest_plugins = ("trt_fixtures",)


@pytest.fixture
def engine(card, labels):
    build(labels, batch_sizes=[2])
    CALLS.clear()
    return create_engine("trt", labels, dtype="fp32")


def test_it_computes_what_the_graph_computes(engine, labels):
    reference = create_engine("ort", labels)
    for rows in (2, 4):
        values = inputs(labels, "unet", rows)
        expected = reference.run("unet", *(v.numpy() for v in values))[0]
        np.testing.assert_allclose(engine.run("unet", *values)[0].numpy(), expected, atol=1e-5)


def test_addresses_are_bound_when_they_change_and_work_is_queued_on_the_given_stream(engine, labels):
    values = inputs(labels, "unet", 2)
    first = engine.run("unet", *values)[0]
    second = engine.run("unet", *values)[0]
    bound = called("IExecutionContext.set_tensor_address")
    assert bound[:4] == [
        *((name, value.data_ptr()) for name, value in zip(("sample", "timestep", "class_labels"), values, strict=True)),
        ("out_sample", first.data_ptr()),
    ]
    assert bound[4:] == [("out_sample", second.data_ptr())]  # the first is still held, and not written to
    assert [call[0] for call in called("IExecutionContext.execute_async_v3")] == [STREAM, STREAM]
    assert called("ICudaEngine.create_execution_context") == [(double.ExecutionContextAllocationStrategy.USER_MANAGED,)]


def test_outputs_are_never_overwritten_by_a_later_call(engine, labels):
    values = inputs(labels, "unet", 2)
    first = engine.run("unet", *values)[0]
    kept = first.clone()
    engine.run("unet", *(2 * v for v in values))
    assert torch.equal(first, kept)


def test_an_input_that_is_not_contiguous_is_read_as_it_looks(engine, labels):
    sample, *rest = inputs(labels, "unet", 2)
    turned = sample.transpose(2, 3)
    assert not turned.is_contiguous()
    expected = engine.run("unet", turned.contiguous(), *rest)[0]
    assert torch.equal(engine.run("unet", turned, *rest)[0], expected)


def test_an_input_of_another_dtype_or_shape_is_not_read_past_its_end(engine, labels):
    refuses_wrong_inputs(engine)
    assert called("IExecutionContext.execute_async_v3") == []


def test_plans_of_one_network_share_their_memory_and_keep_what_graphs_point_into(engine, labels):
    engine.run("unet", *inputs(labels, "unet", 4))
    engine.run("unet", *inputs(labels, "unet", 2))
    large, small = called("IExecutionContext.set_device_memory")
    assert large == small  # the larger first: one block for both
    assert all(call[1] == large for call in called("IExecutionContext.execute_async_v3"))


def test_a_plan_that_needs_more_memory_leaves_older_ones_theirs(engine, labels):
    engine.run("unet", *inputs(labels, "unet", 2))
    engine.run("unet", *inputs(labels, "unet", 4))
    engine.run("unet", *inputs(labels, "unet", 2))
    small, large = called("IExecutionContext.set_device_memory")
    assert [call[1] for call in called("IExecutionContext.execute_async_v3")] == [small, large, small]
    assert engine._plans["unet", 2].memory.data_ptr() == small[0]


def test_memory_that_is_released_is_that_of_all_plans_and_they_run_again(engine, labels):
    values = inputs(labels, "unet", 4)
    expected = engine.run("unet", *values)[0]
    held = [weakref.ref(thing) for plan in engine._plans.values() for thing in (plan, plan.memory, plan.engine)]
    engine.release_memory()
    assert [ref() for ref in held] == [None] * 3
    assert torch.equal(engine.run("unet", *values)[0], expected)


def test_networks_do_not_share_memory_as_the_vae_may_run_beside_the_unet(card, text_bundle):
    bundle = read_bundle(text_bundle)
    build(bundle, batch_sizes=[1])
    engine = create_engine("trt", bundle, dtype="fp32")
    for network, rows in (("unet", 1), ("vae_decoder", 1), ("text_encoder", 16)):
        engine.run(network, *inputs(bundle, network, rows))
    assert len({memory for memory, _ in called("IExecutionContext.set_device_memory")}) == 3


def test_batch_sizes_are_the_rows_built_and_a_guided_bucket_takes_two_each(engine):
    assert list(engine.batch_sizes("unet")) == [2, 4]
    assert list(engine.buckets(guided=True)) == [1, 2]
    assert list(engine.buckets(guided=False)) == [2, 4]


def test_of_plans_built_with_more_and_less_effort_the_better_one_runs(card, labels):
    for level in (5, 1):
        build(labels, optimization_level=level)
    engine: Any = create_engine("trt", labels, dtype="fp32")
    assert engine._artifacts("unet")[2].recipe.fields["optimization_level"] == 5


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_whole_pictures_through_the_pipeline_equal_those_of_onnxruntime(card, kind, text_bundle, label_bundle):
    from fastgen.generate.pipeline import load

    folder = text_bundle if kind == "text" else label_bundle
    conditions = (
        {"prompts": ["A red dragon", "A blue slime"]} if kind == "text" else {"labels": [["gray cube"], ["red cube"]]}
    )
    build(read_bundle(folder), batch_sizes=[2])
    options: dict[str, Any] = dict(conditions, seeds=[1, 2], num_inference_steps=3, batch_size=2)
    found = [np.asarray(i) for i in load(folder, "trt", dtype="fp32").generate(**options)]
    expected = [np.asarray(i) for i in load(folder, "ort").generate(**options)]
    assert np.abs(np.stack(found).astype(int) - np.stack(expected).astype(int)).max() <= 1


# What does not fit


def test_a_network_that_was_never_built_names_the_command(card, labels):
    engine = create_engine("trt", labels, dtype="fp32")
    with pytest.raises(
        InputError, match=r"no plan of unet in fp32: none of unet was ever built here; run `fastgen export"
    ):
        engine.batch_sizes("unet")


def test_rows_that_were_not_built_name_the_batch_size_that_builds_them(engine, labels):
    message = (
        r"unet for 16 rows in fp32: in the nearest one batch is [24] there, 16 here; .* --dtype fp32 --batch-sizes 8`"
    )
    with pytest.raises(InputError, match=message):
        engine.run("unet", *inputs(labels, "unet", 16))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda gpu: replace(gpu, name="NVIDIA T4"), f"gpu is {double.GPU} there, NVIDIA T4 here"),
        (lambda gpu: replace(gpu, compute_capability="7.5"), "compute_capability is 9.0 there, 7.5 here"),
    ],
)
def test_a_plan_for_another_gpu_is_not_run(engine, labels, card, monkeypatch, change, field):
    monkeypatch.setattr(platform, "open_gpu", lambda device, product=None: change(card))
    with pytest.raises(InputError, match=field):
        create_engine("trt", labels, dtype="fp32").run("unet", *inputs(labels, "unet", 2))


def test_a_plan_of_another_tensorrt_weights_or_dtype_is_not_run(
    engine, labels, half_bundle, scaled_weights, tmp_path, monkeypatch
):
    values = inputs(labels, "unet", 2)
    other = read_bundle(scaled_weights(labels.folder, tmp_path / "scaled", 2.0))
    with pytest.raises(InputError, match="sha256 is "):
        create_engine("trt", other, dtype="fp32").run("unet", *values)
    with pytest.raises(InputError, match="dtype is fp32 there, fp16 here"):
        create_engine("trt", read_bundle(half_bundle), dtype="fp16").run("unet", *values)
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.4.0.106")
    with pytest.raises(InputError, match=r"tensorrt is 10\.13\.3\.9 there, 11\.4\.0\.106 here"):
        create_engine("trt", labels, dtype="fp32").run("unet", *values)
    assert called("Runtime.deserialize_cuda_engine") == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-9], "truncated"),
        (lambda data: data[:-1] + b" ", "altered or damaged"),
        (lambda data: b"", "truncated"),
    ],
)
def test_a_damaged_plan_never_reaches_tensorrt(engine, labels, damage, message):
    path = engine._artifacts("unet")[2].folder / PLAN
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=f"{PLAN}: .*{message}"):
        engine.run("unet", *inputs(labels, "unet", 2))
    assert called("Runtime.deserialize_cuda_engine") == []


@pytest.mark.parametrize("where", ["cache", "engines", "artifact"])
def test_a_cache_that_others_can_write_to_is_not_read(engine, labels, tmp_path, where):
    artifact = engine._artifacts("unet")[2].folder
    folder = {"cache": tmp_path / "cache", "engines": tmp_path / "cache" / "engines", "artifact": artifact}[where]
    folder.chmod(0o777)
    with pytest.raises(InputError, match="other users can write to this cache"):
        engine.run("unet", *inputs(labels, "unet", 2))
    assert called("Runtime.deserialize_cuda_engine") == []


def test_timings_that_others_can_write_to_are_not_read(engine, labels, tmp_path):
    (tmp_path / "cache" / "timings").chmod(0o777)
    with pytest.raises(InputError, match="other users can write to this cache"):
        build(labels, batch_sizes=[16])


def test_a_plan_with_other_tensors_than_the_signature_is_refused(engine, labels, monkeypatch):
    names = double.ICudaEngine.get_tensor_name
    monkeypatch.setattr(
        double.ICudaEngine, "get_tensor_name", lambda self, i: names(self, i).replace("class_labels", "labels")
    )
    with pytest.raises(
        FastgenError, match=r"has the tensors .*labels.*, expected sample, timestep, class_labels, out_sample"
    ):
        engine.run("unet", *inputs(labels, "unet", 2))


def test_a_plan_with_another_dtype_or_shape_is_refused(engine, labels, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(double.ICudaEngine, "get_tensor_dtype", lambda self, name: double.DataType.HALF)
        with pytest.raises(FastgenError, match=r"sample is TensorIOMode.INPUT, DataType.HALF in the plan"):
            engine.run("unet", *inputs(labels, "unet", 2))
    monkeypatch.setattr(double.IExecutionContext, "get_tensor_shape", lambda self, name: (2, 3, 8, 8))
    with pytest.raises(FastgenError, match=r"out_sample is \(2, 3, 8, 8\) in the plan, expected \(2, 3, 16, 16\)"):
        engine.run("unet", *inputs(labels, "unet", 2))


def test_tensorrts_refusals_are_one_line_and_memory_is_told_apart(engine, labels):
    values = inputs(labels, "unet", 2)
    BEHAVIOUR.update(deserialize="fails", reason="Serialization assertion\nmagicTagRead failed")
    with pytest.raises(
        FastgenError, match=r"the plan cannot be loaded: .*Serialization assertion magicTagRead failed"
    ) as raised:
        engine.run("unet", *values)
    assert not engine.is_out_of_memory(raised.value)
    BEHAVIOUR.update(reason="Error Code 2: OutOfMemory (no details)")
    with pytest.raises(FastgenError) as raised:
        engine.run("unet", *values)
    assert engine.is_out_of_memory(raised.value)
    BEHAVIOUR.clear()
    engine.run("unet", *values)
    BEHAVIOUR.update(execute="fails")
    with pytest.raises(FastgenError, match=r"unet at 2 rows failed: .* no reason given"):
        engine.run("unet", *values)
