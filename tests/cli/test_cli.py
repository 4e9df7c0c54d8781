"""The command line: bad input is one line on stderr and exit code 2, help is complete, and bundles need no torch."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pytest
from PIL import Image

from fastgen.cli.commands import cli
from fastgen.files.installing import hint
from fastgen.models.bundle_record import sealed

HEAVY = ["torch", "diffusers", "transformers", "onnx", "onnxruntime", "openvino", "tokenizers", "safetensors"]
TRAINING = ["torch", "diffusers", "transformers", "onnx", "onnxscript", "accelerate", "scipy"]


def commands(group=cli, path=("fastgen",)):
    for name, command in group.commands.items():
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))


ALL = {" ".join(path): command for path, command in commands()}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def one_line(result, code=2):
    """The error of a finished command: its exit code, and nothing but one line."""
    found, out, err = result
    assert (found, out) == (code, ""), err
    assert err.startswith("fastgen: error: ")
    assert err.count("\n") == 1, err
    assert err.endswith("\n")
    return err.removeprefix("fastgen: error: ").strip()


@pytest.fixture
def refused(fastgen, tmp_path):
    """`fastgen generate ARGUMENTS --out OUT` is refused: its line, after checking that nothing was written."""

    def run(*arguments, code=2):
        before = sorted(tmp_path.rglob("*"))
        line = one_line(fastgen("generate", *arguments, "--out", tmp_path / "out"), code)
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_command_and_option_has_a_help_text(name):
    command = ALL[name]
    assert command.help
    assert command.get_short_help_str(200).endswith(".")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            text = (parameter.help or "").partition("[default")[0].strip()
            assert len(text) > 5, f"{name} {parameter.opts}"
            assert text.endswith("."), f"{name} {parameter.opts}"


@pytest.mark.parametrize("name", ["fastgen", *sorted(ALL)])
def test_help_works_everywhere(fastgen, name):
    code, out, err = fastgen(*name.split()[1:], "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: {name} ")


def test_help_imports_nothing_heavy():
    script = "import sys\nfrom fastgen.cli import main\nsys.argv = ['fastgen', '--help']\n"
    script += (
        f"try:\n    main()\nfinally:\n    print([m for m in {[*HEAVY, 'numpy', 'PIL', 'tqdm']} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_importing_fastgen_is_light_and_its_functions_are_not_shadowed_by_modules():
    script = "import sys, fastgen\nassert not {'numpy', 'torch', 'click'} & set(sys.modules)\n"
    script += "for name in ('load', 'score', 'train') * 2:\n    assert callable(getattr(fastgen, name)), name\n"
    script += "from export import export\nassert callable(export)\nimport export as e\nassert callable(e.export)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_package_s(fastgen):
    import fastgen as package

    assert fastgen("--version") == (0, f"fastgen, version {package.__version__}\n", "")


@pytest.mark.parametrize("kind", ["text", "labels"])
@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_a_bundle_generates_where_torch_diffusers_and_transformers_cannot_be_imported(
    request, fastgen_process, requests_files, tmp_path, kind, engine
):
    bundle = request.getfixturevalue("text_bundle" if kind == "text" else "label_bundle")
    arguments = ["generate", requests_files[kind], "--model", bundle, "--engine", engine, "--out", tmp_path / "out"]
    done = fastgen_process(*arguments, blocked=TRAINING)
    assert (done.returncode, done.stderr) == (0, "")
    count = len(json.loads(requests_files[kind].read_text()))
    assert f"{count} images, {count} generated" in done.stdout
    assert len(list((tmp_path / "out").glob("*.png"))) == count + 1


def test_the_command_gives_the_pixels_of_the_python_api(fastgen, label_bundle, requests_files, tmp_path):
    import fastgen as package

    out = tmp_path / "out"
    options = ["--engine", "ort", "--seed", 3, "--batch-size", 3, "--num-inference-steps", 10, "--guidance-scale", 2]
    assert fastgen("generate", requests_files["labels"], "--model", label_bundle, "--out", out, *options)[0] == 0
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    images = package.load(label_bundle, engine="ort").generate(
        labels=[line["labels"] for line in lines],
        seeds=[line["seed"] for line in lines],
        batch_size=3,
        num_inference_steps=10,
        guidance_scale=2.0,
    )
    for line, image in zip(lines, images, strict=True):
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(out / line["image_name"])))


def test_eager_generates_from_a_model_folder_and_limit_takes_the_first(fastgen, label_model, requests_files, tmp_path):
    out = tmp_path / "out"
    code, stdout, _ = fastgen("generate", requests_files["labels"], "--model", label_model, "--out", out, "--limit", 2)
    assert code == 0
    assert "2 images, 2 generated" in stdout
    assert sorted(f.name for f in out.glob("?.png")) == ["0.png", "1.png"]


def test_a_truncated_prompt_is_a_warning(fastgen, text_bundle, tmp_path):
    file = write(tmp_path / "r.json", [{"prompt": "a red dragon " * 60}])
    code, _, err = fastgen("generate", file, "--model", text_bundle, "--engine", "ort", "--out", tmp_path / "out")
    assert code == 0
    assert err.startswith("warning: a prompt of ")
    assert err.count("\n") == 1
    assert "truncated_from_tokens" in (tmp_path / "out" / "manifest.jsonl").read_text()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is empty, expected JSON"),
        ('{\n  "a": {"image_name": }\n}', "line 2, column 23: malformed JSON"),
        ('[["red cube"],]', "line 1, column"),
        ("[]", "holds no requests"),
        ("3", "expected {"),
        ("[3]", "entry [0]: found 3"),
        ('[{"labels": ["red cube"], "image_name": "../x.png"}]', "entry [0]: image_name: found '../x.png'"),
        ('[{"labels": ["red cube"], "image_name": "/tmp/x.png"}]', "relative path inside the folder"),
        ('[{"labels": ["red cube"], "image_name": "a\\u0000.png"}]', "NUL"),
        ('[{"labels": ["red cube"], "image_name": "x.jpg"}]', "images are PNG files; call it 'x.png'"),
        ('[{"labels": ["red cube"], "image_name": "a.png"}, {"labels": ["red cube"], "image_name": "A.png"}]', "taken"),
        ('[["red cub"]]', "unknown label 'red cub'; did you mean 'red cube'? (choices: gray cube"),
        ('[["red cube", "red cube"]]', "occurs twice"),
        ("[[]]", "expected a list of one or more"),
        ('[{"labels": ["red cube"], "seed": -1}]', "seed: found -1"),
        ('[{"labels": ["red cube"], "seed": "0"}]', "seed: found '0'"),
        ('[{"prompt": "a dragon"}]', "this model takes labels"),
        ('[{"prompt": 3}]', "entry [0]: prompt: found 3, expected text"),
        ('[{"prompt": "  "}]', "entry [0]: prompt: is empty"),
        ('[{"prompt": null}]', "request 0 holds nothing; this model takes labels"),
    ],
)
def test_bad_requests_are_one_line(refused, label_bundle, tmp_path, content, words):
    file = write(tmp_path / "requests.json", content)
    assert words in refused(file, "--model", label_bundle, "--engine", "ort")


def test_labels_for_a_text_model_are_refused(refused, text_bundle, requests_files):
    line = refused(requests_files["labels"], "--model", text_bundle, "--engine", "ort")
    assert "request 0 holds labels; this model takes a prompt" in line


def test_missing_requests_are_reported_before_the_model_is_loaded(refused, label_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert refused(tmp_path / "nope.json", "--model", label_model) == f"{tmp_path / 'nope.json'}: no such file"
    assert "is a folder, expected a JSON file" in refused(tmp_path, "--model", label_model)


def test_a_symlink_below_the_output_folder_is_refused(fastgen, label_bundle, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    file = write(tmp_path / "r.json", [{"labels": ["red cube"], "image_name": "sub/x.png"}])
    line = one_line(fastgen("generate", file, "--model", label_bundle, "--engine", "ort", "--out", tmp_path / "out"))
    assert "sub is a symlink, expected a folder; remove it" in line
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "0"], "--batch-size: found '0', expected a whole number from 1 to 65536"),
        (["--limit", "0"], "--limit: found '0'"),
        (["--num-inference-steps", "-5"], "--num-inference-steps: found '-5'"),
        (["--num-inference-steps", "many"], "--num-inference-steps: found 'many', expected a whole number"),
        (["--threads", "0"], "--threads: found '0'"),
        (["--guidance-scale", "nan"], "--guidance-scale: found 'nan', expected a number from 0"),
        (["--guidance-scale", "-1"], "--guidance-scale: found '-1'"),
        (["--guidance-interval", "4", "2"], "guidance_interval is 4 2, expected 0 <= LO < HI <= 5"),
        (["--scheduler", "dimm"], "unknown scheduler 'dimm'; did you mean 'ddim'? (choices: ddpm, ddim, pndm"),
        (["--scheduler", "ddim:50"], "scheduler is 'ddim:50', expected a name"),
        (["--engine", "tensor"], "unknown engine 'tensor' (choices: "),
        (["--engine", "eager"], "engine eager runs model folders"),
        (["--device", "cuda"], "this onnxruntime is built for the CPU alone"),
        (["--dtype", "fp64"], "unknown dtype 'fp64'; did you mean 'fp16'?"),
        (["--speed", "9"], "No such option"),
    ],
)
def test_bad_options_are_one_line(refused, label_bundle, requests_files, options, words):
    assert words in refused(requests_files["labels"], "--model", label_bundle, "--engine", "ort", *options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generat"], "No such command 'generat'"),
        (["import"], "Missing argument 'OLD'. (see `fastgen import --help`)"),
        (["generate"], "give REQUESTS.json, or --prompt TEXT or --labels NAMES; found none"),
        (["--nope"], "No such option"),
        (["data", "dragons", "out"], "No such command 'dragons'"),
        (["export", "nowhere"], "nowhere: not a model folder"),
        (["score", "nowhere"], "nothing to measure: give --evaluator"),
    ],
)
def test_usage_errors_are_one_line_that_names_the_help(fastgen, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in one_line(fastgen(*arguments))


def test_without_arguments_the_help_is_shown(fastgen):
    code, out, err = fastgen()
    assert (code, out) == (2, "")
    assert err.startswith("Usage: fastgen ")


def test_model_folders_and_engines_that_do_not_fit(refused, label_model, requests_files, tmp_path):
    requests = requests_files["labels"]
    assert "engine ort runs bundles; `fastgen export" in refused(requests, "--model", label_model, "--engine", "ort")
    assert "neither a bundle (bundle.json) nor a model folder" in refused(requests, "--model", tmp_path)
    assert "neither a bundle" in refused(requests, "--model", tmp_path / "nowhere")


def test_cuda_on_a_machine_without_it(refused, label_model, requests_files):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert "sees no CUDA GPU here" in refused(requests_files["labels"], "--model", label_model, "--device", "cuda")


def test_no_model_and_no_runs_says_how_to_train(fastgen, requests_files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgen.models.find.MODELS", tmp_path / "none")
    line = one_line(fastgen("generate", requests_files["labels"]))
    assert line.startswith(
        "no model given, and no runs/latest here: this build of fastgen comes without a model for labels"
    )
    assert line.endswith("give --model, or train one with `fastgen train PRESET --data DATA`")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: flip(b / "unet" / "model.onnx"), "unet/model.onnx: sha256 differs"),
        (lambda b: (b / "scheduler" / "tables.npz").write_bytes(b""), "tables.npz: 0 bytes, bundle.json says"),
        (lambda b: (b / "unet" / "model.onnx").unlink(), "unet/model.onnx: No such file"),
        (lambda b: edit(b, format_version=99), "format_version is 99, this fastgen reads 1"),
        (lambda b: edit(b, sampling=None), "bundle.json: sampling: found None, expected an object"),
        (lambda b: (b / "bundle.json").write_text("{"), "bundle.json: line 1, column 2: malformed JSON"),
    ],
)
def test_a_damaged_bundle_is_one_line_before_anything_is_written(
    fastgen, label_bundle, requests_files, tmp_path, damage, words
):
    bundle = shutil.copytree(label_bundle, tmp_path / "bundle")
    damage(bundle)
    arguments = ["generate", requests_files["labels"], "--model", bundle, "--engine", "ort", "--out", tmp_path / "out"]
    assert words in one_line(fastgen(*arguments))
    assert not (tmp_path / "out").exists()


def flip(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def edit(bundle, **changes):
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(sealed(manifest | changes)))


def test_a_missing_engine_package_is_named_with_the_command_that_installs_it(
    fastgen_process, label_bundle, requests_files, tmp_path
):
    arguments = ["generate", requests_files["labels"], "--model", label_bundle, "--out", tmp_path / "out"]
    done = fastgen_process(*arguments, "--engine", "openvino", blocked=["openvino"])
    line = one_line((done.returncode, done.stdout, done.stderr))
    assert (
        line == 'engine openvino needs openvino, not installed here: pip install "onnxruntime>=1.20" "openvino>=2025.0"'
    )


def test_without_diffusers_an_unknown_scheduler_gets_the_nearest_stored_solver(
    fastgen_process, label_bundle, requests_files, tmp_path
):
    arguments = ["generate", requests_files["labels"], "--model", label_bundle, "--out", tmp_path / "out"]
    done = fastgen_process(*arguments, "--engine", "ort", "--scheduler", "unipcs", blocked=TRAINING)
    line = one_line((done.returncode, done.stdout, done.stderr))
    assert "solver unipcs:5 is not stored" in line
    assert "nearest: unipc:5" in line
    assert not (tmp_path / "out").exists()


def test_commands_that_need_torch_say_so_in_one_line(fastgen_process, label_model, tmp_path):
    for arguments in (["export", label_model], ["train", "iclevr-64", "--data", tmp_path]):
        done = fastgen_process(*arguments, blocked=["torch"])
        line = one_line((done.returncode, done.stdout, done.stderr))
        assert line == f"this command needs torch, not installed here: {hint('export')}"


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_broken_images_fail_the_command_and_leave_no_file(
    fastgen_process, text_bundle, scaled_weights, requests_files, tmp_path, factor
):
    bundle = scaled_weights(text_bundle, tmp_path / "bundle", factor)
    out = tmp_path / "out"
    done = fastgen_process("generate", requests_files["text"], "--model", bundle, "--engine", "ort", "--out", out)
    assert done.returncode == 1
    assert "5 images, 5 generated" in done.stdout
    assert done.stderr.count("\n") == 1, done.stderr
    assert "5 images failed and have no file, such as 0_main.png: 3072 of 3072 values are not finite" in done.stderr
    assert sorted(f.name for f in out.iterdir()) == ["job.json", "manifest.jsonl"]
    assert all("error" in json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines())
