"""Ten kills of each command that writes much, at random moments: the same command is then run to its end, and what it wrote is
byte for byte what an undisturbed run writes."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacks import ForkServer
from scoring_helpers import make_evaluator, make_images

from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.files.temporary import is_temporary

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

KILLS, TRACED = 10, 2  # kills of a command; of an export that traces its networks, instead of copying the graphs
MODEL = ["--model", "model", "--engine", "eager"]
TRAIN = [
    *("image_size=16", "unet.config.sample_size=16", "unet.config.block_out_channels=[8, 8, 8]"),
    *("unet.config.norm_num_groups=4", "unet.config.layers_per_block=1", "conditioner.dim=32"),
    *("unet.train.steps=12", "unet.train.batch_size=4", "unet.train.checkpoint_every=2", "unet.train.precision=fp32"),
    *("unet.train.validation_fraction=0.25", "unet.train.warmup_steps=1", "sampling.num_inference_steps=2"),
]
SETS = [word for text in TRAIN for word in ("--set", text)]
# Command -> (its words after `fastgen`, what it writes, names of files that hold times or measured figures).
COMMANDS = {
    "generate": (["generate", "requests.json", *MODEL, "--batch-size", "1", "--out", "out"], "out", r"job\.json"),
    "train": (
        ["train", "iclevr-small", "--data", "labels", "--out", "out", "--device", "cpu", *SETS],
        "out",
        r"log\.jsonl|.*\.png|tracking/.*|fastgen\.json",
    ),
    "export": (["export", "model", "--out", "out", "--engine", "ort"], "out", r"certificates/.*"),
    "index": (["index", "data", "--model", "text", "--engine", "eager", "--out", "out"], "out", ""),
    "sweep": (
        [
            *("sweep", "requests.json", *MODEL, "--out", "out", "--evaluator", "judge"),
            *("--scheduler", "ddim", "--num-inference-steps", "1,2,3", "--batch-size", "2"),
        ],
        "out",
        r".*job\.json|sweep\.(csv|json)|plot\.png",
    ),
    "pack": (["pack", "model", "out"], "out", ""),
}


@pytest.fixture(scope="module")
def made(label_model, text_model, tmp_path_factory) -> Path:
    """A folder with everything that the commands read."""
    folder = tmp_path_factory.mktemp("kills")
    shutil.copytree(label_model, folder / "model")
    shutil.copytree(text_model, folder / "text")
    make_evaluator(folder / "judge")
    names = list(ICLEVR_OBJECTS)[:4]
    (folder / "requests.json").write_text(json.dumps([names[: 1 + i % 3] for i in range(6)]))
    make_images(folder / "labels" / "iclevr", size=(16, 16), count=8)
    train = {f"{i}.png": [names[i % 4]] for i in range(8)}
    (folder / "labels" / "train.json").write_text(json.dumps(train))
    (folder / "labels" / "objects.json").write_text(json.dumps(ICLEVR_OBJECTS))
    make_images(folder / "data" / "train", size=(32, 32), count=8)
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"a dragon of {i} heads"}) for i in range(8)]
    (folder / "data" / "train" / "metadata.jsonl").write_text("\n".join(rows))
    return folder


SERVER = """
import os
from pathlib import Path

import export.onnx
import fastgen.sampling.compile
import fork_server
from traces import copying

fastgen.sampling.compile.COMMON_STEPS = (2, 3)
trace = export.onnx.export_onnx


def kept(name, fill):
    folder = Path(os.environ["GRAPHS"], name)
    if not folder.exists():
        fill(folder)
    return folder


copied = copying(trace, kept)
export.onnx.export_onnx = lambda *arguments: (copied if "GRAPHS" in os.environ else trace)(*arguments)
fork_server.main()
"""


@pytest.fixture(scope="module")
def fast_exports(tmp_path_factory) -> Iterator[ForkServer]:
    """A fork server whose exports hold the tables of two numbers of steps, and, with a folder GRAPHS in the environment, trace
    a network once and copy its graph from then on: all tables and a trace in every export take minutes."""
    folder = tmp_path_factory.mktemp("fast_exports")
    script = folder / "server.py"
    script.write_text(SERVER)
    server = ForkServer(folder, script)
    yield server
    server.close()


def contents(folder: Path, changing: str) -> dict[str, str]:
    """Relative path -> SHA-256 of the files whose names do not match `changing`."""
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items()
        if not re.fullmatch(rf"(.*/)?({changing})" if changing else "(?!)", name)
    }


def foreign(folder: Path) -> dict[Path, str]:
    """Files of the user's, under names that look like leftovers, beside the output."""
    files = [folder / name for name in ("notes.txt", ".tmp-0123456789abcdef", ".out.partial", "out.tmp")]
    for path in files:
        path.write_text(path.name)
    return {path: path.name for path in files}


@pytest.mark.parametrize("name", COMMANDS)
def test_after_ten_kills_the_same_command_gives_the_same_bytes(name, made, fast_exports, tmp_path):
    words, target, changing = COMMANDS[name]
    plain = {"FASTGEN_CACHE": str(tmp_path / "cache")}
    copying = plain | {"GRAPHS": str(tmp_path / "graphs")} if name == "export" else plain

    def workspace(label: str) -> Path:
        folder = tmp_path / label
        folder.mkdir()
        for path in made.iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    def undisturbed(label: str, environment: dict[str, str]) -> tuple[dict[str, str], float]:
        """What the command writes, and the seconds that it takes."""
        whole = workspace(label)
        outcome = fast_exports.run(words, whole, environment, 300)
        assert outcome.code == 0, outcome
        return contents(whole / target, changing), outcome.seconds

    expected, seconds = undisturbed("undisturbed", plain)
    assert len(expected) >= 4
    draw = random.Random(name)
    killed = runs = 0
    while killed < KILLS:
        environment = plain if killed < TRACED else copying
        if killed == TRACED and copying is not plain and not (tmp_path / "traced").exists():
            assert undisturbed("traced", copying)[0] == expected
            again, seconds = undisturbed("copied", copying)
            assert again == expected
        runs += 1
        assert runs <= 10 * KILLS, f"{killed} of {runs} runs were killed: they end within {seconds} s"
        folder = workspace(f"run-{runs}")
        kept = foreign(folder)
        outcome = fast_exports.run(words, folder, environment, draw.uniform(0.05, 0.95) * seconds)
        assert outcome.code in (0, None), outcome
        if outcome.code == 0:
            seconds = min(seconds, outcome.seconds)  # the first run was a slow one: the next is killed earlier
        else:
            killed += 1
        if not (complete := name == "pack" and (folder / target).exists()):  # `pack` takes a new folder only
            outcome = fast_exports.run(words, folder, environment, 300)
            assert outcome.code == 0, outcome
        assert contents(folder / target, changing) == expected
        assert {path: path.read_text() for path in kept} == kept
        assert complete or not [path for path in folder.rglob("*") if is_temporary(path.name)]
        shutil.rmtree(folder)
