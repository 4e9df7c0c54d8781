"""Progress of a TensorRT build: a bar on a terminal, elsewhere a line a minute; and the way to stop the build."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from fastgen.errors import Say

LINE_SECONDS = 60.0  # between lines where there is no terminal


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Progress:
    """Collects what TensorRT reports, from its own threads, of its build's phases, which nest."""

    def __init__(self, what: str, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._say, self._clock = what, say, clock
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()
        self.cancelled = False
        self._start = self._last_line = clock()
        self._bar: Any = None

    def monitor(self, trt: Any) -> Any:
        """The trt.IProgressMonitor that reports to this object."""
        progress = self

        class Monitor(trt.IProgressMonitor):
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)  # pybind11 insists

            def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
                progress.start(phase_name, parent_phase, num_steps)

            def step_complete(self, phase_name: str, step: int) -> bool:
                return progress.step(phase_name, step)

            def phase_finish(self, phase_name: str) -> None:
                progress.finish(phase_name)

        return Monitor()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            shape = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
            self._bar = tqdm(total=100, desc=self._what, bar_format=shape, file=sys.stderr, leave=False)
        return self

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.close()

    def cancel(self) -> None:
        """Stop the build at its next step."""
        self.cancelled = True

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[phase] = _Phase(parent or None, max(steps, 1))

    def step(self, phase: str, step: int) -> bool:
        """Step number `step`, from 0, of a phase is complete; False stops the build."""
        with self._lock:
            if phase in self._phases:
                self._phases[phase].done = step + 1
            self._show(phase)
        return not self.cancelled

    def finish(self, phase: str) -> None:
        with self._lock:
            self._phases.pop(phase, None)

    def fraction(self, parent: str | None = None) -> float:
        """The share, 0 to 1, of the phases inside `parent` (None: of the whole build) that is complete."""
        inside = [(name, phase) for name, phase in self._phases.items() if phase.parent == parent]
        return max((min(1.0, (phase.done + self.fraction(name)) / phase.steps) for name, phase in inside), default=0.0)

    def _show(self, phase: str) -> None:
        percent, now = 100 * self.fraction(), self._clock()
        if self._bar is not None:
            self._bar.n = percent
            self._bar.refresh()
        elif now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            self._say(f"{self._what}: {percent:.0f}% after {now - self._start:.0f} s ({phase})")


@contextmanager
def cancelled_by_ctrl_c(progress: Progress) -> Iterator[None]:
    """Inside, the first Ctrl-C cancels the build and raises nothing, so that the thread of the build is always awaited. The
    second one goes to the handler from before. Nothing changes outside the main thread, which alone gets signals, nor where
    the process ignores Ctrl-C or handles it in C."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def cancel(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        progress.cancel()

    signal.signal(signal.SIGINT, cancel)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
