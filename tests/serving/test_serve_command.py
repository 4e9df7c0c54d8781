"""`fastgen serve`: what it refuses before it listens, and its life from the first line to the signal."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from serving_client import wait_for

from fastgen.cli.serve import named_models
from fastgen.errors import InputError
from fastgen.files.installing import hint
from fastgen.models.find import MODELS

PATH = "/v1/images/generations"


class Command:
    """`fastgen serve ...` on a free port."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        command = [sys.executable, "-m", "fastgen", "serve", "--port", "0", *map(str, arguments)]
        self.files = folder / "stdout", folder / "stderr"
        with open(self.files[0], "w") as out, open(self.files[1], "w") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, cwd=folder)

    @property
    def out(self) -> str:
        return self.files[0].read_text()

    @property
    def err(self) -> str:
        return self.files[1].read_text()

    def ready(self) -> httpx.Client:
        """A client, once the line with the address has come."""
        wait_for(lambda: "\n" in self.out or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.err
        return httpx.Client(base_url=self.out.split()[-1], timeout=60, trust_env=False)

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait(20)


def children(pid: int) -> list[int]:
    """Of all threads of a process."""
    lists = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(word) for text in lists for word in text.split()]


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text()


@pytest.fixture
def damaged(label_bundle, tmp_path):
    """A copy of the bundle, one byte of whose graph is another."""
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in (f for f in label_bundle.rglob("*") if f.is_file()):
        copy = folder / file.relative_to(label_bundle)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    graph = folder / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    return folder


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nope"], "neither a bundle"),
        (["evaluator-iclevr"], "neither a bundle"),
        (["{model}", "{model}"], "two are called"),
        (["a={model}", "a={bundle}"], "two are called a"),
        (["a b={model}"], "MODEL: found the name 'a b'"),
        (["../x={model}"], "MODEL: found the name '../x'"),
        (["{model}", "--engine", "trt"], "trt"),
        (["{bundle}", "--engine", "eager"], "engine eager runs model folders"),
        (["{damaged}", "--engine", "ort"], "unet/model.onnx"),
        (["{model}", "--rag", "{model}"], "is no index"),
        (["{model}", "{bundle}", "--rag", "x"], "--rag: an index belongs to one model"),
        (["{model}", "--host", "0.0.0.0"], "--host '0.0.0.0': other machines reach this address"),
        (["{model}", "--host", "::"], "--host '::': other machines"),
        (["{model}", "--host", "192.0.2.1", "--api-key", "a-secret-key"], "--host '192.0.2.1'"),
        (["{model}", "--api-key", "short"], "--api-key: found a key of 5 characters"),
        (["{model}", "--api-key-file", "{empty}"], "holds 0 keys"),
        (["{model}", "--api-key-file", "nowhere"], "no such file"),
        (["{model}", "--cors", "*"], "--cors: found '*'"),
        (["{model}", "--port", "{taken}"], "is in use"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_what_cannot_be_served_is_one_line_before_anything_listens(
    fastgen, label_model, label_bundle, damaged, tmp_path, monkeypatch, arguments, word
):
    listened = []
    monkeypatch.setattr(socket.socket, "listen", lambda self, *a: listened.append(self))
    (tmp_path / "empty").write_text("# no key\n\n")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        socket.SocketType.listen(other)
        places = {"model": label_model, "bundle": label_bundle, "damaged": damaged, "empty": tmp_path / "empty"}
        texts = [text.format(**places, taken=other.getsockname()[1]) for text in arguments]
        code, out, err = fastgen("serve", *texts, *(() if "--port" in texts else ("--port", "0")))
    assert (code, out) == (2, ""), err
    assert err.count("\n") == 1
    assert word in err
    assert listened == []
    assert "short" not in err.replace("shortest", "")


def test_missing_packages_are_named_with_the_command_that_installs_them(fastgen_process, tmp_path):
    done = fastgen_process("serve", blocked=["starlette", "uvicorn"])
    assert done.returncode == 2
    assert (
        done.stderr == f"fastgen: error: fastgen serve needs starlette, uvicorn, not installed here: {hint('serve')}\n"
    )


def test_names_are_the_folders_or_chosen_and_without_any_the_shipped_models_are_served(tmp_path, monkeypatch):
    assert named_models([]) == {name: MODELS / name for name in ("iclevr-64", "monsters-64")}
    assert named_models(["iclevr-64", "mine=runs/7/model"]) == {
        "iclevr-64": MODELS / "iclevr-64",
        "mine": Path("runs/7/model"),
    }
    folder = tmp_path / "a=b"
    folder.mkdir()
    with pytest.raises(InputError, match="found the name 'a=b'"):  # a folder of this name, not a folder b called a
        named_models([str(folder)])
    monkeypatch.chdir(tmp_path)
    assert list(named_models(["."])) == [tmp_path.name]


def test_it_serves_and_ends_with_zero_after_the_running_image(label_bundle, tmp_path):
    with Command(tmp_path, f"tiny={label_bundle}", "--engine", "ort") as command, command.ready() as client:
        assert command.out.startswith("fastgen serves tiny at http://127.0.0.1:")
        assert command.err.startswith("tiny: loading the model\n")
        assert client.get("/health/ready").json() == {"status": "ready", "models": {"tiny": "ready"}}
        body = {"labels": "red cube", "num_inference_steps": 300, "detached": True, "previews": 2}
        job = client.post(PATH, json=body).json()
        url = f"/v1/images/jobs/{job['id']}"
        wait_for(lambda: client.get(url).json()["images"][0]["row"] > 0, 60)
        command.process.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/health/ready").status_code == 503)
        refused = client.post(PATH, json={"labels": "red cube"})
        assert (refused.status_code, "retry-after" in refused.headers) == (503, True)
        events = client.get(f"{url}/events").text
        assert '"status":"done"' in events.split("event: done")[1]
        assert command.process.wait(20) == 0
        assert " POST " in command.err


@pytest.mark.slow
def test_a_picture_has_the_bytes_that_generate_writes(fastgen, label_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--model", label_bundle, "--engine", "ort", "--seed", 7, "--num-inference-steps", 6]
    assert fastgen("generate", "--labels", "red cube, blue sphere", *options)[0] == 0
    with Command(tmp_path, f"tiny={label_bundle}", "--engine", "ort") as command, command.ready() as client:
        body = {"prompt": "red cube, blue sphere", "seed": 6, "n": 3, "num_inference_steps": 6}
        images = client.post(PATH, json=body).json()["data"]
    (file,) = (tmp_path / "generated").glob("*.png")
    assert file.name == images[1]["fastgen"]["image_name"] == "red-cube-blue-sphere-7.png"
    assert base64.b64decode(images[1]["b64_json"]) == file.read_bytes()


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_with_its_workers(label_bundle, tmp_path):
    with Command(tmp_path, label_bundle, "--engine", "ort", "--no-log") as command, command.ready() as client:
        client.post(PATH, json={"labels": "red cube", "num_inference_steps": 1000, "n": 10, "detached": True})
        workers = children(command.process.pid)
        assert workers
        start = time.monotonic()
        command.process.send_signal(signal.SIGINT)
        wait_for(lambda: client.get("/health/ready").status_code == 503)
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(5) == 128 + signal.SIGTERM
        assert time.monotonic() - start < 5
        wait_for(lambda: not any(map(alive, workers)))
        assert " POST " not in command.err


@pytest.mark.slow
def test_it_waits_no_longer_than_it_was_told_to(label_bundle, tmp_path):
    arguments = [f"tiny={label_bundle}", "--engine", "ort", "--drain", "0.5"]
    with Command(tmp_path, *arguments) as command, command.ready() as client:
        body = {"labels": "red cube", "num_inference_steps": 1000, "n": 10, "detached": True}
        url = f"/v1/images/jobs/{client.post(PATH, json=body).json()['id']}"
        wait_for(lambda: client.get(url).json()["status"] == "running", 60)
        start = time.monotonic()
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(20) == 0
        assert time.monotonic() - start < 0.5 + 2 + 1.5  # a busy machine


@pytest.mark.slow
def test_a_signal_while_models_load_ends_it(label_bundle, tmp_path):
    with Command(tmp_path, label_bundle, "--engine", "ort") as command:
        wait_for(lambda: "loading the model" in command.err, 60)
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(20) == 0
        assert command.out == ""


def test_a_key_of_a_file_opens_it(label_bundle, tmp_path):
    (tmp_path / "keys").write_text("# mine\nfirst-key-0123\n\nsecond-key-4567\n")
    with (
        Command(tmp_path, f"tiny={label_bundle}", "--engine", "ort", "--api-key-file", "keys") as command,
        command.ready() as client,
    ):
        assert client.get("/v1/models").status_code == 401
        answer = client.get("/v1/models", headers={"authorization": "Bearer second-key-4567"})
        assert [model["id"] for model in answer.json()["data"]] == ["tiny"]
        assert json.dumps(str(label_bundle)) in answer.text
        address = command.out.split()[-1].removeprefix("http://").split(":")[0]
        assert address == "127.0.0.1"
