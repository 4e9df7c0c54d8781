"""Every command of README.md and docs/*.md runs as it is written there, on data and models of seconds.

A document's commands run in order in one folder. Where one asks for something that its reader has (`DATA`, `MODEL`,
`test.json`), it is put there first (LENT); what takes long is asked for less by further options behind those that are written
(`shortened`). What cannot run here is in NOT_RUN, with the reason, and is parsed all the same.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from documents import DOCUMENTS, REPO, Step, check_words, definitions, inline, links, named, steps, unmarked
from small_presets import SMALL

from fastgen.models.find import MODELS as SHIPPED

pytest.importorskip("torch")

NOT_RUN = {  # pattern of a command -> why it is parsed only
    r"--trt|--engine trt|--devices": "needs an NVIDIA GPU, or two",
    r"^accelerate ": "needs several GPUs; tests/training/test_processes.py starts several processes",
    r"^torchrun ": "needs several machines; tests/generate/test_scale_document.py runs its processes",
    r"--shard auto": "needs the variables of a cluster; tests/generate/test_scale_document.py sets them",
    r"^ray start|--ray( |$)": "starts a cluster of Ray, or needs one; tests/cluster/test_ray_cluster.py has one",
    r"(s3|gs|abfs)://": "needs a bucket; tests/generate/test_bucket_jobs.py starts an S3 server",
    r"^pip install": "would change the environment that the tests run in; tests/test_packaging.py installs the wheel",
    r"^(git|python -m (pip|build|twine|venv))( |$)|^CLEAN/bin/": "is done by hand; tests/test_packaging.py runs the wheel",
    r"^bin/(test|setup)": "is what started these tests",
    r"^bin/(demo|train-models)": "tests/test_scripts.py runs it",
    r"^bin/bench|^python -m benchmarks\.(?!engines)": "takes half an hour; see tests/benchmarks/test_benchmarks.py",
    r"^fastgen import OLD": "needs the checkpoint of somebody's full-size network; see tests/models/test_importing.py",
    r"--features inception\.pth": "needs the weights of FID's Inception; see tests/scoring/test_inception.py",
    r"^fastgen serve": "does not end; tests/serving/test_serving_examples.py starts a server",
    r"import tritonclient": "needs Triton; tests/serving/test_triton_model.py has a server that speaks its protocol",
    r"OpenAI\(|client\.images": "needs a server; tests/serving/test_serving_examples.py has one",
    r"--checkpoint 500,1000,best,last": "needs a run of 1000 steps; see tests/sweep/test_sweep.py",
}
CARDS = sorted(folder.parent.name for folder in SHIPPED.glob("*/README.md"))
SLOW = {r"--engine compile": "compiles for a minute", r"export iclevr-64 --rtx": "two exports take half a minute"}
PLACE = re.compile(
    r"[A-Z][A-Z0-9_]*(\.json)?$|[a-z_]*test\.json$"
)  # what the reader has, or will have after the command


def matching(step: Step, patterns: dict[str, str]) -> bool:
    return any(re.search(pattern, step.text) for pattern in patterns)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> Path:
    from fastgen.data.synthetic import write_iclevr

    folder = tmp_path_factory.mktemp("lent") / "labelled"
    write_iclevr(folder, count=24, size=32, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def described(tmp_path_factory) -> Path:
    from fastgen.data.synthetic import write_monsters

    folder = tmp_path_factory.mktemp("lent") / "described"
    write_monsters(folder, count=2, frames=1, size=32, test_count=4, workers=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def judge(tmp_path_factory) -> Path:
    from scoring_helpers import make_evaluator

    return make_evaluator(tmp_path_factory.mktemp("lent") / "evaluator")


@pytest.fixture(scope="session")
def judge_of_monsters(described, tmp_path_factory) -> Path:
    """An evaluator of attributes that was never trained."""
    from fastgen.data.attributes import outputs
    from fastgen.data.synthetic.traits import ACTIONS, VALUES
    from fastgen.models import evaluator

    attributes = {**{name: tuple(values) for name, values in VALUES.items()}, "action": tuple(ACTIONS)}
    folder = tmp_path_factory.mktemp("lent") / "evaluator-monsters"
    evaluator.save(evaluator.ResNet18(len(outputs(attributes)), width=8).eval(), folder, attributes, {})
    return folder


@pytest.fixture
def shipped(label_model, text_model, judge, judge_of_monsters, tmp_path_factory, monkeypatch) -> None:
    """Small models under the names of those that come with the package."""
    models = {"iclevr-64": label_model, "monsters-64": text_model}
    models |= {"evaluator-iclevr": judge, "evaluator-monsters": judge_of_monsters}
    folder = tmp_path_factory.mktemp("models")
    for name, source in models.items():
        (folder / name).symlink_to(source)
    monkeypatch.setattr("fastgen.models.find.MODELS", folder)


class Reader:
    """Somebody who gives a document's commands in a folder of their own."""

    def __init__(self, lent: dict[str, Callable[[], Path]], fastgen: Callable[..., tuple[int, str, str]]) -> None:
        self.lent, self.fastgen = lent, fastgen
        self.given: set[str] = set()  # what was put into the folder, not made by a command

    def run(self, step: Step) -> None:
        """Run a step. Fails, with what to do about it, when it fails or asks for something unknown."""
        if step.python:
            for place in re.findall(r'"([A-Z][\w.]*|test\.json)"', step.text):
                self.lend(step, place, optional=True)
            exec(compile(step.text, step.document, "exec"), {})
            return
        words = step.words
        for option, word in sorted(
            arguments(words), key=lambda found: found[0] in ("generate", "sweep")
        ):  # models first
            self.lend(step, word.split("/")[0], kind=needed_kind(words, option, word))
        if words[:2] == ["fastgen", "train"] and "--data" not in words:
            self.lend(step, "data", kind="labels")
        made = words[words.index("--out") + 1] if "--out" in words else None
        if made in self.given:
            shutil.rmtree(made)
        code, told = self.start([*words, *shortened(words)])
        if code:
            advice = "What it needs may be missing in LENT, or it belongs into NOT_RUN (tests/test_documents.py)."
            pytest.fail(f"{step}\nexit code {code}: {told}\n{advice}", pytrace=False)

    def start(self, words: list[str]) -> tuple[int, str]:
        words = [re.sub(r"(.*)/step-\d+", first_checkpoint, word) for word in words]
        # What a training begins with must fit its preset: it is the real model, not the small one under its name.
        words = [re.sub(r"(?<=(?:path|ined)=)(?=[a-z]+-64$)", f"{SHIPPED}/", word) for word in words]
        if words[0] == "fastgen":
            code, _, err = self.fastgen(*words[1:])
            return code, err
        done = CliRunner().invoke(importlib.import_module(words[2]).main, words[3:])
        return done.exit_code, f"{done.output} {done.exception!r}"

    def lend(self, step: Step, place: str, kind: str | None = None, optional: bool = False) -> None:
        """Put there what the reader is supposed to have, in place of what has another kind than the command needs."""
        if not (place in self.lent or kind or PLACE.match(place)):
            return
        if Path(place).exists() and kind in (None, found_kind(Path(place))):
            return
        name = f"{'REQUESTS' if place.endswith('.json') else 'DATA'} ({kind})" if kind else place
        if name not in self.lent:
            if not optional:
                text = (
                    f"{step}\nthe test knows no {place} that it could lend; add it to LENT in tests/test_documents.py"
                )
                pytest.fail(text, pytrace=False)
            return
        self.given.add(place)
        if Path(place).is_dir():
            shutil.rmtree(place)
        source = self.lent[name]()
        (shutil.copytree if source.is_dir() else shutil.copy)(source, place)


@pytest.fixture
def lent(request, labelled, described, judge, requests_files) -> dict[str, Callable[[], Path]]:
    """What readers have, by the name that documents give it; made when a command asks for it."""
    fixture = request.getfixturevalue
    return {
        "DATA": lambda: labelled,
        "DATA (text)": lambda: described,
        "DATA (labels)": lambda: labelled,
        "MODEL": partial(fixture, "label_model"),
        "FOLDER": partial(fixture, "text_model"),
        "MONSTERS_64": lambda: SHIPPED / "monsters-64",
        "BUNDLE": partial(fixture, "label_bundle"),
        "TEXT_BUNDLE": partial(fixture, "text_bundle"),
        "EVALUATOR": lambda: judge,
        "test.json": lambda: requests_files["labels"],
        "REQUESTS (labels)": lambda: requests_files["labels"],
        "REQUESTS (text)": lambda: requests_files["text"],
    }


def arguments(words: list[str]) -> list[tuple[str, str]]:
    """(option or word before it, value) of everything in a command that may name what must be there: not what it writes."""
    writes = {i + 1 for i, word in enumerate(words) if word == "--out"}
    if words[1:2] in (["data"], ["pack"]):
        writes.add(3)
    read = [i for i, word in enumerate(words) if i and i not in writes and not word.startswith("-")]
    return [(words[i - 1], words[i].partition("=")[2] or words[i]) for i in read]


def needed_kind(words: list[str], before: str, word: str) -> str | None:
    """What a dataset to learn from, named after `before`, must hold, or a file of requests; None for everything else."""
    from fastgen.models.find import find_folder, model_kind
    from fastgen.presets import load_preset

    command = words[1] if words[0] == "fastgen" else ""
    if command == "train" and before == "--data":
        preset = preset_of(words)
        return "text" if load_preset(preset).kind == "text" or preset == "evaluator-monsters" else "labels"
    if command == "index" and before == "index":
        return "text"
    if command in ("generate", "sweep") and before == command and word.endswith(".json") and "/" not in word:
        named = model_kind(find_folder(words[words.index("--model") + 1])) if "--model" in words else None
        return named or ("text" if word.lower().startswith("prompt") else "labels")
    return None


def preset_of(words: list[str]) -> str:
    """The preset of a `fastgen train`; where it names none, that of the labels which it is lent."""
    from fastgen.presets.defaults import DEFAULTS

    return DEFAULTS["labels"] if len(words) == 2 or words[2].startswith("-") else words[2]


def found_kind(place: Path) -> str | None:
    """ "text" or "labels" where a dataset or a file of requests lies there."""
    if place.is_file():
        return "labels" if isinstance(json.loads(place.read_text()), list) else "text"
    return "text" if (place / "train_info.json").is_file() else "labels" if (place / "train.json").is_file() else None


def first_checkpoint(named: re.Match[str]) -> str:
    """The checkpoint that the shortened training has for the one that a document names."""
    return str(min(Path(named[1]).glob("step-*"), default=named[0]))


def shortened(words: list[str]) -> list[str]:
    """Options that make a command short; those that are written stay and are read first."""
    if words[:3] == ["fastgen", "data", "iclevr"]:
        return ["--count", "24", "--size", "32", "--workers", "1"]
    if words[:3] == ["fastgen", "data", "monsters"]:
        return ["--count", "2", "--size", "32", "--frames", "1", "--test-count", "4", "--workers", "1"]
    if words[:2] == ["fastgen", "train"]:
        sizes = {word.partition("=")[0] for word in words if word.startswith(("unet.config.", "image_size="))}
        given = {word.partition(".")[0] for word in words if ".path=" in word}  # networks that are not trained
        given |= {"unet.config"} if any("unet.train.pretrained=" in word for word in words) else set()
        return [
            f"--set={override}"
            for override in small(preset_of(words))
            if override.partition("=")[0] not in sizes and not override.startswith(tuple(f"{name}." for name in given))
        ]
    if words[:2] == ["fastgen", "generate"]:
        return ["--num-inference-steps", "2"]
    if words[:2] == ["fastgen", "sweep"]:
        return ["--num-inference-steps", "2,5", "--guidance-scale", "1,2", "--seeds", "0", "--limit", "2"]
    if words[:3] == ["python", "-m", "benchmarks.engines"]:
        return ["--batch-size", "2", "--rounds", "1", "--steps", "2", "--out", "engines.json"]
    return []


def small(name: str) -> list[str]:
    """Overrides with which a preset trains for seconds."""
    from fastgen.presets import load_preset

    preset = load_preset(name)
    found = [*SMALL[name], "sampling.num_inference_steps=4"] if name in SMALL else []
    if name not in SMALL and preset.unet is not None:
        widths = [16] * len(preset.unet.config["block_out_channels"])
        found += [f"unet.config.{key}" for key in (f"block_out_channels={widths}", "attention_head_dim=8")]
    for network in ("evaluator", "vae", "text_encoder", "unet"):
        if (part := getattr(preset, network)) is not None and part.train is not None:
            keys = {"steps": 2, "batch_size": 4, "accumulation": 1, "validation_limit": 4, "checkpoint_every": 1}
            found += [f"{network}.train.{key}={number}" for key, number in keys.items()]
    return found


def run(document: str, reader: Reader, chosen: Callable[[Step], bool]) -> None:
    for step in steps(document):
        if not step.python:
            try:
                check_words(step.words)
            except click.UsageError as error:
                pytest.fail(f"{step}\n{error.format_message()}", pytrace=False)
        if chosen(step):
            reader.run(step)


@pytest.fixture
def reader(lent, shipped, fastgen, _graphs_once, tmp_path, monkeypatch) -> Reader:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastgen.sampling.compile.COMMON_STEPS", (1, 2, 3, 5, 10, 20))
    logging.getLogger("torch.__trace").propagate = False  # pages of it would be shown beside a failed test
    return Reader(lent, fastgen)


@pytest.mark.parametrize(
    "document", [d if d != "docs/presets.md" else pytest.param(d, marks=pytest.mark.slow) for d in DOCUMENTS]
)
def test_every_command_of_a_document_runs(document, reader):
    run(document, reader, lambda step: not matching(step, NOT_RUN | SLOW))


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_slow_command_of_a_document_runs(document, reader):
    run(document, reader, lambda step: matching(step, SLOW) and not matching(step, NOT_RUN))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_that_a_document_mentions_exist_with_their_options(document):
    for command in inline(document):
        words = command.replace("COMMAND", "train").replace(" ...", "").split()
        try:
            check_words(words, incomplete=True)
        except click.UsageError as error:
            pytest.fail(f"{document}: `{command}`: {error.format_message()}", pytrace=False)


@pytest.mark.parametrize("document", [*DOCUMENTS, *(f"fastgen/models/shipped/{card}/README.md" for card in CARDS)])
def test_pictures_and_files_that_a_document_links_to_are_there(document):
    assert [t for t in links(document) if not (REPO / document).parent.joinpath(t).exists()] == []
    assert "docs/measured.md" in links("README.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_says_is_in_a_module_is_there(document):
    missing = [f"{module}: {name}" for name, module in named(document) if name not in definitions(module)]
    assert not missing, "\n".join(missing)
    assert ("sample_steps", REPO / "docs/../fastgen/sampling/loop.py") in named("docs/how-it-works.md")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_stand_in_blocks_that_the_tests_run(document):
    assert list(unmarked(document)) == [], "mark the block as ```bash"


@pytest.mark.parametrize(
    "command",
    [
        "fastgen generate DATA/test.json --guidance 3",
        "fastgen genrate DATA/test.json",
        "fastgen import",
        "fastgen export M --batch-sizes",
        "python -m benchmarks.engines",
        "python -m benchmarks.gpu --out OUT --minute 3",
        "pip install .[gpus]",
        "python -m twin upload",
        "pip install fastgen-diffusion[cpu]",
        "bin/demo --fast",
        "bin/demos",
        "curl -O https://example.com/model.safetensors",
    ],
)
def test_a_command_that_does_not_exist_is_noticed(command):
    with pytest.raises(click.UsageError):
        check_words(command.split())


def test_something_that_the_reader_is_not_known_to_have_is_asked_for(reader):
    with pytest.raises(pytest.fail.Exception, match="knows no WEIGHTS that it could lend"):
        reader.run(Step("README.md", "fastgen export WEIGHTS --out BUNDLE"))


def test_a_command_that_fails_is_named_with_its_error(reader):
    with pytest.raises(pytest.fail.Exception, match=r"(?s)README.md: fastgen score nothing.*exit code 2.*nothing"):
        reader.run(Step("README.md", "fastgen score nothing"))
