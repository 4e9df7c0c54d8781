"""`fastgen export --rtx` over a double: which plans lie in a bundle afterwards, and that it is whole at every moment."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tensorrt_rtx_double as double
from tensorrt_double import BEHAVIOUR, BuilderFlag, called
from trt_helpers import press_ctrl_c_at_the_first_step

from export.trt_rtx import DEFAULT_CAPABILITIES, build_plans
from fastgen.engines import engine_class
from fastgen.engines.cache.artifacts import bundled
from fastgen.engines.trt.plan import CAPABILITIES, PLAN
from fastgen.errors import FastgenError
from fastgen.files.jsonfiles import read_json, write_json
from fastgen.models.bundle import COMPILED, Bundle, read_bundle

torch = pytest.importorskip("torch")
pytest_plugins = ("trt_fixtures",)


class KilledError(Exception):
    """The process ends here."""


@pytest.fixture
def bundle(rtx_card, half_copy) -> Path:
    return half_copy


def build(bundle: Path, **options: Any) -> Bundle:
    return build_plans(read_bundle(bundle), **{"batch_sizes": [2, 4]} | options)  # type: ignore[arg-type]


def plans(bundle: Path) -> list[tuple[Any, ...]]:
    """(network, dtype, most rows, capabilities) of every plan, sorted."""
    fields = [a.recipe.fields for a in bundled(read_bundle(bundle))]
    return sorted((f["network"], f["dtype"], f["batch"], f[CAPABILITIES]) for f in fields)


def contents(folder: Path) -> dict[str, bytes]:
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_a_plan_lies_in_the_bundle_with_what_it_depends_on(bundle):
    held = build(bundle)
    (artifact,) = bundled(held)
    assert artifact.folder == bundle / COMPILED / artifact.recipe.digest
    assert {f"{COMPILED}/{artifact.recipe.digest}/{name}" for name in (PLAN, "artifact.json")} <= set(held.files)
    fields = artifact.recipe.fields
    assert fields["graph_sha256"] == held.files["unet/model.fp16.onnx"].sha256
    assert (fields["tensorrt_rtx"], fields["dtype"], fields[CAPABILITIES]) == (
        double.VERSION,
        "fp16",
        "8.0 8.6 8.9 12.0",
    )
    assert (fields["least_rows"], fields["best_rows"], fields["batch"]) == (1, 8, 8)
    assert not {"gpu", "platform"} & set(fields)  # it runs on others than the one it was built on


def test_a_build_is_strongly_typed_without_tf32_for_every_card_and_any_number_of_rows(bundle):
    build(bundle)
    assert called("Builder.create_network") == [(1 << double.NetworkDefinitionCreationFlag.STRONGLY_TYPED,)]
    assert called("IBuilderConfig.clear_flag") == [(BuilderFlag.TF32,)]
    cards = [getattr(double.ComputeCapability, f"SM{c.replace('.', '')}") for c in DEFAULT_CAPABILITIES]
    assert called("IBuilderConfig.set_compute_capability") == [(card, i) for i, card in enumerate(cards)]
    profile = {name: shapes for name, *shapes in called("IOptimizationProfile.set_shape")}
    assert profile["sample"] == [(1, 3, 16, 16), (8, 3, 16, 16), (8, 3, 16, 16)]
    assert profile["timestep"] == [(1,), (8,), (8,)]


def test_verifying_a_bundle_for_another_engine_does_not_read_plans(bundle):
    (artifact,) = bundled(build(bundle))
    (artifact.folder / PLAN).write_bytes(b"damaged")
    read_bundle(bundle).verify("fp16")


def test_what_the_bundle_holds_is_not_built_again(bundle):
    lines: list[str] = []
    build(bundle)
    before = contents(bundle)
    build(bundle, say=lines.append)
    assert lines == [f"{bundle} holds these plans already"]
    assert contents(bundle) == before
    assert len(called("Builder.build_serialized_network")) == 1


def test_other_batch_sizes_take_the_place_of_the_plan_and_of_its_files(bundle):
    old = bundled(build(bundle))[0].folder
    build(bundle, batch_sizes=[8])
    assert plans(bundle) == [("unet", "fp16", 16, "8.0 8.6 8.9 12.0")]
    assert not old.exists()


def test_a_plan_stays_beside_one_that_lacks_its_card(bundle):
    build(bundle, capabilities=["8.6"])
    build(bundle, capabilities=["8.9", "12.0"])
    assert [plan[3] for plan in plans(bundle)] == ["8.6", "8.9 12.0"]
    build(bundle, capabilities=["12.0", "8.6", "8.9", "8.6"])
    assert [plan[3] for plan in plans(bundle)] == ["8.6 8.9 12.0"]


def test_plans_in_fp16_and_fp32_stand_beside_each_other(bundle):
    build(bundle)
    build(bundle, dtype="fp32")
    assert [plan[1] for plan in plans(bundle)] == ["fp16", "fp32"]


def test_another_version_replaces_the_plan(bundle, monkeypatch):
    build(bundle)
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", "1.8.0.1")
    build(bundle)
    (artifact,) = bundled(read_bundle(bundle))
    assert artifact.recipe.fields["tensorrt_rtx"] == "1.8.0.1"


def test_overwrite_builds_again(bundle):
    build(bundle)
    build(bundle, overwrite=True)
    assert len(called("Builder.build_serialized_network")) == 2
    assert len(plans(bundle)) == 1
    bundled(read_bundle(bundle))[0].verify()


@pytest.mark.parametrize("name", [PLAN, "artifact.json"])
def test_a_damaged_plan_is_announced_and_built_again(bundle, name):
    lines: list[str] = []
    (artifact,) = bundled(build(bundle))
    (artifact.folder / name).write_bytes((artifact.folder / name).read_bytes()[:-1] + b" ")
    build(bundle, say=lines.append)
    assert "sha256 differs" in lines[0]
    assert lines[0].endswith("; the plan is built again")
    (again,) = bundled(read_bundle(bundle))
    again.verify()


def test_a_damaged_plan_that_is_not_asked_for_is_taken_out(bundle):
    lines: list[str] = []
    (other,) = bundled(build(bundle, capabilities=["12.1"]))
    build(bundle, capabilities=["8.6"])
    (other.folder / PLAN).write_bytes(b"short")
    build(bundle, capabilities=["8.6"], say=lines.append)
    assert len(lines) == 1
    assert lines[0].endswith("truncated or replaced; run `fastgen export BUNDLE --rtx` again; the plan is taken out")
    assert [plan[3] for plan in plans(bundle)] == ["8.6"]


def test_without_the_package_nothing_is_exported_and_the_command_is_named(fastgen_process, label_model, tmp_path):
    done = fastgen_process("export", label_model, "--rtx", "--out", tmp_path / "out", blocked=["tensorrt_rtx"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"engine trt-rtx needs tensorrt_rtx, not installed here: {engine_class('trt-rtx').install}" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_text_model_gets_its_encoder_at_one_size_and_an_exact_decoder(rtx_card, lowered_bundle, tmp_path):
    folder = shutil.copytree(lowered_bundle("text", "fp16"), tmp_path / "text")
    build(folder)
    assert [plan[:3] for plan in plans(folder)] == [
        ("text_encoder", "fp32", 16),
        ("unet", "fp16", 8),
        ("vae_decoder", "fp16", 4),
        ("vae_decoder", "fp32", 4),
    ]
    least = {a.recipe.fields["network"]: a.recipe.fields["least_rows"] for a in bundled(read_bundle(folder))}
    assert least == {"text_encoder": 16, "unet": 1, "vae_decoder": 1}


def test_certificates_of_other_engines_stay_valid_and_those_of_replaced_plans_do_not(bundle):
    held = build(bundle)
    for engine in ("ort", "trt-rtx"):
        write_json(bundle / "certificates" / f"{engine}.json", {"engine": engine, "bundle_sha256": held.sha256})
    now = build(bundle, batch_sizes=[8]).sha256
    assert read_json(bundle / "certificates" / "ort.json")["bundle_sha256"] == now
    assert read_json(bundle / "certificates" / "trt-rtx.json")["bundle_sha256"] == held.sha256


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("overwrite", [False, True])
def test_whenever_it_is_killed_the_bundle_is_whole_and_the_next_export_completes_it(
    bundle, monkeypatch, moment, overwrite
):
    """Moments: before each move of a file into the bundle, bundle.json among them."""
    build(bundle)
    replace, left = os.replace, [moment]

    def killed(source, target, **options):
        if Path(target).is_relative_to(bundle):
            left[0] -= 1
            if left[0] < 0:
                raise KilledError
        return replace(source, target, **options)

    sizes = [2, 4] if overwrite else [8]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KilledError):
            build(bundle, batch_sizes=sizes, overwrite=overwrite)
    for artifact in bundled(read_bundle(bundle)):
        artifact.verify()
    build(bundle, batch_sizes=sizes)
    (artifact,) = bundled(read_bundle(bundle))
    artifact.verify()
    listed = {name for name in read_bundle(bundle).files if name.startswith(COMPILED)}
    assert {name for name in contents(bundle) if name.startswith(COMPILED)} == listed


def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle):
    before = contents(bundle)
    BEHAVIOUR.update(build="fails", reason="FP32 GEMM is not\nsupported")
    with pytest.raises(
        FastgenError,
        match=r"unet, batch 8, fp16: cannot be built: TensorRT for RTX 1\.7\.1\.116: FP32 GEMM is not supp",
    ) as raised:
        build(bundle)
    assert "\n" not in str(raised.value)
    assert contents(bundle) == before
    assert [f.name for f in bundle.parent.iterdir() if "partial" in f.name] == []


def test_ctrl_c_stops_the_build_and_leaves_the_bundle_as_it_was(bundle, monkeypatch):
    before, steps = contents(bundle), press_ctrl_c_at_the_first_step(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        build(bundle)
    assert steps == [0]
    assert contents(bundle) == before


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("7.5", r"not for 7\.5 \(Turing\); on that card use `fastgen export --trt`"),
        ("9.0", r"not for 9\.0 \(Hopper\)"),
        ("10.0", r"not for 10\.0 \(Blackwell for data centres\)"),
        ("8.7", r"compiles for 8\.0, 8\.6, 8\.9, 12\.0, 12\.1, not for 8\.7"),
        ("86", r"found '86', expected compute capabilities such as 8\.6,8\.9"),
        ("8.6,", r"found '', expected"),
        ("sm_89", r"found 'sm_89'"),
    ],
)
def test_a_capability_that_it_does_not_compile_for_is_one_line(fastgen, bundle, asked, message):
    before = contents(bundle)
    code, _, err = fastgen("export", bundle, "--rtx", "--capabilities", asked)
    assert (code, err.count("\n")) == (2, 1)
    assert re.search(message, err)
    assert contents(bundle) == before


def test_options_that_need_rtx_say_so(fastgen, bundle):
    code, _, err = fastgen("export", bundle, "--capabilities", "8.6")
    assert (code, err.count("\n")) == (2, 1)
    assert "give --rtx too" in err


@pytest.mark.usefixtures("_graphs_once")
def test_export_of_a_model_builds_in_fp16_and_says_that_the_bundle_is_there_when_it_fails(
    rtx_card, export_few, label_model, tmp_path
):
    out = tmp_path / "out"
    BEHAVIOUR.update(build="fails", reason="no")
    with pytest.raises(FastgenError, match=r"out is complete, but has no new plans for RTX cards: unet, batch 4, fp16"):
        export_few(label_model, out, rtx=True, batch_sizes=[2], engines=["ort"])
    BEHAVIOUR.clear()
    certificates = export_few(label_model, out, rtx=True, batch_sizes=[2], engines=["ort"], capabilities=["8.6"])
    assert [c.engine for c in certificates] == ["ort"]
    assert plans(out) == [("unet", "fp16", 4, "8.6")]
    filed = json.loads((out / "certificates" / "ort-fp32-cpu.json").read_text())
    assert filed["bundle_sha256"] == read_bundle(out).sha256
