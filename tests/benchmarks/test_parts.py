"""Parts of a measurement cannot stop each other: not by raising, hanging, crashing, or taking too long."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.parts import Part, Record, Run, kept_for_all_parts, run_parts


def part(function, needs=0.0, limit=20.0, own=False, **arguments):
    return Part(function, f"part_examples:{function}", needs, limit, own, arguments)


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """Facts of these parts, which had `seconds` in all."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))

    def run(*parts, seconds=60.0):
        record = Record(tmp_path / "facts.jsonl")
        given = Run("cpu", tmp_path, tmp_path, tiny=True)
        with kept_for_all_parts(tmp_path):
            run_parts(parts, given, record, time.monotonic() + seconds)
        assert [json.loads(line) for line in (tmp_path / "facts.jsonl").read_text().splitlines()] == record.facts
        return record.facts

    return run


def of(facts, name):
    return [fact for fact in facts if fact["part"] == name]


def test_facts_come_in_order_with_what_the_part_took(facts):
    found = facts(part("fine", value=7))
    assert [fact["what"] for fact in found] == ["first", "second", "the part took"]
    assert found[0]["value"] == 7
    assert 0 < found[1]["left"] < 20
    assert found[-1]["seconds"] < 20


def test_parts_share_a_process_unless_one_wants_its_own(facts):
    a, b, c, d = (
        f["process"] for f in facts(*[part("fine")] * 2, part("fine", own=True), part("fine")) if "process" in f
    )
    assert a == b
    assert len({b, c, d}) == 3


def test_what_a_part_raises_is_its_last_fact_and_the_next_one_runs_in_another_process(facts):
    found = facts(part("fine"), part("raising"), part("fine"))
    (failed,) = [fact for fact in found if "error" in fact]
    assert (failed["part"], failed["passed"]) == ("raising", False)
    assert (failed["error"]["type"], failed["error"]["message"]) == ("ValueError", "of two lines")
    assert "part_examples.py" in failed["error"]["frames"][-1]
    first, last = (fact["process"] for fact in found if "process" in fact)
    assert first != last


@pytest.mark.parametrize("function", ["sleeping", "holding"])
def test_a_part_that_hangs_is_ended_and_says_where_even_in_c(facts, function):
    start = time.monotonic()
    found = facts(part(function, limit=2.0), part("fine"))
    assert time.monotonic() - start < 30
    before, failed, took = of(found, function)
    assert before["what"] == "before"
    assert failed["error"]["type"] == "TimeLimit"
    assert any(f"in {function}" in line for line in failed["error"]["frames"])
    assert took["seconds"] < 10
    assert len(of(found, "fine")) == 3


def test_what_a_part_started_is_ended_with_it(facts, tmp_path):
    facts(part("starting", limit=2.0))
    child = int((tmp_path / "child").read_text())
    status = Path(f"/proc/{child}/status")
    for _ in range(50):
        if not status.exists() or "State:\tZ" in status.read_text():
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("the child outlived its part")


@pytest.mark.parametrize(("function", "how"), [("crashing", "signal SIGSEGV"), ("leaving", "exit code 3")])
def test_a_part_that_takes_its_process_down_says_how(facts, function, how):
    found = facts(part(function), part("fine"))
    failed = of(found, function)[1]
    assert failed["error"]["message"] == f"the process ended with {how}"
    assert function == "leaving" or any("in crashing" in line for line in failed["error"]["frames"])
    assert len(of(found, "fine")) == 3


def test_a_part_whose_time_is_not_left_is_skipped_and_says_so(facts):
    found = facts(part("fine", needs=100), part("raising"), seconds=50)
    assert found[0]["skipped"] == "needs 100 s, 50 s are left"
    assert len(of(found, "raising")) == 3


def test_the_time_that_is_left_limits_a_part_too(facts):
    found = facts(part("sleeping", limit=100), part("fine", needs=1), seconds=2)
    assert of(found, "sleeping")[1]["error"]["type"] == "TimeLimit"
    assert "skipped" in of(found, "fine")[0]
