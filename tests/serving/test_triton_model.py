"""The model for Triton's Python backend: driven as Triton drives it, with a double of the module that Triton gives it."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import triton_double as double
from served import expected_files
from serving_client import wait_for

from export.triton import write_repository
from fastgen.models.bundle import read_bundle
from fastgen.serving.messages import ImageTask

pytest.importorskip("onnxruntime")
text_format = pytest.importorskip("google.protobuf.text_format")
json_format = pytest.importorskip("google.protobuf.json_format")
ModelConfig = pytest.importorskip("tritonclient.grpc.model_config_pb2").ModelConfig
INVALID, UNAVAILABLE = double.TritonError.INVALID_ARG, double.TritonError.UNAVAILABLE
LONG = {"num_inference_steps": 900, "scheduler": "ddim", "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def backend():
    """Triton's module, as far as the double goes; what imports it is forgotten at the end."""
    names = ("triton_python_backend_utils", "fastgen.serving.triton_model")
    sys.modules[names[0]] = double.make_module()
    yield
    for name in names:
        sys.modules.pop(name, None)


def config_of(folder):
    return text_format.Parse((folder / "config.pbtxt").read_text(), ModelConfig())


@pytest.fixture(scope="module")
def repository_of(tmp_path_factory):
    """Bundle -> the folder of the model that makes images, in a repository."""

    def write(bundle):
        repository = tmp_path_factory.mktemp("triton") / "repository"
        write_repository(read_bundle(bundle), repository, batch_sizes=(1,))
        return repository / "fastgen"

    return write


@pytest.fixture(scope="module")
def load_model(backend, label_bundle, repository_of):
    """Parameters -> the model of a repository's folder, initialised as Triton does it."""
    of_labels = repository_of(label_bundle)

    def load(kind="CPU", folder=of_labels, **parameters):
        spec = importlib.util.spec_from_file_location("model", folder / "1/model.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = config_of(folder)
        for name, value in {"engine": "ort", "threads": "1", **parameters}.items():
            config.parameters[name].string_value = value
        args = {"model_config": json_format.MessageToJson(config, preserving_proto_field_name=True)}
        args |= {"model_repository": str(folder), "model_version": "1", "model_name": "fastgen"}
        args |= {"model_instance_kind": kind, "model_instance_device_id": "0"}
        model = module.TritonPythonModel()
        model.initialize(args)
        return model

    return load


@pytest.fixture(scope="module")
def model(load_model):
    model = load_model()
    yield model
    model.finalize()
    assert not any(thread.is_alive() for thread in (model._worker, *model._threads))


def ask(model, **fields):
    """The sender of a request that has begun."""
    request = double.InferenceRequest(**fields)
    assert model.execute([request]) is None  # decoupled
    return request.sender


def ended(sender, seconds=60):
    assert sender.done.wait(seconds), "no final response"
    return sender.responses


def test_images_that_join_at_any_step_have_the_bytes_of_generate(model, label_bundle, tmp_path):
    rng, tasks, senders = random.Random(3), [], []
    names = ("gray cube", "red cube", "blue sphere")
    for _ in range(16):
        steps, scale = rng.choice([1, 2, 5, 10]), rng.choice([1.0, 1.5, 3.3])
        task = ImageTask(
            rng.randrange(2**63), labels=tuple(rng.sample(names, 2)), scheduler=rng.choice(["ddim", "dpmpp-2m", "ddpm"]),
            num_inference_steps=steps, guidance_scale=scale, guidance_interval=(0, 1) if rng.random() < 0.3 else None,
        )  # fmt: skip
        tasks.append(task)
        asked = {name: getattr(task, name) for name in ("seed", "scheduler", "num_inference_steps", "guidance_scale")}
        interval = {} if task.guidance_interval is None else {"guidance_interval": list(task.guidance_interval)}
        senders.append(ask(model, labels=list(task.labels), **asked, **interval))
        time.sleep(rng.random() * 0.02)
    files = expected_files(label_bundle, "ort", tasks, tmp_path, threads=1)
    for task, sender, file in zip(tasks, senders, files, strict=True):
        [response] = ended(sender)
        assert response.error is None
        assert response.tensors["image"].tolist() == [file]
        assert response.tensors["seed"].tolist() == [task.seed]
        about = json.loads(response.tensors["metadata"].item())
        assert (about["seed"], about["exact"], about["run_s"] >= 0) == (task.seed, True, True)


def test_the_client_that_the_page_shows_gets_its_picture(load_model, repository_of, text_bundle, tmp_path, monkeypatch):
    """Over Triton's protocol, with the real client package, in front of the model."""
    triton_server = pytest.importorskip("triton_server")
    folder = repository_of(text_bundle)
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text()
    [code] = [text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "tritonclient" in text]
    monkeypatch.chdir(tmp_path)
    model = load_model(folder=folder)
    try:
        with triton_server.serving(model, config_of(folder)) as port:
            exec(code.replace("8001", str(port)), {})
            wrong = code.replace("Path(", "raise AssertionError  # ").replace('b"a red dragon with wings"', 'b"\\xff"')
            with pytest.raises(Exception, match="prompt: is not UTF-8"):
                exec(wrong.replace("8001", str(port)), {})
    finally:
        model.finalize()
    task = ImageTask(7, prompt="a red dragon with wings")
    assert [(tmp_path / "dragon.png").read_bytes()] == expected_files(text_bundle, "ort", [task], tmp_path, threads=1)


def test_the_model_needs_no_web_server(load_model):
    code = "import sys, triton_double; sys.modules['triton_python_backend_utils'] = triton_double.make_module()\n"
    code += "import fastgen.serving.triton_model, fastgen.cli.certifying\n"
    code += "assert not {'starlette', 'uvicorn', 'prometheus_client', 'torch'} & sys.modules.keys()"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_n_images_are_n_responses_and_the_last_is_final(model):
    sender = ask(model, labels="red cube", seed=7, n=3, num_inference_steps=2)
    responses = ended(sender)
    assert sorted(response.tensors["seed"].item() for response in responses) == [7, 8, 9]
    assert len({response.tensors["image"].item() for response in responses}) == 3
    [webp] = ended(ask(model, labels="red cube", seed=7, num_inference_steps=2, output_format="webp"))
    assert webp.tensors["image"].item()[8:12] == b"WEBP"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels": "red cub"}, "red cube"),
        ({"seed": 1}, "labels: is missing"),
        ({"labels": b"\xff"}, "labels: is not UTF-8"),
        ({"labels": "red cube", "seed": [1, 2]}, "seed: found 2 values, expected one"),
        ({"labels": "red cube", "seed": -1}, "seed"),
        ({"labels": "red cube", "guidance_scale": float("nan")}, "guidance_scale: found nan"),
        ({"labels": "red cube", "scheduler": "dimm"}, "ddim"),
        ({"labels": "red cube", "guidance_interval": [3, 2], "num_inference_steps": 5}, "guidance_interval"),
    ],
)
def test_a_wrong_request_is_one_error_that_names_the_input(model, fields, words):
    [response] = ended(ask(model, **fields))
    assert response.error.code == INVALID
    assert words in response.error.message
    assert "\n" not in response.error.message


def test_a_client_that_leaves_frees_its_place_and_a_deadline_is_kept(model):
    sender = ask(model, labels="red cube", seed=1, **{**LONG, "num_inference_steps": 1000})
    wait_for(lambda: model._images, 10)
    sender.cancelled = True
    assert ended(sender) == []
    wait_for(lambda: not model._images, 10)
    [late] = ended(ask(model, labels="red cube", deadline_s=0.05, **LONG))
    assert (late.error.code, late.error.message) == (UNAVAILABLE, "the deadline has passed")


def test_more_images_than_it_holds_are_refused_and_those_that_are_left_at_the_end_get_an_error(load_model):
    model = load_model(max_images="3")
    first = ask(model, labels="red cube", seed=0, n=2, **{**LONG, "num_inference_steps": 1000})
    [busy] = ended(ask(model, labels="red cube", n=2))
    assert (busy.error.code, "busy" in busy.error.message) == (UNAVAILABLE, True)
    model.finalize()
    assert [response.error.code for response in ended(first)] == [UNAVAILABLE] * 2
    [late] = ended(ask(model, labels="red cube"))
    assert (late.error.code, "has ended" in late.error.message) == (UNAVAILABLE, True)


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"engin": "ort"}, "unknown parameter 'engin'; did you mean 'engine'?"),
        ({"threads": "all"}, "parameter threads: found 'all', expected a whole number"),
        ({"engine": "eager"}, "eager"),
        ({"kind": "GPU", "engine": "openvino"}, "cuda:0"),
    ],
)
def test_what_cannot_be_loaded_is_told_to_triton_on_one_line(load_model, parameters, words):
    if parameters.get("engine") == "openvino":
        pytest.importorskip("openvino")
    with pytest.raises(double.TritonModelException) as caught:
        load_model(**parameters)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_worker_that_breaks_is_told_to_all_requests(load_model, monkeypatch):
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    model = load_model(EXECUTION_ENV_PATH="/not/ours")
    sender = ask(model, labels="red cube", **LONG)
    monkeypatch.setattr("fastgen.serving.batch.Batcher.advance", lambda *a: 1 / 0)
    [response] = ended(sender)
    assert (response.error.code, "the log has the reason" in response.error.message) == (UNAVAILABLE, True)
    monkeypatch.undo()
    model.finalize()
