"""The first minutes on a card: the script runs whole without one, and each of its checks can fail."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("diffusers")

import torch

from benchmarks import first, first_facts, first_memory, first_serving, first_speed, gpu_table, gpu_tests
from benchmarks.parts import REPOSITORY, Run
from fastgen.engines.compile import engine as engine_compile
from fastgen.engines.machine import cpu, has_half
from fastgen.errors import InputError
from fastgen.generate.run import Run as Generation
from fastgen.models.folder import load_model
from fastgen.serving.slots import Slots

NEEDS_GPU = first_facts.NEEDS_GPU


@pytest.fixture
def run(tmp_path, monkeypatch) -> Iterator[Run]:
    monkeypatch.setattr(Run, "low", "bf16")  # on every CPU: the models are small
    first_facts.pipeline.cache_clear()
    yield Run("cpu", tmp_path, tmp_path, tiny=True, deadline=time.monotonic() + 300, images=6)
    first_facts.pipeline.cache_clear()


def failed(facts) -> list[str]:
    return [fact["what"] for fact in facts if first.verdict(fact) == "failed"]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_the_script_runs_whole_on_a_cpu(tmp_path):
    tests = [name for name in first.NAMES if name.startswith("tests, ")]
    parts = [
        name for name in first.NAMES if name not in tests or name in (tests[0], tests[-1])
    ]  # each of them starts pytest
    command = [sys.executable, "-m", "benchmarks.first", str(tmp_path), "--device", "cpu", "--minutes", "8"]
    command += [word for name in parts for word in ("--only", name)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=490)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "first.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "first.jsonl").read_text().splitlines()]
    assert lines == found["facts"] == [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert list(dict.fromkeys(fact["part"] for fact in lines)) == parts
    assert found["failed"] == 0
    assert found["passed"] > 40
    reasons = {fact["skipped"].partition(";")[0] for fact in lines if "skipped" in fact}
    absent = set() if has_half(cpu(), "bf16") else {first_facts.NEEDS_BF16}
    assert reasons == {NEEDS_GPU, "needs a CUDA GPU", *absent}
    assert found["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert "loops, monsters-64" in done.stdout.splitlines()[len(lines) + 4]
    assert not (tmp_path / "kept").exists()


def test_the_parts_are_in_order_and_each_exists_with_its_arguments():
    import importlib
    import inspect

    order = [
        "environment",
        "loops",
        "fp32",
        "bf16",
        "overlap",
        "memory",
        "no waiting",
        "out of memory",
        "speed",
        "slots",
        "tests",
    ]
    order += ["full size", "job", "diffusers", "compile", "tests"]
    names = [name.partition(",")[0] for name in first.NAMES]
    assert [name for i, name in enumerate(names) if i == 0 or names[i - 1] != name] == order
    for part in first.PARTS:
        module, _, name = part.run.partition(":")
        inspect.signature(getattr(importlib.import_module(module), name)).bind(None, **part.arguments)
        assert part.needs < part.limit
    assert first.NAMES[-1] == "tests, engines/test_compile.py"


@pytest.mark.parametrize("kind", ["text", "label"])
def test_a_cpu_agrees_with_itself_in_every_kind_of_loop(run, kind, request):
    facts = list(first_facts.agreement(run, str(request.getfixturevalue(f"{kind}_model"))))
    assert failed(facts) == []
    for loop in first_facts.KINDS:
        assert [fact.get("skipped") for fact in facts if fact["what"] == f"{loop}, bf16, graphs"] == [NEEDS_GPU]
        assert [fact["passed"] for fact in facts if fact["what"] == f"{loop}, fp32, no graphs: the CPU's pictures"] == [
            True
        ]


def test_pictures_that_differ_are_noticed_and_a_loop_that_fails_stops_no_other(run, label_model, monkeypatch):
    images, calls = first_facts.images, []

    def disturbed(pipe, *given, **options):
        calls.append(options)
        if options.get("scheduler") == "ddpm":
            raise RuntimeError("no noise left")
        return images(pipe, *given, **options) // (3 if len(calls) == 2 else 1)

    monkeypatch.setattr(first_facts, "images", disturbed)
    facts = list(first_facts.agreement(run, str(label_model)))
    start = "guided, fp32, no graphs"
    assert failed(facts) == [f"{start}: the CPU's pictures", f"{start}: a second run", "ddpm, reference"]
    assert any(fact["what"].startswith("sde") for fact in facts)


def test_fp32_that_depends_on_the_process_s_flag_is_noticed(run, label_model, monkeypatch):
    images, cudnn = first_facts.images, torch.backends.cudnn
    monkeypatch.setattr(first_facts, "images", lambda pipe, **o: images(pipe, **o) // 2 + np.uint8(cudnn.allow_tf32))
    before = cudnn.allow_tf32
    assert failed(first_facts.full_precision(run, str(label_model))) == ["fp32: the flags change nothing"]
    assert cudnn.allow_tf32 == before


def test_a_run_that_changes_the_process_s_flag_is_noticed(run, label_model, monkeypatch):
    images, cudnn = first_facts.images, torch.backends.cudnn
    monkeypatch.setattr(
        first_facts, "images", lambda pipe, **o: (images(pipe, **o), setattr(cudnn, "allow_tf32", False))[0]
    )
    assert failed(first_facts.full_precision(run, str(label_model))) == [
        "fp32 where the process has TF32 on: the flags afterwards"
    ]
    assert cudnn.allow_tf32


def test_overlapped_batches_are_compared_with_sequential_ones(run, text_model, monkeypatch):
    assert failed(first_facts.overlap(run, str(text_model))) == []
    start, waiting = Generation.begin, []

    def late(self, *given, **options):
        """The pictures are those of the batch that was begun last."""
        waiting.append(start(self, *given, **options))
        return lambda: waiting[-1]()

    monkeypatch.setattr(Generation, "begin", late)
    assert failed(first_facts.overlap(run, str(text_model))) == [
        "overlapped batches",
        "overlapped batches after 2 tables",
    ]


def test_the_loop_is_the_pipeline_s_and_a_loop_that_differs_is_noticed(run, label_model, monkeypatch):
    assert failed(first_memory.nothing_waits(run, str(label_model))) == []
    from fastgen.sampling.device_loop import DeviceLoop

    whole = DeviceLoop.run
    monkeypatch.setattr(DeviceLoop, "run", lambda self, x, *given, **options: whole(self, x + 0.1, *given, **options))
    assert failed(first_memory.nothing_waits(run, str(label_model))) == ["the loop's latents are the pipeline's"]


def test_a_job_that_runs_short_goes_on_and_its_pictures_are_compared(run, text_model, monkeypatch):
    facts = list(first_memory.out_of_memory(run, str(text_model)))
    assert failed(facts) == []
    said = [fact["said"] for fact in facts if "said" in fact]
    assert [len(lines) for lines in said] == [1, 2]
    job = first_memory._job
    monkeypatch.setattr(
        first_memory,
        "_job",
        lambda pipe, n, said=None: (job(pipe, n, said)[0], np.zeros((n, 4, 4, 3), np.uint8) + (200 if said else 0)),
    )
    assert failed(first_memory.out_of_memory(run, str(text_model))) == [
        f"a job in {share}% of its memory: the pictures" for share in (60, 35)
    ]


def test_a_job_that_never_ran_short_proves_nothing_and_one_that_breaks_is_told(run, text_model, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr(first_memory, "little_memory", lambda *given: nullcontext())
    assert failed(first_memory.out_of_memory(run, str(text_model)))[0].endswith("it ran short and went on")
    job = first_memory._job

    def broken(pipe, count, said=None):
        if said is not None:
            raise RuntimeError("unjoined work")
        return job(pipe, count)

    monkeypatch.setattr(first_memory, "_job", broken)
    errors = [fact["error"]["message"] for fact in first_memory.out_of_memory(run, str(text_model)) if "error" in fact]
    assert errors == ["unjoined work", "unjoined work"]


def test_speeds_are_positive_and_graphs_are_skipped_without_a_gpu(run, label_model):
    facts = list(first_speed.speed(run, str(label_model)))
    assert [fact["what"] for fact in facts if fact.get("skipped") == NEEDS_GPU] == [
        "bf16, batch 1, graphs",
        "bf16, batch 4, graphs",
    ]
    assert all(fact["images_per_s"] > 0 for fact in facts if "skipped" not in fact)


def test_what_compile_is_asked_on_a_gpu_runs_here_without_compiling(run, label_model, monkeypatch):
    try:
        engine_compile.Engine(load_model(label_model), dtype="bf16")
    except InputError as error:
        pytest.skip(str(error))

    class Module:
        def __init__(self, engine, network):
            self.engine, self.network = engine, network

        def run(self, inputs):
            return self.engine._run_module(self.network, inputs)

    monkeypatch.setattr(engine_compile.Engine, "_load", lambda self, network, rows: Module(self, network))
    facts = list(first_speed.compiled_facts(run, str(label_model)))
    assert failed(facts) == []
    assert [first.verdict(fact) for fact in facts] == [None, "passed", "passed", None]
    assert [fact["skipped"] for fact in first_speed.compiled(run, str(label_model))] == [NEEDS_GPU]


def test_the_job_is_judged_by_what_rounding_alone_costs(run, text_model, monkeypatch):
    from benchmarks import gpu_sections
    from benchmarks.parts import kept_for_all_parts

    monkeypatch.setattr(gpu_sections, "text_model", lambda run: text_model)
    monkeypatch.setattr(gpu_sections.floor, "measure", lambda *given: gpu_sections.floor.Rates(1e12, 1e11))
    fast = {
        "side": "compile:bf16",
        "dtype": "bf16",
        "batch": 6,
        "steps": 5,
        "images_per_s": 3.0,
        "max_abs_255": 90,
        "note": None,
    }
    monkeypatch.setattr(gpu_sections, "job", lambda run, fit: [{"what": "a job", "row": fast | {"psnr_db": 27.0}}])
    with kept_for_all_parts(run.out):
        facts = list(first_speed.full_size(run))
        assert [fact["what"] for fact in facts] == ["model", "rates", "bf16, no graphs: what rounding alone costs"]
        assert facts[-1]["psnr_db"] > 30
        assert failed(first_speed.job(run)) == ["a job"]
        (file,) = run.kept.glob("yardstick-*.json")
        file.write_text(file.read_text().replace(str(facts[-1]["psnr_db"]), "29.0"))
        assert failed(first_speed.job(run)) == []


def test_an_engine_s_row_is_a_check_and_a_peer_s_is_a_figure():
    row: dict[str, Any] = {"side": "eager:fp16:graphs", "dtype": "fp16", "batch": 1, "steps": 4, "images_per_s": 3.0}
    row |= {"psnr_db": 12.0, "max_abs_255": 90, "note": None}
    assert first.verdict(first_speed._judged({"what": "", "row": row}, [row])) == "failed"
    assert first.verdict(first_speed._judged({"what": "", "row": row | {"side": "diffusers:fp16"}}, [row])) is None
    missing = row | {"images_per_s": None, "note": "not installed: diffusers"}
    assert first_speed._judged({"what": "", "row": missing}, [])["skipped"] == "not installed: diffusers"


def test_compilers_that_are_missing_are_a_reason_to_skip(run, label_model, monkeypatch):
    from fastgen.errors import InputError

    def refuse(on_gpu):
        raise InputError("engine compile needs CUDA's headers")

    monkeypatch.setattr(first_speed, "check_tools", refuse)
    card = Run("cuda", run.out, run.work, tiny=False)
    assert [fact["skipped"] for fact in first_speed.compiled(card, str(label_model))] == [
        "engine compile needs CUDA's headers"
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    done = CliRunner().invoke(first.main, [str(tmp_path / "out")])
    assert (done.exit_code, (tmp_path / "out").exists()) == (1, False)
    assert "sees no CUDA GPU here; --device cpu tries the script" in done.output


def test_failures_are_named_and_the_exit_code_is_1(tmp_path, monkeypatch):
    def parts(chosen, run, record, deadline):
        record.put("loops", {"what": "guided", "passed": True, "max_abs_255": 1, "psnr_db": 50.0})
        record.put("loops", {"what": "ddpm", "passed": False, "max_abs_255": 90, "psnr_db": 20.0})
        record.put("memory", {"what": "the part", "skipped": "needs 8 s, 3 s are left"})

    monkeypatch.setattr(first, "run_parts", parts)
    done = CliRunner().invoke(first.main, [str(tmp_path), "--device", "cpu"])
    assert done.exit_code == 1
    assert "FAILED loops: ddpm" in done.output
    assert "1 passed, 1 failed, 1 skipped" in done.output
    assert "max 90/255, 20.0 dB" in done.output


REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"><failure message="AssertionError: 1&#10;2">...</failure></testcase>
<testcase name="c"><skipped message="needs tensorrt, not installed here"/></testcase>
<testcase name="d"><error message="CUDA error"/></testcase></testsuite></testsuites>"""


def test_a_file_s_tests_are_counted_and_failures_and_reasons_told(tmp_path):
    (tmp_path / "report.xml").write_text(REPORT)
    fact = gpu_tests.summary("test_x.py", tmp_path / "report.xml")
    assert (fact["passed"], fact["tests_passed"], fact["tests_failed"]) == (False, 1, 2)
    assert fact["failures"] == ["b: AssertionError: 1 2", "d: CUDA error"]
    assert fact["tests_skipped"] == "needs tensorrt, not installed here"


def test_a_file_that_cannot_be_imported_here_says_which_package_it_misses(run, tmp_path, monkeypatch):
    text = f"import pytest\npytest.importorskip('no_such_package')\n@{gpu_tests.MARK}\ndef test_a(): pass\n"
    (tmp_path / "test_x.py").write_text(text)
    monkeypatch.setattr(gpu_tests, "TESTS", tmp_path)
    (fact,) = gpu_tests.tests(run, "test_x.py")
    assert fact["skipped"] == "could not import 'no_such_package': No module named 'no_such_package'"
    (tmp_path / "test_x.py").write_text(f"import no_such_package\n# {gpu_tests.MARK}\n")
    (fact,) = gpu_tests.tests(run, "test_x.py")
    assert fact["error"]["message"] == "pytest ended with code 2"


def test_pytest_that_does_not_end_in_its_time_is_ended_and_says_where(run, tmp_path, monkeypatch):
    (tmp_path / "test_slow.py").write_text(
        f"import pytest, time\n@{gpu_tests.MARK}\ndef test_of_a_minute():\n    print(1)\n    time.sleep(60)\n"
    )
    monkeypatch.setattr(gpu_tests, "TESTS", tmp_path)
    assert gpu_tests.test_files() == ["test_slow.py"]
    short = Run("cpu", tmp_path, tmp_path, tiny=True, deadline=time.monotonic() + gpu_tests.SPARE + 4)
    (fact,) = gpu_tests.tests(short, "test_slow.py")
    assert fact["error"]["type"] == "TimeLimit"
    assert "test_of_a_minute" in fact["error"]["frames"][-1]


def test_the_files_with_tests_for_a_gpu_are_found_without_collecting_them():
    assert {"sampling/test_device_loop.py", "engines/test_trt_gpu.py", "engines/test_compile.py"} <= set(
        gpu_tests.test_files()
    )
    assert "test_first.py" not in gpu_tests.test_files()


MEASURED: dict[str, Any] = {
    "environment": {
        "gpu": "NVIDIA H200",
        "driver": "580.1",
        "commit": "abc",
        "versions": {"torch": "2.11.0"},
    },
    "passed": 80,
    "failed": 1,
    "facts": [
        {"part": "speed, monsters-64", "what": "fp16, batch 64, no graphs", "images_per_s": 900.0},
        {"part": "speed, monsters-64", "what": "fp16, batch 64, graphs", "images_per_s": 2000.0},
        {"part": "job", "what": "eager:fp16:graphs, 119 images", "job_s": 41.25, "floor_percent": 31.4},
        {"part": "diffusers", "what": "diffusers:fp16, batch 1", "batch": 1, "ratio": 1.0, "step_ms": 30.0},
        {"part": "diffusers", "what": "eager:fp16:graphs, batch 64", "batch": 64, "ratio": 1.31},
        {"part": "diffusers", "what": "eager:fp16:graphs, batch 1", "batch": 1, "ratio": 5.02, "step_ms": 3.456},
    ],
}


def test_the_readme_s_lines_about_gpus_are_those_of_the_results():
    text = gpu_table.README.read_text(encoding="utf-8")
    assert gpu_table.written(text, gpu_table.lines(gpu_table.held(gpu_table.RESULTS / "gpu"))) == text


def test_one_command_takes_a_card_s_facts_and_writes_the_readme_s_table(tmp_path):
    file, readme, results = tmp_path / "first.json", tmp_path / "README.md", tmp_path / "gpu"
    results.mkdir()
    readme.write_text(f"before\n{gpu_table.BEGIN}{gpu_table.NOTHING}{gpu_table.END}after\n")
    file.write_text(json.dumps(MEASURED))
    arguments = [str(file), "--results", str(results), "--readme", str(readme)]
    done = CliRunner().invoke(gpu_table.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert [f.name for f in results.iterdir()] == ["first-h200.json"]
    text = readme.read_text()
    cells = "NVIDIA H200 | 80 passed, **1 failed** | 2000 images/s / 900 images/s | 41.2 s | 5.02 x / 1.31 x | 3.46 ms | 31%"
    assert f"| {cells} | torch 2.11.0, driver 580.1, commit abc |\n" in text
    assert (text.startswith("before\n"), text.endswith("after\n"), gpu_table.NOTHING in text) == (True, True, False)
    assert CliRunner().invoke(gpu_table.main, arguments[1:]).exit_code == 0
    assert readme.read_text() == text


def test_what_a_run_that_was_cut_off_left_is_taken_too(tmp_path):
    about = {"t": 1.0, "part": "environment", "what": "environment", **MEASURED["environment"]}
    facts = [about, {"part": "loops", "what": "guided", "passed": True}, *MEASURED["facts"]]
    (tmp_path / "first.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    gpu_table.take([tmp_path / "first.jsonl"], tmp_path)
    (held,) = gpu_table.held(tmp_path)
    assert gpu_table.row(held) == [
        cell.replace("80 passed, **1 failed**", "1 passed") for cell in gpu_table.row(MEASURED)
    ]


def test_facts_of_a_cpu_are_not_taken_and_a_readme_without_the_marks_is_refused(tmp_path):
    (tmp_path / "first.json").write_text(json.dumps({"environment": {"cpu": "any"}, "facts": []}))
    done = CliRunner().invoke(gpu_table.main, [str(tmp_path / "first.json"), "--results", str(tmp_path)])
    assert (done.exit_code, "was taken on a CPU" in done.output) == (1, True)
    with pytest.raises(ValueError, match="no lines between"):
        gpu_table.written("a README", "lines")


@pytest.mark.parametrize("kind", ["text", "label"])
def test_images_that_join_a_running_batch_agree_with_those_that_do_not(run, kind, request, monkeypatch):
    model = str(request.getfixturevalue(f"{kind}_model"))
    assert failed(first_serving.slots_agree(run, model)) == []
    states = Slots.states
    monkeypatch.setattr(Slots, "states", lambda slots, numbers: 1.01 * states(slots, numbers))
    assert failed(first_serving.slots_agree(run, model)) == ["mixed solvers, joins at random"]


def test_the_cost_of_a_join_is_told_beside_a_step(run, label_model, monkeypatch):
    monkeypatch.setattr(first_serving, "ROUNDS", 2)
    facts = list(first_serving.slots_speed(run, str(label_model)))
    assert failed(facts) == []
    assert facts[0]["ratio"] > 0
    assert facts[1]["share_of_a_step"] > 0
    assert facts[2]["skipped"] == NEEDS_GPU
