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

KILLS = 10
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


@pytest.fixture(scope="module")
def few_tables(tmp_path_factory) -> Iterator[ForkServer]:
    """A fork server whose exports hold the tables of two numbers of steps: compiling all of them takes minutes."""
    folder = tmp_path_factory.mktemp("few_tables")
    script = folder / "server.py"
    lines = ("import fastgen.sampling.compile", "fastgen.sampling.compile.COMMON_STEPS = (2, 3)")
    script.write_text("\n".join([*lines, "import fork_server", "fork_server.main()"]))
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
def test_after_ten_kills_the_same_command_gives_the_same_bytes(name, made, few_tables, tmp_path):
    words, target, changing = COMMANDS[name]
    environment = {"FASTGEN_CACHE": str(tmp_path / "cache")}

    def run(folder: Path, seconds: float) -> int | None:
        outcome = few_tables.run(words, folder, environment, seconds)
        assert outcome.code in (0, None), outcome
        return outcome.code

    def workspace(label: str) -> Path:
        folder = tmp_path / label
        folder.mkdir()
        for path in made.iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    whole = workspace("undisturbed")
    first = few_tables.run(words, whole, environment, 300)
    assert first.code == 0, first
    expected = contents(whole / target, changing)
    assert len(expected) >= 4
    draw = random.Random(name)
    killed = 0
    for number in range(KILLS):
        folder = workspace(f"kill-{number}")
        kept = foreign(folder)
        killed += run(folder, draw.uniform(0.05, 0.95) * first.seconds) is None
        complete = name == "pack" and (folder / target).exists()  # `pack` takes a new folder only
        assert complete or run(folder, 300) == 0
        assert contents(folder / target, changing) == expected
        assert {path: path.read_text() for path in kept} == kept
        assert complete or not [path for path in folder.rglob("*") if is_temporary(path.name)]
        shutil.rmtree(folder)
    assert killed >= KILLS // 2
