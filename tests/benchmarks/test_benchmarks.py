"""The benchmarks run on tiny models: every side has a row, with speed, memory and parity, or the reason why not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from benchmarks import floor, matrix, plots
from benchmarks.loop_cost import loop_cost
from benchmarks.measure import LATE, Matrix, Plan
from benchmarks.models import ARCHITECTURES, architecture, build
from benchmarks.profiler import kernel_profile, kind
from benchmarks.prompts import prompts
from benchmarks.report import parity
from benchmarks.rows import NO_STEP, UNITS, Case, Taken
from benchmarks.sides import DTYPES, INFORMED, Side, default_sides, informed
from benchmarks.table import markdown
from benchmarks.worker import Process
from fastgen.errors import InputError

# name -> UNet parameters (M), GFLOP per forward of one sample
UNETS = {
    "monsters-pndm-rag": (846.2, 62.33),
    "monsters-ddim": (241.4, 70.82),
    "monsters-dpmpp": (241.4, 70.82),
    "monsters-best": (296.4, None),
    "iclevr-class-embed": (113.7, 31.03),
    "iclevr-concat": (157.9, 46.35),
    "medium": (139.7, None),
}


PEER = informed(default_sides("cpu"))


@pytest.fixture(scope="module")
def rows(text_model, text_bundle, tmp_path_factory):
    """Side -> row, of a matrix in this process: engines, diffusers, a loop by hand, and one that cannot be."""
    plan = Plan(
        text_model,
        tmp_path_factory.mktemp("work"),
        batches=(2,),
        steps=(5,),
        images=2,
        rounds=2,
        threads=1,
        together=3,
        processes=False,
        bundle=text_bundle,
    )
    sides = [
        "diffusers:fp32",
        "eager:fp32",
        "ort:fp32",
        "two-calls:fp32@1",
        PEER,
        "optimum-onnx",
        "eager:fp32:graphs",
    ]
    found = list(Matrix(plan, [Side.parse(side) for side in sides]).rows())
    assert sorted(row["side"] for row in found) == sorted(sides)
    return {row["side"]: row for row in found}


def test_every_side_s_images_are_those_of_eager_fp32_from_the_same_noise(rows):
    assert rows["eager:fp32"]["max_abs_255"] == 0
    for side in ("diffusers:fp32", "ort:fp32", "two-calls:fp32@1"):
        assert rows[side]["max_abs_255"] <= 1


def test_a_side_that_cannot_run_has_a_row_with_the_reason(rows):
    for side, reason in (("optimum-onnx", "python -m benchmarks.environments"), ("eager:fp32:graphs", "GPU")):
        assert reason in rows[side]["note"]
        assert rows[side]["images_per_s"] is None
        assert f"{side}: " in markdown(list(rows.values()))


def test_every_measured_row_has_speed_memory_and_its_share_of_the_floor(rows):
    positive = ("images_per_s", "ratio", "ratio_informed", "load_s", "first_s", "job_s", "peak_mib")
    for side in ("diffusers:fp32", PEER, "eager:fp32", "ort:fp32", "two-calls:fp32@1"):
        row = rows[side]
        assert list(row) == list(UNITS)
        for name in (*positive, "floor_percent"):
            assert row[name] > 0, (side, name)
        if row["step_ms"] is None:  # these networks are tiny, and the machine may be busy
            assert NO_STEP in row["note"]
        else:
            assert row["step_ms"] > 0
        assert row["extrapolated_from"] == 2
    assert any(row["step_ms"] for row in rows.values())
    assert rows["diffusers:fp32"]["ratio"] == 1
    assert rows[PEER]["ratio_informed"] == 1
    assert rows[PEER]["dtype"] == Side.parse(PEER).dtype
    assert (rows[PEER]["psnr_db"] or math.inf) > 25
    assert rows["two-calls:fp32@1"]["batch"] == 1


def test_a_step_s_time_is_that_of_the_longer_run_s_further_evaluations_and_never_negative():
    case = Case(batch=2, steps=5, images=4)
    taken = Taken(Side("ort", "fp32"), case, {"load_s": 1.0, "build_s": 0.0}, seconds=[0.8, 1.2, 1.0], short_s=0.3)
    assert taken.step_ms(4) == pytest.approx(1000 * (0.5 - 0.3) / 4)
    for none in (0.5, None):
        taken.short_s = none
        assert taken.step_ms(4) is None


def test_a_time_limit_that_is_over_before_the_first_batch_ends_further_rounds_and_cases_only(label_model, tmp_path):
    plan = Plan(label_model, tmp_path, batches=(1, 2), steps=(2,), rounds=3, seconds=-1, threads=1, processes=False)
    first, second = Matrix(plan, [Side("eager", "fp32")]).rows()
    assert (first["batch"], first["rounds"], first["note"]) == (1, 1, "1 of 3 rounds: the time was used up")
    assert first["images_per_s"] > 0
    assert first["max_abs_255"] <= 1
    assert (second["batch"], second["images_per_s"], second["note"]) == (2, None, LATE)


def test_where_the_process_is_ended_then_not_even_a_first_batch_begins_late(label_model, tmp_path):
    plan = Plan(label_model, tmp_path, steps=(2,), seconds=-1, strict=True, threads=1, processes=False)
    expected = {2: np.zeros((4, 32, 32, 3), np.uint8)}
    (row,) = Matrix(plan, [Side("eager", "fp32")], expected).rows()
    assert (row["images_per_s"], row["note"]) == (None, LATE)


def test_a_stochastic_solver_s_images_are_not_compared_with_a_peer_that_draws_its_own_noise(label_model, tmp_path):
    plan = Plan(label_model, tmp_path, steps=(2,), rounds=1, threads=1, processes=False)
    (row,) = Matrix(plan, [Side("diffusers", "fp32")]).rows()
    assert row["images_per_s"] > 0
    assert row["max_abs_255"] is None
    assert "own noise" in row["note"]


def test_peers_are_given_the_solver_that_the_model_samples_with(text_model, tmp_path):
    model = shutil.copytree(text_model, tmp_path / "model")
    settings = json.loads((model / "fastgen.json").read_text())
    settings["sampling"] |= {"scheduler": "unipc", "num_inference_steps": 4}  # the folder's own is ddim
    (model / "fastgen.json").write_text(json.dumps(settings))
    plan = Plan(model, tmp_path, rounds=1, threads=1, processes=False)
    rows = list(Matrix(plan, [Side("diffusers", "fp32"), Side("two-calls", "fp32"), Side("optimum-onnx")]).rows())
    assert [row["max_abs_255"] is not None and row["max_abs_255"] <= 1 for row in rows] == [True, True, False]


@pytest.mark.parametrize("side", [INFORMED[0], "diffusers-compile:bf16"])
def test_informed_users_networks_are_in_bf16_and_channels_last(side, text_model, label_model, monkeypatch):
    import torch

    from benchmarks.runners import diffusion

    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    parsed = Side.parse(side)
    opening = {"name": parsed.name, "dtype": parsed.dtype, "channels_last": parsed.channels_last, "threads": 1}
    opening |= {"device": "cpu", "guidance_scale": 2.0, "scheduler": "ddim"}
    text = diffusion.open_runner(opening | {"model": text_model})._pipeline
    label = diffusion.open_runner(opening | {"model": label_model})._unet
    for network in (text.unet, text.vae, label):
        kernels = [p for p in network.parameters() if p.ndim == 4 and p.shape[-1] > 1]  # 1 x 1 has no order
        assert len(kernels) > 4
        assert all(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in kernels)
        assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_what_a_runner_has_to_say_of_itself_stands_in_its_row(label_model, tmp_path, monkeypatch):
    from benchmarks.runners import diffusion

    monkeypatch.setattr(diffusion.Labels, "note", "calibrated on 4 prompts")
    plan = Plan(label_model, tmp_path, steps=(2,), rounds=1, threads=1, processes=False)
    (row,) = Matrix(plan, [Side("diffusers", "fp32")]).rows()
    assert row["note"] == "calibrated on 4 prompts; draws its own noise: images not comparable"


def test_the_informed_user_takes_turns_with_every_side_and_has_one_row(label_model, tmp_path, monkeypatch):
    turns = []
    generate = Matrix._generate
    monkeypatch.setattr(
        Matrix, "_round", lambda self, side, one: (turns.append(str(side.side)), timed(self, side, one))
    )

    def timed(self, side, one):
        one.seconds.append(generate(self, side, 1, 1, one.case.steps)["seconds"])

    sides = ["diffusers:fp32", "eager:fp32", "eager:fp32:nographs", PEER]
    plan = Plan(label_model, tmp_path, steps=(2,), rounds=2, threads=1, processes=False, together=3)
    rows = list(Matrix(plan, list(map(Side.parse, sides))).rows())
    assert turns == 2 * ["diffusers:fp32", PEER, "eager:fp32"] + 2 * ["diffusers:fp32", PEER, "eager:fp32:nographs"]
    assert sorted(row["side"] for row in rows) == sorted(sides)


def test_optimum_s_int8_is_its_own_calibrated_on_prompts_that_are_not_measured(text_model, tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    from benchmarks.runners import optimum

    calls = []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, folder, **options):
            calls.append((Path(folder), options))
            return cls()

        def save_pretrained(self, folder):
            folder.mkdir()

        def set_progress_bar_config(self, disable):
            assert disable

    intel = SimpleNamespace(OVStableDiffusionPipeline=Pipeline, OVQuantizationConfig=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "optimum", SimpleNamespace(intel=intel))
    monkeypatch.setitem(sys.modules, "optimum.intel", intel)
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1.0")
    opening = {"name": "optimum-intel", "model": str(text_model), "work": str(tmp_path), "device": "cpu", "threads": 1}
    opening |= {"guidance_scale": 2.0, "image_size": 32}
    for dtype in ("int8", "int8", "fp32"):
        runner = optimum.open_runner(opening | {"dtype": dtype})
        assert runner.dtype == dtype
        assert ("calibrated" in (runner.note or "")) == (dtype == "int8")
    int8, fp32 = (tmp_path / f"{text_model.name}-optimum-intel{suffix}" for suffix in ("-int8", ""))
    assert [folder for folder, _ in calls] == [text_model, int8, int8, text_model, fp32]  # quantised once
    config = calls[0][1]["quantization_config"]
    assert config.bits == 8
    assert len(config.dataset) * 50 == config.num_samples
    assert set(prompts(64)).isdisjoint(config.dataset)
    assert calls[1][1]["ov_config"]["INFERENCE_PRECISION_HINT"] in ("bf16", "f32")  # of what is not in int8
    assert "quantization_config" not in calls[3][1]
    assert calls[4][1]["ov_config"]["INFERENCE_PRECISION_HINT"] == "f32"


def test_a_side_in_its_own_process_answers_with_images_memory_and_errors(text_bundle, tmp_path):
    np.save(tmp_path / "latents.npy", np.zeros((1, 4, 8, 8), np.float32))
    opening = {"do": "open", "name": "ort", "dtype": "fp32", "graphs": None, "device": "cpu", "threads": 1}
    job = {"do": "generate", "batch": 1, "count": 1, "steps": 2, "latents": str(tmp_path / "latents.npy")}
    worker = Process(threads=1)
    try:
        assert "neither a bundle" in worker.call(opening | {"model": "-", "bundle": str(tmp_path)})["error"]
        assert worker.call(opening | {"model": "-", "bundle": str(text_bundle)})["dtype"] == "fp32"
        answer = worker.call(job | {"prompts": ["a red dragon"], "out": str(tmp_path / "images.npy")})
        assert answer["peak_mib"] > 10
        assert np.load(tmp_path / "images.npy").shape == (1, 32, 32, 3)
        assert "InputError" in worker.call(job | {"labels": [["red cube"]], "out": None})["error"]
        worker._process.kill()
        assert "ended with code" in worker.call(job)["error"]
    finally:
        worker.close()


def test_figures_are_what_the_timings_say():
    opened = {"dtype": "bf16", "load_s": 2.0, "build_s": 10.0}
    pixels = np.zeros((4, 2, 2, 3), np.uint8)
    reference = Taken(Side("diffusers"), Case(4, 10, 4), opened | {"build_s": 0.0}, first_s=8.0, seconds=[8.0, 16.0])
    taken = Taken(Side("ort"), Case(4, 10, 4), opened, pixels=pixels, first_s=7.0, seconds=[2.0, 4.0])
    row = taken.row(reference, job=100)
    assert row["images_per_s"] == pytest.approx(1.5)  # median of 2 and 1
    assert row["ratio"] == 4
    assert row["ratio_informed"] is None
    other = Taken(Side.parse(PEER), Case(4, 10, 4), opened, seconds=[1.0, 3.0])
    assert taken.row(reference, 100, other)["ratio_informed"] == pytest.approx(0.625)  # median of 1/2 and 3/4
    assert row["build_s"] == 10 + 7 - 3
    assert row["repaid_after"] == np.ceil(14 / (1 / 0.375 - 1 / 1.5))
    assert (row["first_s"], row["job_s"], row["extrapolated_from"]) == (9, pytest.approx(2 + 100 / 1.5), 4)
    given = Taken(
        Side("ort"), Case(4, 10, 4), opened | {"build_s": None}, pixels=pixels, first_s=7.0, seconds=[2.0, 4.0]
    )
    unknown = given.row(reference, job=100)  # of a bundle that was exported before
    assert unknown == row | {"build_s": None, "repaid_after": None}


@pytest.mark.parametrize(
    "text",
    [
        "eager",
        "ort:fp32",
        "eager:fp16:nographs",
        "compile:bf16:graphs",
        "two-calls:fp32@1",
        *INFORMED,
        "openvino:int8",
        "optimum-intel:int8@2",
    ],
)
def test_a_side_is_written_as_it_is_read(text):
    assert str(Side.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["eagre", "eager:fp64", "diffusers:fp16:graphs", "eager@0", "eager@x", "eager:channels_last", "diffusers:int8"],
)
def test_a_side_that_does_not_exist_is_an_input_error(text):
    with pytest.raises(InputError):
        Side.parse(text)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_default_sides_are_engines_and_all_peers(device):
    known = {name.partition("@")[0].split(":")[0] for name in default_sides(device)}
    assert {"eager", "ort", "diffusers", "diffusers-compile", "two-calls", "optimum-onnx"} <= known


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_synthetic_architectures_have_the_size_of_the_reference_systems(name, tmp_path):
    import torch

    preset = architecture(name)
    params, gflop = UNETS[name]
    with torch.device("meta"):
        build(preset, "unet").save_config(tmp_path / "unet")
        if preset.kind == "text":
            build(preset, "vae").save_config(tmp_path / "vae")
    work = floor.count(tmp_path)
    assert work.unet_params / 1e6 == pytest.approx(params, abs=0.05)
    assert gflop is None or work.unet_flop / 1e9 == pytest.approx(gflop, abs=0.01)
    if preset.kind == "text":
        assert work.vae_params / 1e6 == pytest.approx(49.5, abs=0.05)
        assert work.vae_flop / 1e9 == pytest.approx(622.2, abs=0.1)


def test_the_floor_is_operations_at_large_batches_and_weights_at_small_ones():
    work = floor.Work(62.33e9, 846_000_000, 622.2e9, 49_500_000)
    rates = floor.Rates(790e12, 4.3e12)
    job = floor.floor_s(work, rates, "fp16", images=1063, batch=1063, evaluations=71, guided=True)
    assert job == pytest.approx(11.9 + 0.84, abs=0.05)
    one = floor.floor_s(floor.Work(62.33e9, 846_000_000), rates, "fp16", images=1, batch=1, evaluations=1, guided=True)
    assert one == pytest.approx(0.39e-3, abs=0.005e-3)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != "fp16"])
def test_measured_rates_are_positive_and_finite(dtype):
    rates = floor.measure("cpu", dtype, threads=1, seconds=0)
    assert 1e8 < rates.flop_per_s < 1e15
    assert 1e7 < rates.bytes_per_s < 1e14


def test_made_up_prompts_are_distinct():
    assert len(set(prompts(1063))) == 1063


def test_parity_is_the_textbook_psnr():
    expected = np.zeros((1, 4, 4, 3), np.uint8)
    found = expected.copy()
    found[0, 0, 0, 0] = 255
    assert parity(expected, found) == {"psnr_db": pytest.approx(10 * np.log10(48)), "max_abs_255": 255}


def test_loop_cost_is_the_share_outside_the_networks(label_bundle):
    row = loop_cost(label_bundle, "ort", batch_size=2, rounds=2, num_inference_steps=3)
    assert row["solver"].endswith(":3")
    assert 0 < row["loop_percent"] < 100


def test_plots_show_growth_and_the_floor_or_say_what_to_install(rows, tmp_path):
    measured = [row for row in rows.values() if row["images_per_s"]]
    more = [row | {"batch": 2 * row["batch"], "steps": 5} for row in measured]
    settings = {"model": "tiny", "image_size": 32, "scheduler": "ddim"}
    value = {"settings": settings, "environment": {"cores": 2, "cpu": "any"}, "rows": measured + more}
    (tmp_path / "result.json").write_text(json.dumps(value))
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(InputError, match="matplotlib>="):
            plots.plots(tmp_path / "result.json")
        return
    assert [file.name for file in plots.plots(tmp_path / "result.json")] == ["result-batch.png", "result-floor.png"]
    assert all(file.stat().st_size > 5000 for file in tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("sm90_xmma_gemm_f16f16_f16f32", "matrix product"),
        ("cudnn::fusion::conv_fprop_sm90", "convolution"),
        ("void pytorch_flash::flash_fwd_kernel", "attention"),
        ("triton_poi_fused_silu_3", "fused by a compiler"),
        ("Memcpy DtoD (Device -> Device)", "copy and layout"),
        ("void at::native::RowwiseMomentsCUDAKernel", "other"),
    ],
)
def test_kernels_are_sorted_by_kind(kernel, expected):
    assert kind(kernel) == expected


def test_a_profile_s_shares_add_up():
    import torch

    a = torch.randn(64, 64)
    found = kernel_profile(lambda: torch.nn.functional.silu(a @ a))
    assert sum(row["percent"] for row in found["kinds"]) == pytest.approx(100)
    assert any("mm" in row["kernel"] for row in found["kernels"])


@pytest.mark.slow
def test_the_engines_of_a_bundle_are_measured_in_processes_of_their_own(text_model, text_bundle, tmp_path):
    from benchmarks import engines

    out = tmp_path / "engines.json"
    arguments = [text_model, text_bundle, "--batch-size", 2, "--steps", 2, "--rounds", 1, "--seconds", 0, "--out", out]
    result = CliRunner().invoke(engines.main, [str(a) for a in arguments], catch_exceptions=False)
    report = json.loads(out.read_text())
    rows = {row["side"]: row for row in report["rows"]}
    assert rows["eager:fp32"]["ratio"] == 1
    assert rows["ort"]["max_abs_255"] <= 1
    assert rows["ort"]["peak_mib"] < rows["eager:fp32"]["peak_mib"]  # no torch in its process
    assert "ort fp32" in result.output
    assert report["environment"]["cores"] >= 1


def test_the_table_names_the_sides_that_ratios_are_to(rows):
    header, _, first, *_ = markdown(list(rows.values())).splitlines()
    assert "| against diffusers fp32 | against diffusers bf16 channels_last |" in header
    assert first.startswith("| diffusers fp32 |")
    older = [{k: v for k, v in row.items() if k != "ratio_informed"} for row in rows.values()]
    assert "| against diffusers fp32 | ms per step |" in markdown(older).splitlines()[0]


def test_an_unknown_architecture_or_side_is_one_line(tmp_path):
    for arguments in (["--synthetic", "monsters-dim"], ["--synthetic", "medium", "--side", "eagre"]):
        result = CliRunner().invoke(matrix.main, [*arguments, "--work", str(tmp_path), "--device", "cpu"])
        assert result.exit_code == 1
        assert "Did you mean" in str(result.exception) or "error: " in str(result.exception)


def test_full_size_presets_take_a_real_optimiser_step_and_an_evaluation(monkeypatch):
    from msgspec.structs import replace

    from benchmarks import full_size
    from fastgen.presets import load_preset

    small = load_preset("iclevr-small", ["unet.config.block_out_channels=[32, 32, 32]", "conditioner.dim=128"])
    monkeypatch.setattr(full_size, "architecture", lambda name: replace(small, name=name))
    row = full_size.full_size("iclevr-small", device="cpu", threads=1, steps=1)
    assert row["output"] == "3x64x64"
    assert row["parameters"] < 1_711_363
    assert 0.5 < row["loss"] < 1.5  # of the noise, by a network that begins with 0
    assert row["step_s"] > 0
    assert row["step_peak_mib"] > 0
