"""The examples of docs/serving.md run as they are written there, against `fastgen serve` over small models without torch."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from documents import FENCE, REPO, steps
from PIL import Image

for package in ("starlette", "uvicorn", "prometheus_client", "onnxruntime"):
    pytest.importorskip(package)

PAGE = "docs/serving.md"
ADDRESS = "http://127.0.0.1:8000"  # in the examples
BLOCKS = FENCE.findall((REPO / PAGE).read_text(encoding="utf-8"))


def blocks(language: str) -> list[str]:
    found = [text for name, text in BLOCKS if name == language]
    assert found, f"{PAGE} has no {language} block"
    return found


@pytest.fixture(scope="module")
def address(command, text_bundle, label_bundle, tmp_path_factory) -> Iterator[str]:
    """Of a server of the two models that come with fastgen, or rather small ones under their names."""
    models = f"monsters-64={text_bundle}", f"iclevr-64={label_bundle}"
    line, environment = command("serve", *models, "--engine", "ort", "--port", 0, blocked=["torch", "diffusers"])
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as file:
        server = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=file, text=True)
    try:
        assert server.stdout is not None
        told = server.stdout.readline()
        assert "monsters-64, iclevr-64 at http://127.0.0.1:" in told, log.read_text()
        yield told.split()[-1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, log.read_text()
    finally:
        server.kill()
        server.wait(10)


@pytest.fixture
def run(address, tmp_path) -> Callable[..., str]:
    """Run an example in a folder of its own -> what it prints."""
    (tmp_path / ".curlrc").write_text('fail-with-body\nshow-error\nno-progress-meter\nnoproxy = "*"\n')

    def run_example(program: list[str], text: str) -> str:
        environment = {**os.environ, "CURL_HOME": str(tmp_path), "NO_PROXY": "*"}
        assert ADDRESS in text
        words = [*program, text.replace(ADDRESS, address)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return run_example


def keys_of(value: Any) -> Any:
    """The shape of a JSON value: the names of its objects, of the first one in a list."""
    if isinstance(value, dict):
        return {name: keys_of(item) for name, item in value.items()}
    return [keys_of(value[0])] if isinstance(value, list) and value else None


def lacking(shown: Any, real: Any) -> list[str]:
    """Names that the page shows and an answer has not, at any depth."""
    if isinstance(shown, dict) and isinstance(real, dict):
        missing = [name for name in shown if name not in real]
        return missing + [name for key in shown.keys() & real.keys() for name in lacking(shown[key], real[key])]
    return lacking(shown[0], real[0]) if isinstance(shown, list) and isinstance(real, list) else []


def streamed(kinds: list[str], most: int) -> bool:
    """Whether these are the events of one image with up to so many pictures on the way: a small model overtakes some."""
    before, last = kinds[:-1], kinds[-1]
    partial = all(kind == "image_generation.partial_image" for kind in before)
    return partial and len(before) <= most and last == "image_generation.completed"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_examples_run_and_the_answers_look_as_shown(run, tmp_path):
    first, others, job = (run(["bash", "-euo", "pipefail", "-c"], text) for text in blocks("sh"))
    answer, error, shown_job = (json.loads(text) for text in blocks("json"))
    assert lacking(answer, json.loads(first)) == []
    url = re.findall(r'"url":"(http://127\.0\.0\.1:\d+/v1/images/jobs/\w+/images/0\.png)"', others)
    assert len(url) == 1
    assert httpx.get(url[0], trust_env=False).headers["content-type"] == "image/png"
    told = re.findall(r"event: (.*)$", others, re.MULTILINE)  # the answer before them ends without a new line
    assert streamed(told, 2)
    told = re.findall(r"^event: (.*)$", job, re.MULTILINE)
    assert (set(told) - {"preview"}, told[-1], told.count("image")) == ({"job", "image", "done"}, "done", 2)
    real = json.loads((tmp_path / "job.json").read_text())
    assert lacking(shown_job, real) == []
    assert keys_of(shown_job).keys() == keys_of(real).keys()
    assert Image.open(tmp_path / "cube.png").size == (16, 16)
    refused = httpx.post(re.sub(r"/v1/.*", "/v1/images/generations", url[0]), json={"n": 11}, trust_env=False)
    assert refused.json() == error


def test_the_python_examples_run_and_a_picture_has_the_bytes_of_generate(
    address, text_bundle, fastgen, tmp_path, monkeypatch, capfd
):
    pytest.importorskip("openai")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    names: dict[str, Any] = {}
    capfd.readouterr()
    for text in blocks("python"):
        exec(compile(text.replace(ADDRESS, address), PAGE, "exec"), names)
    assert capfd.readouterr().out.startswith("guidance_scal ")
    names["client"].close()
    pictures = {file.name for file in tmp_path.glob("*.png")}
    scenes = {f"scene-{seed}.png" for seed in (100, 101, 102)}
    assert pictures - {f"robot-{i}.png" for i in range(3)} == {"dragon.png", "robot.png", *scenes}
    for name in pictures:
        Image.open(name).load()

    (words,) = [step.words for step in steps(PAGE) if step.words[:2] == ["fastgen", "generate"]]
    words = [{"B": str(text_bundle), "openvino": "ort"}.get(word, word) for word in words]
    code, _, told = fastgen(*words[1:])
    assert code == 0, told
    file = re.findall(r"writes `(generated/[\w-]+\.png)`", (REPO / PAGE).read_text(encoding="utf-8"))[0]
    assert Path(file).read_bytes() == Path("dragon.png").read_bytes()


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
def test_the_javascript_examples_run_in_node(run, address):
    urls, events = (run(["node", "--input-type=module", "--eval"], text) for text in blocks("js"))
    found = re.findall(rf"^(\d+) ({address}/v1/images/jobs/\w+/images/\d\.png)$", urls, re.MULTILINE)
    assert len(found) == 2
    assert int(found[1][0]) == int(found[0][0]) + 1
    kinds = [line.split()[0] for line in events.splitlines()]
    assert streamed(kinds, 3)


def test_every_block_of_the_page_is_run_or_looked_at():
    assert {name for name, _ in BLOCKS} == {"bash", "sh", "python", "js", "json", "text"}
    for text in blocks("sh"):  # what test_documents.py would refuse
        lines = text.replace("\\\n", " ").splitlines()
        programs = {shlex.split(line, comments=True)[0] for line in lines if shlex.split(line, comments=True)}
        assert {word for word in programs if "=" not in word} <= {"curl"}
