"""Presets, --set and run folders that lie: every one is refused in one line before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from attacks import REMOVE, Attack, json_attacks, text_attacks
from filelock import FileLock

PRESET = """
image_size = 32
[unet.config]
sample_size = 32
block_out_channels = [8, 8]
norm_num_groups = 4
layers_per_block = 1
down_block_types = ["DownBlock2D", "DownBlock2D"]
up_block_types = ["UpBlock2D", "UpBlock2D"]
class_embed_type = "identity"
[unet.train]
steps = 2
batch_size = 2
precision = "fp32"
checkpoint_every = 1
validation_fraction = 0.25
[conditioner]
kind = "class_embed"
dim = 32
[scheduler]
_class_name = "DDPMScheduler"
num_train_timesteps = 100
[sampling]
scheduler = "ddpm"
num_inference_steps = 2
"""
TRAIN = ["train", "p.toml", "--data", "data", "--out", "out", "--tracker", "none"]
NUMBERS = {  # key -> values that it does not take
    "unet.train.steps": ["0", "-1", "1.5", "2000000000", "many", "true", "[1]", "nan", "1e400", "9" * 5000, "''"],
    "unet.train.epochs": ["nan", "inf", "-1", "1e9", "'3'"],
    "unet.train.batch_size": ["0", "-4", "2.0", "10000000", "inf", "1e3"],
    "unet.train.accumulation": ["0", "3", "nan", "-2"],
    "unet.train.learning_rate": ["nan", "inf", "-inf", "0", "-1e-4", "1e400", "1e9", "fast", "{}", "1979-05-27"],
    "unet.train.weight_decay": ["nan", "-0.1", "1e308"],
    "unet.train.max_grad_norm": ["0", "inf", "nan"],
    "unet.train.ema_decay": ["1", "1.5", "-0.1", "nan"],
    "unet.train.further_ema_decays": ["0.9", "[1]", "[nan]", str([0.5] * 17)],
    "unet.train.adam_betas": ["[0.9]", "[0.9, 1.0]", "[0.9, 0.9, 0.9]", "[nan, 0.9]", "0.9", "['a', 'b']"],
    "unet.train.condition_dropout": ["1.1", "-0.1", "nan"],
    "unet.train.validation_fraction": ["0", "1", "nan"],
    "unet.train.seed": ["-1", "9223372036854775808", "18446744073709551616", "0.5", "nan"],
    "unet.train.loss.mse": ["nan", "inf", "-1", "'a'", "true"],
    "unet.train.loss_from_epoch.mse": ["nan", "-1", "inf"],
    "unet.train.loss": ["1", "[1]", "{mse = nan}", "{mse = {a = 1}}", "{'' = 1.0}"],
    "unet.train.min_snr_gamma": ["nan", "-1"],
    "unet.train.timestep_shift": ["0", "inf"],
    "unet.train.compile": ["sometimes", "1", "nan"],
    "unet.train.flip": ["1", "'yes'", "nan"],
    "image_size": ["0", "7", "4097", "1e400", "32.0", "-32", "nan"],
    "sampling.num_inference_steps": ["0", "10001", "nan", "2.5"],
    "sampling.guidance_scale": ["-1", "nan", "inf", "1001"],
    "conditioner.dim": ["0", "-1", "1e9", "nan", "10000000"],
}
SET = [
    *[(key, value, key.rpartition(".")[2]) for key, values in NUMBERS.items() for value in values],
    ("unet.train.stepz", "3", "did you mean 'steps'?"),
    ("unet.trian.steps", "3", "did you mean 'unet.train'?"),
    ("unet.train.precision", "fp61", "did you mean 'fp16'?"),
    ("unet.train.optimizer", "adamm", "did you mean 'adam"),
    ("unet.train.lr_schedule", "cosin", "did you mean 'cosine'?"),
    ("unet.train.final", "best", "best-validation"),
    ("unet.train.precision", "fp16", "needs a GPU"),
    ("image_mode", "cropp", "did you mean 'crop'?"),
    ("conditioner.kind", "classembed", "did you mean 'class_embed'?"),
    ("conditioner.embed", "3", "conditioner.embed"),
    ("conditioner.width", "3", "unknown field 'width'"),
    ("unet", "3", "unet: found 3"),
    ("unet.train", "[]", "unet.train: found []"),
    ("unet.train", "'quick'", "unet.train: found 'quick'"),
    ("unet.config", "1", "unet.config: found 1"),
    ("unet.path", "''", "unet.path"),
    ("unet.path", '"a\\u0000b"', "NUL"),
    ("sampling", "nan", "sampling: found nan"),
    ("scheduler", "[[1]]", "scheduler: found"),
    ("name", "../../x", "name"),
    ("name", "''", "name"),
    ("name", "'" + "n" * 500 + "'", "name"),
    ("preview", "{prompts = ['a']}", "preview"),
    ("preview.labels", "3", "preview.labels"),
    ("", "3", "KEY=VALUE"),
    (".", "3", "KEY=VALUE"),
    ("unet..train", "3", "unknown table"),
    ("unet.train.steps.more", "3", "unknown table"),
    ("a." * 5000 + "b", "3", "unknown table"),
    ("k" * 5000, "3", "unknown field"),
    ("unet.train.steps", "3\nunet = 4", "one TOML value"),
    ("unet.train.steps", "[" * 3000 + "]" * 3000, "steps"),
    ("unet.config.sample_size", "1979-05-27T07:32:00Z", "datetime"),
    ("unet.config.sample_size", "'32'", "sample_size"),
    ("unet.config.sample_size", "16", "sample_size"),
    ("unet.config.block_out_channels", "[8]", "unet.config"),
    ("unet.config.block_out_channels", "[7, 7]", "unet.config"),
    ("unet.config.block_out_channels", "8", "unet.config"),
    ("unet.config.down_block_types", "['Down', 'Down']", "unet.config"),
    ("unet.config.no_such_option", "1", "no_such_option"),
    ("unet.config.in_channels", "5", "channels"),
    ("unet.config.layers_per_block", "100000", "layers_per_block"),
    ("unet.config.block_out_channels", "[1000000, 1000000]", "weights, expected at most"),
    ("unet.config.block_out_channels", "[99999999, 8]", "block_out_channels"),
    ("unet.config.norm_num_groups", "0", "unet.config"),
    ("unet.config.norm_eps", "1e300", "norm_eps"),
    ("scheduler._class_name", "NoScheduler", "NoScheduler"),
    ("scheduler.num_train_timesteps", "0", "num_train_timesteps"),
    ("scheduler.num_train_timesteps", "-5", "num_train_timesteps"),
    ("scheduler.num_train_timesteps", "100000000", "num_train_timesteps"),
    ("scheduler.beta_start", "nan", "scheduler.beta_start: found nan"),
    ("sampling.scheduler", "ddpn", "did you mean 'ddpm'?"),
    ("sampling.num_inference_steps", "101", "101"),
    ("conditioner.dim", "33", "conditioner.dim"),
    ("unet.train.loss.msee", "1", "did you mean 'mse'?"),
    ("unet.train.loss.mse", "0", "no term counts"),
    ("unet.train.loss.kl", "1", "unet.train.loss.kl"),
]
FILES = [
    ("p.toml", "", "image_size is missing"),
    ("p.toml", b"\xff\xfe\x00", "UTF-8"),
    ("p.toml", "image_size = \n", "line 1"),
    ("p.toml", "image_size = 32\nimage_size = 64\n", "not valid TOML"),
    ("p.toml", PRESET + "[unet.train]\nsteps = 3\n", "not valid TOML"),
    ("p.toml", PRESET.replace("32", "nan", 1), "image_size: found nan"),
    ("p.toml", PRESET + "[extra]\na = 1\n", "unknown field 'extra'"),
    ("p.toml", PRESET + "[text_encoder]\npath = 'clip'\n", "not both"),
    ("p.toml", PRESET + "[evaluator]\n", "evaluator: path, config"),
    ("p.toml", PRESET + "[vae]\npath = 'data'\n", "data: holds no weights"),
    ("p.toml", PRESET.replace("[scheduler]", "[schedulers]"), "did you mean 'scheduler'?"),
    ("p.toml", "a = " + "[" * 5000, "nested too deeply"),
    ("p.toml", "a = " + "[" * 50 + "]" * 50, "nested too deeply"),
    ("p.toml", "a = " + "9" * 10_000, "too many digits"),
    ("p.toml", "a\0 = 1", "not valid TOML"),
    ("p.toml", 'a = "\\u0000"', "NUL"),
    ("p.toml", "x" * (2**20 + 1), "at most 1 MiB"),
]


def set_attack(key: str, value: str, word: str) -> Attack:
    return Attack(f"set:{key[:40]}={value[:24]!r}", [*TRAIN, "--set", f"{key}={value}"], word)


ATTACKS = [
    *[set_attack(*row) for row in SET],
    *text_attacks("toml", TRAIN, FILES),
    Attack("toml:fifo", TRAIN, "is a pipe", lambda w: ((w / "p.toml").unlink(), os.mkfifo(w / "p.toml"))),
    Attack("toml:folder", TRAIN, "is a folder", lambda w: ((w / "p.toml").unlink(), (w / "p.toml").mkdir())),
    Attack("toml:missing", TRAIN, "no such file", lambda w: (w / "p.toml").unlink()),
    Attack("out:file", TRAIN, "out: is not a folder", lambda w: (w / "out").write_text("mine")),
    Attack("out:foreign", TRAIN, "is not empty", lambda w: ((w / "out").mkdir(), (w / "out" / "mine").touch())),
    Attack("out:below a file", [*TRAIN[:-4], "--out", "p.toml/out"], "p.toml: is not a folder"),
    Attack("out:dangling", TRAIN, "out: is not a folder", lambda w: (w / "out").symlink_to("nowhere")),
    Attack("tracker", [*TRAIN[:-1], "tensorbord"], "did you mean 'tensorboard'?"),
    Attack("device", [*TRAIN, "--device", "cuda:99"], "device cuda:99"),
    Attack("data", [*TRAIN[:2], "--data", "nowhere", "--out", "out"], "nowhere"),
    *[
        Attack(f"resume:{name}", [*TRAIN, "--resume", name], word)
        for name, word in [
            ("nowhere", "is no checkpoint to resume from"),
            ("checkpoints/unet/step-000500", "no such checkpoint"),
            ("runs/checkpoints/unet/best", "no such checkpoint"),
            ("data", "is no checkpoint to resume from"),
        ]
    ],
]


@pytest.fixture(scope="session")
def work(once) -> Path:
    """A dataset of eight scenes."""
    from fastgen.data.synthetic import write_iclevr

    return once("hostile-data", lambda folder: write_iclevr(folder, count=8, size=32, seed=0, workers=1))


@pytest.fixture(scope="session")
def preset_file(once) -> Path:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "p.toml").write_text(PRESET)

    return once("hostile-preset", write) / "p.toml"


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_a_preset_that_lies_is_refused(attack, refused, work, preset_file):
    refused(attack, **{"data": work, "p.toml": preset_file})


@pytest.mark.parametrize(
    "override", ["unet.train.epochs=0.5", "unet.train.learning_rate=1", "unet.train.seed=9223372036854775807"]
)
def test_a_preset_at_the_edge_of_what_is_allowed_trains(fork_server, tmp_path, work, preset_file, override):
    shutil.copytree(work, tmp_path / "data")
    shutil.copy(preset_file, tmp_path / "p.toml")
    outcome = fork_server.run([*TRAIN, "--set", override], tmp_path, {"FASTGEN_CACHE": str(tmp_path / "cache")}, 60)
    assert outcome.code == 0, outcome.stderr


@pytest.fixture(scope="session")
def begun(once, work, preset_file, fork_server) -> Path:
    """A run of one of its two steps: what a process leaves that is killed after its first checkpoint."""

    def train(folder: Path) -> None:
        workspace = folder.parent / "hostile-run-workspace"
        shutil.copytree(work, workspace / "data")
        shutil.copy(preset_file, workspace / "p.toml")
        outcome = fork_server.run(TRAIN, workspace, {"FASTGEN_CACHE": str(workspace / "cache")}, 60)
        assert outcome.code == 0, outcome.stderr
        run = workspace / "out"
        shutil.rmtree(run / "checkpoints" / "unet" / "step-000002")
        record = json.loads((run / "training.json").read_text())
        (run / "training.json").write_text(json.dumps(record | {"finished": False}))
        shutil.copytree(run, folder)

    return once("hostile-run", train)


RECORD, STATE, LOG = "out/training.json", "out/checkpoints/unet/step-000001/state.json", "out/log.jsonl"
RECORDS = [
    (RECORD, "", [], "training.json: found [], expected an object"),
    (RECORD, "finished", REMOVE, "finished is missing"),
    (RECORD, "finished", "no", "finished: found 'no'"),
    (RECORD, "finished", None, "finished: found None"),
    (RECORD, "more", 1, "unknown field 'more'"),
    (RECORD, "data", 3, "data: found 3"),
    (RECORD, "data", "0" * 64, "holds a job on other data"),
    (RECORD, "preset", [], "preset: found []"),
    (RECORD, "preset", REMOVE, "preset.name is missing"),
    (RECORD, "preset.image_size", 64, "image_size = 64 there and 32 here"),
    (RECORD, "preset.image_size", "32", "preset.image_size: found '32'"),
    (RECORD, "preset.unet.train.steps", -1, "preset.unet.train.steps: found -1"),
    (RECORD, "preset.unet.train.stepz", 1, "unknown field 'stepz'"),
    (RECORD, "preset.unet", None, "training.json"),
]
TEXTS = [
    (RECORD, "", "is empty, expected JSON"),
    (RECORD, '{"finished": false', "malformed JSON"),
    (RECORD, '{"finished": false, "finished": true}', "occurs twice"),
    (LOG, "[]\n", "line 1"),
    (LOG, "{\n", "line 1"),
    (LOG, '{"stage": "unet"}\n', "expected a row with stage and step"),
    (LOG, '{"stage": "unet", "step": "1"}\n', "expected a row with stage and step"),
    (LOG, '{"stage": 3, "step": 1}\n', "expected a row with stage and step"),
    (LOG, '{"stage": "unet", "step": 1, "loss": NaN}\n', "malformed"),
    (LOG, b'{"stage": "\xff", "step": 1}\n', "UTF-8"),
]


@pytest.mark.parametrize("attack", [*json_attacks("run", TRAIN, RECORDS), *text_attacks("run", TRAIN, TEXTS)], ids=str)
def test_a_run_folder_that_lies_is_refused(attack, refused, work, preset_file, begun):
    refused(attack, **{"data": work, "p.toml": preset_file, "out": begun})


BRANCH = [
    "train",
    "p.toml",
    "--data",
    "data",
    "--out",
    "new",
    "--tracker",
    "none",
    "--set",
    "unet.train.learning_rate=1e-5",
]
BRANCH += ["--resume", "out/checkpoints/unet/step-000001"]
STATES = [
    (STATE, "", 3, "state.json: found 3, expected an object"),
    (STATE, "step", REMOVE, "step is missing"),
    (STATE, "step", -1, "step: found -1"),
    (STATE, "step", "1", "step: found '1'"),
    (STATE, "step", 7, "step: found 7, expected 1"),
    (STATE, "extra", [], "extra: found []"),
    (STATE, "sha256", {}, "sha256: found {}"),
    (STATE, "sha256.model", "0" * 64, "model.safetensors is damaged"),
    (STATE, "sha256.model", "x", "sha256['model']: found 'x'"),
    (STATE, "sha256", {"../x": "0" * 64}, "state.json"),
    (STATE, "sha256.other", "0" * 64, "other.safetensors"),
    (STATE, "more", 1, "unknown field 'more'"),
]


def damage(name: str) -> Callable[[Path], object]:
    file = Path("out/checkpoints/unet/step-000001") / name
    return lambda w: (w / file).write_bytes((w / file).read_bytes()[:-5])


BROKEN = [
    *json_attacks("branch", BRANCH, STATES),
    *[Attack(f"branch:cut {n}", BRANCH, n, damage(n)) for n in ("model.safetensors", "ema.safetensors", "state.json")],
    Attack(
        "branch:gone",
        BRANCH,
        "optimizer.safetensors",
        lambda w: (w / STATE).with_name("optimizer.safetensors").unlink(),
    ),
    Attack("branch:own", [*TRAIN, "--resume", "out/checkpoints/unet/step-000001"], "is this run's own checkpoint"),
]


@pytest.mark.parametrize("attack", BROKEN, ids=str)
def test_a_checkpoint_that_lies_is_refused(attack, refused, work, preset_file, begun):
    refused(attack, **{"data": work, "p.toml": preset_file, "out": begun})


def test_a_folder_that_another_process_trains_into_is_refused(refused, work, preset_file, begun):
    lock: list[FileLock] = []

    def hold(workspace: Path) -> None:
        lock.append(FileLock(workspace / "out" / ".lock"))
        lock[0].acquire()

    attack = Attack("locked", TRAIN, "another process trains into it", hold)
    refused(attack, **{"data": work, "p.toml": preset_file, "out": begun})
    lock[0].release()


@pytest.mark.slow
def test_of_two_trainings_at_once_exactly_one_runs(work, preset_file, tmp_path, command):
    shutil.copytree(work, tmp_path / "data")
    shutil.copy(preset_file, tmp_path / "p.toml")
    line, environment = command(*TRAIN, "--set", "unet.train.steps=40")
    start = [
        subprocess.Popen(line, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in start]
    codes = [process.returncode for process in start]
    if codes == [0, 0]:  # one had ended before the other began
        assert any("already finished" in text for text in said), said
    else:
        assert sorted(codes) == [0, 2], said
        assert "another process trains into it" in said[codes.index(2)]


def test_a_run_of_an_earlier_version_is_continued(fork_server, tmp_path, work, preset_file, begun):
    """Its record lacks a newer key, and its checkpoints have the digest of that record."""
    for name, source in (("data", work), ("out", begun)):
        shutil.copytree(source, tmp_path / name)
    shutil.copy(preset_file, tmp_path / "p.toml")
    record = json.loads((tmp_path / RECORD).read_text())
    del record["preset"]["unet"]["train"]["timestep_shift"], record["preset"]["unet"]["train"]["color_jitter"]
    (tmp_path / RECORD).write_text(json.dumps(record, indent=2))
    identity = {key: value for key, value in record.items() if key != "finished"}
    state = json.loads((tmp_path / STATE).read_text())
    state["extra"]["job"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    (tmp_path / STATE).write_text(json.dumps(state))
    outcome = fork_server.run(TRAIN, tmp_path, {"FASTGEN_CACHE": str(tmp_path / "cache")}, 60)
    assert outcome.code == 0, outcome.stderr
    assert "continues at step 1 of 2" in outcome.stderr
