"""A packed model is the same model in fp16: it loads everywhere, and nothing is lost silently."""

from __future__ import annotations

import json
import math
import shutil
import tomllib

import pytest

from fastgen.errors import InputError
from fastgen.files.jsonfiles import write_json
from fastgen.models import evaluator
from fastgen.models.folder import load_model
from fastgen.models.packing import LOG_ROWS, pack, thin_log, without_empty
from fastgen.presets import load_preset, preset_names
from fastgen.training.run_folder import check_folder, open_job

torch = pytest.importorskip("torch")


def contents(folder):
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def assert_rounded(packed, source):
    """Every weight of `packed` is that of `source` rounded to fp16, in float32 (integers as they are)."""
    found, wanted = packed.state_dict(), source.state_dict()
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value.half().float() if value.is_floating_point() else value), name


def change(folder, file, edit):
    """Rewrite a file of weights with `edit(state)` done to it."""
    from safetensors.torch import load_file, save_file

    state = load_file(folder / file)
    edit(state)
    save_file(state, folder / file)


@pytest.fixture(scope="module")
def packed(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    return {kind: pack(request.getfixturevalue(f"{kind}_model"), folder / kind).folder for kind in ("text", "label")}


@pytest.mark.parametrize("kind", ["text", "label"])
def test_a_packed_model_loads_as_float32_networks_with_the_fp16_values(request, packed, kind):
    model, source = load_model(packed[kind]), load_model(request.getfixturevalue(f"{kind}_model"))
    networks = source.networks()
    for name, network in model.networks().items():
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert_rounded(network, networks[name])
    assert (model.sampling, model.scheduler_config, model.condition, model.space) == (
        source.sampling,
        source.scheduler_config,
        source.condition,
        source.space,
    )


def test_diffusers_and_transformers_read_a_packed_model(packed, text_model):
    from diffusers import AutoencoderKL, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(packed["text"], torch_dtype=torch.float32)
    source = load_model(text_model)
    assert_rounded(pipeline.text_encoder, source.text_encoders[0])
    for name in ("unet", "vae"):
        assert_rounded(getattr(pipeline, name), getattr(source, name))
    vae = AutoencoderKL.from_pretrained(packed["text"], subfolder="vae", torch_dtype=torch.float32)
    assert_rounded(vae, source.vae)


def test_weights_keep_their_names_and_take_half_the_room(packed, text_model):
    from safetensors.torch import load_file

    for file in text_model.rglob("*.safetensors"):
        there, here = load_file(file), load_file(packed["text"] / file.relative_to(text_model))
        assert there.keys() == here.keys()
        assert {value.dtype for value in here.values()} == {torch.float16}
    assert any(key.startswith("text_model.") for key in load_file(packed["text"] / "text_encoder/model.safetensors"))


def test_the_same_model_gives_the_same_bytes(packed, text_model, tmp_path):
    assert contents(pack(text_model, tmp_path / "again").folder) == contents(packed["text"])
    assert contents(pack(packed["text"], tmp_path / "twice").folder) == contents(packed["text"])


def test_an_evaluator_is_packed_and_loads_as_float32(tmp_path):
    module = evaluator.ResNet18(3)
    evaluator.save(module, tmp_path / "e", {"a": 0, "b": 1, "c": 2}, {"preset": "evaluator"})
    found = pack(tmp_path / "e", tmp_path / "p")
    loaded = evaluator.load(tmp_path / "p")
    assert_rounded(loaded.module, module)
    assert [network.name for network in found.networks] == ["evaluator"]


def test_the_record_of_training_comes_along_and_its_leftovers_do_not(label_model, tmp_path):
    run = shutil.copytree(label_model, tmp_path / "run")
    for name in ("checkpoints/unet/step-000010", "previews", "bundle", "tensorboard"):
        (run / name).mkdir(parents=True)
        (run / name / "x.json").write_text("{}")
    (run / "events.out.tfevents").write_text("x")
    write_json(run / "training.json", {"finished": True, "preset": {"name": "mine"}})
    write_json(run / "score.json", {"label_accuracy": 0.5})
    (run / "README.md").write_text("# A card\n")
    (run / "log.jsonl").write_text('{"stage": "unet", "step": 1, "loss": 0.5}\n')
    out = pack(run, tmp_path / "out").folder
    expected = {f.relative_to(label_model).as_posix() for f in label_model.rglob("*") if f.is_file()}
    extra = {"training.json", "preset.toml", "score.json", "README.md", "log.jsonl"}
    assert set(contents(out)) == expected | extra
    for name in extra - {"preset.toml"}:
        assert (out / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.parametrize("name", preset_names())
def test_the_recorded_preset_is_written_out_and_trains_the_same(label_model, tmp_path, name):
    run = shutil.copytree(label_model, tmp_path / "run")
    with open_job(tmp_path / "begun", load_preset(name), "data"):
        pass
    record = json.loads((tmp_path / "begun" / "training.json").read_text())
    write_json(run / "training.json", record | {"finished": True})
    out = pack(run, tmp_path / "out").folder
    assert tomllib.loads((out / "preset.toml").read_text())["name"] == name
    assert not check_folder(
        tmp_path / "begun", load_preset(out / "preset.toml"), "data"
    )  # refuses another job's preset


def test_what_toml_cannot_say_is_left_out():
    assert without_empty({"a": None, "b": {}, "c": {"d": None, "e": [{"f": None, "g": 1}]}}) == {"c": {"e": [{"g": 1}]}}


def test_a_log_keeps_every_validation_and_so_many_rows_of_each_stage():
    rows = [{"stage": s, "step": i, "loss": 1.0} for s in ("vae", "unet") for i in range(1, 5001)]
    rows += [{"stage": "unet", "step": 5001 + i, "validation_loss": 2.0} for i in range(300)]
    rows[17]["validation_loss"] = 3.0
    kept = thin_log(rows)
    assert [row for row in rows if "validation_loss" in row] == [row for row in kept if "validation_loss" in row]
    assert LOG_ROWS <= sum(row["stage"] == "vae" for row in kept) <= LOG_ROWS + 1
    assert 300 + 0.9 * LOG_ROWS <= sum(row["stage"] == "unet" for row in kept) <= 300 + LOG_ROWS
    assert [rows.index(row) for row in kept] == sorted(rows.index(row) for row in kept)
    assert kept[0] == rows[0]
    assert rows[4999] in kept
    few = rows[: LOG_ROWS - 10]
    assert thin_log(few) == few


@pytest.mark.parametrize(
    ("value", "words"),
    [(7e4, "70000 overflows fp16 (at most 65504)"), (math.nan, "NaN or infinity"), (-math.inf, "NaN or infinity")],
)
def test_weights_that_fp16_cannot_hold_are_refused_by_name_and_nothing_is_written(label_model, tmp_path, value, words):
    run = shutil.copytree(label_model, tmp_path / "run")
    file = "unet/diffusion_pytorch_model.safetensors"
    change(run, file, lambda state: state["conv_in.bias"].fill_(value))
    with pytest.raises(InputError) as refused:
        pack(run, tmp_path / "deep" / "out")
    assert f"{file}: conv_in.bias: " in str(refused.value)
    assert words in str(refused.value)
    assert not any((tmp_path / "deep").iterdir())


def test_fp32_keeps_the_weights_as_they_are(label_model, tmp_path):
    run = shutil.copytree(label_model, tmp_path / "run")
    change(run, "conditioner/model.safetensors", lambda state: state["embed.bias"].fill_(7e4))
    found = pack(run, tmp_path / "out", "fp32")
    assert {network.error for network in found.networks} == {0.0}
    assert float(load_model(tmp_path / "out").conditioner.embed.bias.detach().max()) == 7e4


def test_the_largest_rounding_error_is_named(label_model, tmp_path):
    run = shutil.copytree(label_model, tmp_path / "run")
    change(run, "unet/diffusion_pytorch_model.safetensors", lambda state: state["conv_in.bias"].fill_(2049.0))
    found = pack(run, tmp_path / "out")
    (unet,) = [network for network in found.networks if network.name == "unet"]
    assert (unet.error, unet.worst) == (1.0, "conv_in.bias")  # between 2048 and 4096 fp16 holds even numbers alone
    assert found.bytes == sum(map(len, contents(tmp_path / "out").values()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "model_index.json").unlink(), "neither a finished model folder (model_index.json)"),
        (lambda f: (f / "model_index.json").write_text("[]"), "model_index.json: found [], expected an object"),
        (lambda f: (f / "model_index.json").write_text('{"../x": ["a", "b"]}'), "no leading or double /"),
        (lambda f: write_json(f / "training.json", {"finished": False}), "its training is not finished"),
        (lambda f: (f / "unet" / "old.bin").write_bytes(b"x"), "old.bin: is a pickle"),
        (lambda f: [x.unlink() for x in f.rglob("*.safetensors")], "holds no weights"),
    ],
)
def test_what_is_no_finished_model_is_refused_in_one_line(fastgen, label_model, tmp_path, damage, words):
    run = shutil.copytree(label_model, tmp_path / "run")
    damage(run)
    code, out, err = fastgen("pack", run, tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_the_command_tells_sizes_and_errors_and_overwrites_nothing(fastgen, label_model, tmp_path):
    code, out, err = fastgen("pack", label_model, tmp_path / "out")
    assert (code, err) == (0, "")
    *networks, total = out.splitlines()
    assert [line.split()[0] for line in networks] == ["unet", "conditioner"]
    assert all("largest rounding error" in line for line in networks)
    assert total.startswith(f"{tmp_path / 'out'}: ")
    assert "exists already" in fastgen("pack", label_model, tmp_path / "out")[2]
    assert "unknown dtype 'fp8'" in fastgen("pack", label_model, tmp_path / "other", "--dtype", "fp8")[2]
