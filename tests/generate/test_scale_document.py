"""The Kubernetes Job, the Slurm script and the torchrun command of docs/scale.md make the folder that one process makes."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import yaml

from fastgen.cli import main

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
OPTIONS = ["--engine", "ort", "--batch-size", "1", "--threads", "1"]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def block(language: str, word: str) -> str:
    """The page's code block in this language that holds `word`."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (text,) = (text for text in blocks if word in text)
    return text


def start(words: Sequence[str], variables: dict[str, str], said: Path, kill_after: int | None) -> BaseProcess:
    """Run `fastgen WORDS` with these variables, in a fork of a process without threads, as a fork of this one might wait for
    locks that they hold. `kill_after`: it is killed when it has renamed so many images."""
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=command, args=(words, variables, said, kill_after))
    child.start()
    return child


def command(words: Sequence[str], variables: dict[str, str], said: Path, kill_after: int | None) -> None:
    """The process of `start`."""
    images = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event == "os.rename" and re.search(r"/\d+\.png$", str(arguments[1])):
            if images[0] == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
            images[0] += 1

    code = 1
    try:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), 1)
        os.dup2(1, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        sys.addaudithook(hook)
        os.environ |= variables
        sys.argv = ["fastgen", *words]
        main()
        code = 0
    except SystemExit as ending:
        code = int(ending.code or 0)
    finally:
        os._exit(code)


def code_of(child: BaseProcess) -> int | None:
    child.join()
    return child.exitcode


@pytest.fixture(scope="module")
def place(label_bundle, tmp_path_factory) -> Path:
    """A folder with the requests, the bundle, and what one process makes of them: the folder `one`."""
    folder = tmp_path_factory.mktemp("scale")
    (folder / "bundle").symlink_to(label_bundle)
    (folder / "test.json").write_text(json.dumps([["red cube", "blue sphere"][: 1 + i % 2] for i in range(19)]))
    words = ["generate", f"{folder}/test.json", "--model", f"{folder}/bundle", "--out", f"{folder}/one", *OPTIONS]
    assert code_of(start(words, {}, folder / "said", None)) == 0, (folder / "said").read_text()
    return folder


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "job.json"}


def check(words: Sequence[str], environments: Sequence[dict[str, str]], place: Path, name: str) -> None:
    """All shards run at the same time; the second is killed at its second image, and started again."""
    assert words[0] == "fastgen"
    options, said, out = [*words[1:], *OPTIONS], place / f"{name}-said", place / name
    options[options.index("--out") + 1] = str(out)
    children = [start(options, each, said, 1 if i == 1 else None) for i, each in enumerate(environments)]
    codes = [code_of(child) for child in children]
    assert codes == [0, -signal.SIGKILL, *[0] * (len(codes) - 2)], said.read_text()
    assert not (out / "manifest.jsonl").exists()
    assert code_of(start(options, environments[1], said, None)) == 0, said.read_text()
    assert files(out) == files(place / "one")
    assert sum(run["images"] for run in json.loads((out / "job.json").read_text())["runs"]) == 18  # one before the kill
    assert f"shard {len(codes)}/{len(codes)}, by " in said.read_text()


def at_place(words: Sequence[str], place: Path, root: str) -> list[str]:
    return [word.replace(root, str(place), 1) if word.startswith(root) else word for word in words]


def test_the_kubernetes_job(place):
    job = yaml.safe_load(block("yaml", "kind: Job"))
    spec, template = job["spec"], job["spec"]["template"]["spec"]
    (container,), (volume,) = template["containers"], template["volumes"]
    assert (job["apiVersion"], spec["completionMode"], template["restartPolicy"]) == ("batch/v1", "Indexed", "Never")
    assert 1 <= spec["parallelism"] <= spec["completions"]
    assert spec["backoffLimitPerIndex"] >= 1
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailIndex"
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2]}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 1}
    (mount,) = container["volumeMounts"]
    assert mount["name"] == volume["name"]
    assert set(volume) == {"name", "persistentVolumeClaim"}
    command = container["command"]
    assert all(isinstance(word, str) for word in command)
    assert command[command.index("--of") + 1] == str(spec["completions"])
    variables = [{"JOB_COMPLETION_INDEX": str(i)} for i in range(spec["completions"])]
    check(at_place(command, place, mount["mountPath"]), variables, place, "kubernetes")


def slurm_variables(script: str) -> Iterator[dict[str, str]]:
    """The variables of each task of the script's array."""
    ((first, last),) = re.findall(r"^#SBATCH --array=(\d+)-(\d+)$", script, re.M)
    count = int(last) - int(first) + 1
    values = {"COUNT": str(count), "MIN": first, "MAX": last, "STEP": "1"}
    for index in range(int(first), int(last) + 1):
        yield {f"SLURM_ARRAY_TASK_{name}": value for name, value in {**values, "ID": str(index)}.items()}


def test_the_slurm_script(place):
    script = block("sh", "#SBATCH")
    lines = script.splitlines()
    assert lines[0] == "#!/bin/bash"
    assert {"#SBATCH --gres=gpu:1", "#SBATCH --requeue"} <= set(lines)
    (line,) = (line for line in lines if not line.startswith("#"))
    program, *words = shlex.split(line)
    assert program == "srun"
    check(at_place(words, place, "/shared"), list(slurm_variables(script)), place, "slurm")


def test_the_torchrun_command(place):
    words = shlex.split(block("bash", "torchrun"))
    options, command = words[: words.index("-m")], words[words.index("-m") + 1 :]
    values = dict(zip(options[1::2], options[2::2], strict=True))
    nodes, per_node = int(values["--nnodes"]), int(values["--nproc-per-node"])
    variables = [
        {"RANK": str(i), "WORLD_SIZE": str(nodes * per_node), "LOCAL_RANK": str(i % per_node)}
        for i in range(nodes * per_node)
    ]
    given = {"test.json": f"{place}/test.json", "B": f"{place}/bundle"}
    check([given.get(word, word) for word in command], variables, place, "torchrun")
