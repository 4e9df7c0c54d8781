"""Commands as processes: Ctrl-C while modules are imported, and standard streams that are closed, full, or read by nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LINE = "fastgen: error: nowhere.json: no such file\n"


def run(command, arguments, redirection, cwd):
    """(exit code, stderr) of `fastgen ARGUMENTS REDIRECTION` in a shell."""
    line, environment = command(*arguments)
    script = f'"$@" {redirection}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *line], env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("redirection", "code", "stderr"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        ("> /dev/full", 1, "fastgen: error: stdout: No space left on device; the command did its work, but not all"),
        ("2> /dev/full", 0, ""),
        ("| true; exit ${PIPESTATUS[0]}", 0, ""),
        ("2>&1 >&- | true; exit ${PIPESTATUS[0]}", 0, ""),
    ],
)
def test_what_becomes_of_the_output_changes_no_exit_code(command, tmp_path, redirection, code, stderr):
    found, said = run(command, ["engines", "ls"], redirection, tmp_path)
    assert found == code, said
    assert said.startswith(stderr)
    assert said.count("\n") == bool(stderr)


@pytest.mark.parametrize("redirection", ["2>&-", "2> /dev/full", ">&- 2>&-", "2>&1 >&- | true; exit ${PIPESTATUS[0]}"])
def test_a_refusal_that_nobody_reads_has_its_exit_code(command, tmp_path, redirection):
    assert run(command, ["generate", "nowhere.json"], redirection, tmp_path) == (2, "")


def test_a_file_never_takes_the_place_of_a_closed_stream(command, tmp_path):
    code, said = run(command, ["data", "iclevr", "data", "--count", "4", "--size", "32"], ">&- 2>&-", tmp_path)
    assert (code, said) == (0, "")
    assert "wrote" not in (tmp_path / "data" / "train.json").read_text()


INTERRUPTED_IMPORT = """
import os, signal, sys
from pathlib import Path

import fastgen.cli.process as process

Path("pressed.py").write_text(
    "import os, signal, time\\nos.kill(os.getpid(), signal.SIGINT)\\ntime.sleep(0.1)\\nopen('finished', 'x')\\n"
)
sys.path.insert(0, "")
with process._interrupts() as ctrl_c:
    try:
        import pressed
        for i in range(10**9):
            pass
    except KeyboardInterrupt:
        print(i > 0, ctrl_c.pressed, os.path.exists("finished"))
"""


SWALLOWED = """
import os, signal, time

import fastgen.cli.process as process

handled = 0
with process._interrupts() as ctrl_c:
    try:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except BaseException:
            time.sleep(1.2)  # it is being handled, and takes a while
            handled += 1
        time.sleep(10)  # what came after a library had swallowed it
    except KeyboardInterrupt:
        handled += 1
        time.sleep(1.2)
        ctrl_c.settle()
time.sleep(0.6)
print(handled, ctrl_c.pressed)
"""


@pytest.mark.parametrize(("script", "printed"), [(INTERRUPTED_IMPORT, "True True True"), (SWALLOWED, "2 True")])
def test_ctrl_c_ends_the_command_after_an_import_and_where_a_library_swallows_it(tmp_path, script, printed):
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (f"{printed}\n", "")


@pytest.mark.parametrize("delay", [0.15, 0.4, 0.8, 1.5, 2.5])
@pytest.mark.parametrize("arguments", [["train", "iclevr-64", "--data", "data"], ["generate", "--prompt", "a dragon"]])
def test_ctrl_c_in_the_first_seconds_is_one_line(command, tmp_path, arguments, delay):
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "train.json")
    line, environment = command(*arguments)
    process = subprocess.Popen(
        line, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    if process.returncode == 2:
        pytest.skip("the command had ended")
    assert process.returncode == 130, said
    assert [line for line in said.splitlines() if not line.startswith("model: ")][1:] == [], said
    assert "Traceback" not in said
