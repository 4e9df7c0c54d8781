"""Parts of a measurement that cannot stop each other: each runs in a helper process, under a limit of its own, and yields
facts, which are written as soon as they are there.

A helper serves one part after the other, so that imports and loaded models are paid once. It is ended, and the next part gets
a new one, when a part raised something, ran past its limit (in Python, in a library or in a compiler), took the process down,
or wanted a process of its own.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fastgen.engines.machine import cpu, has_half

REPOSITORY = Path(__file__).parents[1]
KEPT = "kept"
FRAMES = 12  # lines of a helper's last words
Fact = dict[str, Any]  # "what"; "passed" where it is a check; "skipped" or "error" where it is not known; and figures


@dataclass(frozen=True)
class Part:
    """`run` is MODULE:FUNCTION; the function takes a Run and `arguments`, and yields facts.

    `needs`: seconds that must be left for the part to be worth beginning. `limit`: seconds after which it is ended. `own`: it
    runs in a process of its own, because it leaves the process in another state than it found it.
    """

    name: str
    run: str
    needs: float
    limit: float
    own: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """What every part is told. `tiny`: models and jobs of seconds, to try the script; `deadline`: of the part, as
    `time.monotonic()` counts."""

    device: str
    out: Path
    work: Path
    tiny: bool
    deadline: float = float("inf")
    requests: Path | None = None  # of the job; None: made up
    images: int = 1063  # of the job

    @property
    def cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def low(self) -> str:
        """The precision that is the fast one on this device: a lower one where the hardware computes in it."""
        if self.cuda:
            return "fp16"
        return "bf16" if has_half(cpu(), "bf16") else "fp32"

    @property
    def kept(self) -> Path:
        """What one part makes for the others."""
        return self.out / KEPT

    @property
    def left(self) -> float:
        """Seconds until the part is ended."""
        return self.deadline - time.monotonic()


@contextmanager
def kept_for_all_parts(out: Path) -> Iterator[None]:
    """The folder `Run.kept` is empty when the block begins, and gone afterwards."""
    kept = out / KEPT
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    try:
        yield
    finally:
        shutil.rmtree(kept, ignore_errors=True)


class Sink(Protocol):
    """What facts go to."""

    def put(self, part: str, fact: Fact) -> None: ...


@dataclass
class Record:
    """All facts, in order; each is a JSON line of `file` and of stdout at once, with the seconds since the beginning."""

    file: Path
    facts: list[Fact] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def put(self, part: str, fact: Fact) -> None:
        whole = {"t": round(time.monotonic() - self.began, 1), "part": part, **fact}
        self.facts.append(whole)
        line = json.dumps(whole)
        print(line, flush=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def run_parts(parts: Sequence[Part], run: Run, sink: Sink, deadline: float) -> None:
    """Every part in order, as far as the time until `deadline` (`time.monotonic()`) goes; its last fact is what it took."""
    helper: Helper | None = None
    try:
        for part in parts:
            left = deadline - time.monotonic()
            if left < part.needs:
                sink.put(part.name, {"what": "the part", "skipped": f"needs {part.needs:.0f} s, {left:.0f} s are left"})
                continue
            if helper is not None and part.own:
                helper.close()
                helper = None
            helper = helper or Helper()
            start = time.monotonic()
            for fact in helper.facts(part, run, min(part.limit, left)):
                sink.put(part.name, fact)
            if part.own or not helper.healthy:
                helper.close()
                helper = None
            sink.put(part.name, {"what": "the part took", "seconds": round(time.monotonic() - start, 1)})
    finally:
        if helper is not None:
            helper.close()


class Helper:
    """A process that runs parts, with everything that it starts in a process group of its own."""

    def __init__(self) -> None:
        self.healthy = True
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 what packages print, and where it hangs
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.part_worker"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def facts(self, part: Part, run: Run, seconds: float) -> Iterator[Fact]:
        """What the part finds. An ended process, or one that was ended after `seconds`, is its last fact."""
        assert self._process.stdin is not None
        end = time.monotonic() + seconds
        given = asdict(run) | {"deadline": None, "out": str(run.out), "work": str(run.work)}
        given["requests"] = str(run.requests) if run.requests else None
        request = {"run": part.run, "arguments": dict(part.arguments), "given": given, "seconds": seconds}
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            yield self._ended()
            return
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                yield self._too_long(seconds)
                return
            if line is None or not line.endswith("\n"):  # it ended, perhaps within a line
                yield self._ended()
                return
            fact = json.loads(line)
            if fact == {"done": True}:
                return
            self.healthy = self.healthy and "error" not in fact
            yield fact

    def close(self) -> None:
        """End the process and what it started."""
        assert self._process.stdin is not None
        if self.healthy and self._process.poll() is None:
            self._process.stdin.close()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self.healthy = False
        self._kill()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def _too_long(self, seconds: float) -> Fact:
        """End a part that is still busy, after asking where; the answer comes even from within a call into C."""
        self.healthy = False
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
        frames = self._said()
        self._kill()
        return failure("limit", "TimeLimit", f"ended after {seconds:.0f} s, while it did what `frames` say", frames)

    def _ended(self) -> Fact:
        self.healthy = False
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return failure("process", "ProcessEnded", f"the process ended with {how}", self._said())

    def _said(self) -> list[str]:
        """Where it was, innermost call first, if faulthandler wrote that into the log; else the log's last lines."""
        self._log.seek(0)
        lines = [line.strip()[:300] for line in self._log.read().splitlines() if line.strip()]
        stacks = [i for i, line in enumerate(lines) if "most recent call first" in line]
        return lines[max(0, stacks[-1] - 1) :][:FRAMES] if stacks else lines[-FRAMES:]

    def _kill(self) -> None:
        """End the whole group, a compiler that outlived the part among it."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            print(
                f"process {self._process.pid} does not end: a driver call that cannot be interrupted", file=sys.stderr
            )


def failure(what: str, kind: str, message: str, frames: Sequence[str]) -> Fact:
    """The fact that something could not be found out."""
    return {"what": what, "passed": False, "error": {"type": kind, "message": message[:500], "frames": list(frames)}}
