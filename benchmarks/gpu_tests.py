"""The tests that need a GPU, a file at a time, so that one that hangs or crashes takes no other with it."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from benchmarks.parts import REPOSITORY, Fact, Run, failure

TESTS = REPOSITORY / "tests"
MARK = "pytest.mark.gpu"
SPARE = 5.0  # seconds before the part's own limit, to tell which test it was
COMPILES = "engines/test_compile.py"  # its tests build packages: they take minutes


def test_files() -> list[str]:
    """The files in tests/ that hold tests for a GPU: collecting all of tests/ would take a minute. What compiles comes last."""
    found = [file for file in TESTS.rglob("test_*.py") if MARK in file.read_text(encoding="utf-8")]
    return sorted((f.relative_to(TESTS).as_posix() for f in found), key=lambda name: (name == COMPILES, name))


def tests(run: Run, file: str) -> Iterator[Fact]:
    """The GPU tests of one file in a pytest process: counts, what failed, and why others were skipped."""
    if importlib.util.find_spec("pytest") is None:
        yield {"what": file, "skipped": "pytest is not installed here"}
        return
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.xml", Path(folder) / "log.txt"
        # without the options of pyproject.toml, which need pytest-timeout
        options = ["-o", "addopts=", "-o", f"cache_dir={folder}/cache", "-v", "--tb=short", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "-m", "gpu", *options, str(TESTS / file)]
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=REPOSITORY)
            try:
                code = process.wait(timeout=max(1.0, run.left - SPARE))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                yield failure(file, "TimeLimit", "pytest did not end; its last lines are below", _last(log))
                return
        if code not in (0, 1, 5) or not report.exists():  # 5: no test was left to run
            yield failure(file, "Pytest", f"pytest ended with code {code}", _last(log))
            return
        yield summary(file, report)


def summary(file: str, report: Path) -> Fact:
    """What pytest's XML says. A file whose tests were all skipped is a skipped fact, with the reasons."""
    failed, reasons, count = [], set(), 0
    for case in ET.parse(report).iter("testcase"):
        count += 1
        broken = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if broken is not None:
            failed.append(f"{case.get('name')}: {' '.join(str(broken.get('message')).split())[:200]}")
        elif skipped is not None:
            reasons.add(_reason(skipped))
            count -= 1
    why = "; ".join(sorted(reasons))
    if not count:
        return {"what": file, "skipped": why or "no test is selected"}
    passed = count - len(failed)
    fact: Fact = {"what": file, "passed": not failed, "tests_passed": passed, "tests_failed": len(failed)}
    return fact | {"failures": failed, "tests_skipped": why}


def _reason(skipped: ET.Element) -> str:
    """Why a test was skipped; of a whole file, that stands in the element's text: (file, line, "Skipped: why")."""
    message, text = str(skipped.get("message")), str(skipped.text)
    if message != "collection skipped":
        return message
    return str(ast.literal_eval(text)[-1]).removeprefix("Skipped: ")


def _last(log: Path) -> list[str]:
    return [line[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()][-12:]
