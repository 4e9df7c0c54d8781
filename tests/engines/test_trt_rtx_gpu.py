"""TensorRT for RTX itself on an RTX card: what engine trt must do there, and the kernels that it compiles."""

from __future__ import annotations

from typing import Any

import pytest
from test_trt_gpu import (  # noqa: F401  (run here with this module's engine)
    on_gpu,
    test_a_recorded_run_replays_with_new_inputs_and_equals_a_call,
    test_graphs_of_two_batch_sizes_share_memory_and_keep_their_results,
    test_it_is_certified,
    test_plans_agree_with_onnxruntime_on_the_same_graph,
    test_run_waits_for_nothing,
)

from fastgen.engines import create_engine
from fastgen.models.bundle import read_bundle

torch = pytest.importorskip("torch")
pytest_plugins = ("trt_fixtures",)
pytestmark = pytest.mark.gpu("tensorrt-rtx")


@pytest.fixture(params=["fp32", "fp16"])
def engine(request, half_copy, tmp_path, monkeypatch) -> Any:
    from export.trt_rtx import build_plans

    card = "{}.{}".format(*torch.cuda.get_device_capability())
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    held = build_plans(read_bundle(half_copy), dtype=request.param, batch_sizes=[2], capabilities=[card])
    return create_engine("trt-rtx", held, dtype=request.param)


def test_kernels_that_were_compiled_are_accepted_by_the_next_engine(engine, tmp_path, capsys):
    values = on_gpu(engine, 3)
    expected = engine.run("unet", *values)[0]
    (file,) = (tmp_path / "cache" / "kernels").glob("*.cache")
    stored = file.read_bytes()
    again = create_engine("trt-rtx", engine._bundle, dtype=engine.dtype)
    torch.testing.assert_close(again.run("unet", *values)[0], expected, atol=0, rtol=0)
    assert file.read_bytes() == stored
    assert capsys.readouterr().err == ""


def test_every_number_of_rows_runs_and_more_is_one_line(engine):
    from fastgen.errors import InputError

    for rows in engine.batch_sizes("unet"):
        assert len(engine.run("unet", *on_gpu(engine, rows))[0]) == rows
    with pytest.raises(InputError, match="its plan takes 1 to 4"):
        engine.run("unet", *on_gpu(engine, 5))
