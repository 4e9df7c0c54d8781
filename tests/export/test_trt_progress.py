"""A TensorRT build shows how far it is, and can be stopped."""

from __future__ import annotations

import io
import signal
import sys
import threading
from typing import Any

import pytest
import tensorrt_double as double

from export.trt_progress import LINE_SECONDS, Progress, cancelled_by_ctrl_c


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drive(progress: Progress, seconds: float = 0.0, clock: list[float] | None = None) -> list[float]:
    """Two steps, the first of four parts, through the monitor that TensorRT gets -> the fraction after each part."""
    monitor: Any = progress.monitor(double)
    monitor.phase_start("Building", None, 2)
    monitor.phase_start("Timing", "Building", 4)
    found = []
    for step in range(4):
        if clock is not None:
            clock[0] += seconds
        assert monitor.step_complete("Timing", step)
        found.append(progress.fraction())
    monitor.phase_finish("Timing")
    assert monitor.step_complete("Building", 0)
    found.append(progress.fraction())
    monitor.phase_finish("Building")
    return found


def test_a_phase_inside_another_counts_as_its_share_of_one_step():
    assert drive(Progress("unet", print)) == [0.125, 0.25, 0.375, 0.5, 0.5]


def test_without_a_terminal_there_is_a_line_a_minute(monkeypatch):
    clock = [0.0]
    lines: list[str] = []
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress("unet, batch 8, fp16", lines.append, lambda: clock[0]) as progress:
        drive(progress, LINE_SECONDS / 2, clock)
    assert lines == [
        "unet, batch 8, fp16: 25% after 60 s (Timing)",
        "unet, batch 8, fp16: 50% after 120 s (Timing)",
    ]
    assert stderr.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_the_time_and_no_lines(monkeypatch):
    lines: list[str] = []
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    with Progress("unet, batch 8, fp16", lines.append) as progress:
        drive(progress)
    assert "unet, batch 8, fp16:  50%|" in stderr.getvalue()
    assert "00:00" in stderr.getvalue()
    assert lines == []


def test_a_cancelled_build_is_stopped_at_its_next_step():
    progress = Progress("unet", print)
    monitor = progress.monitor(double)
    monitor.phase_start("Building", None, 2)
    assert monitor.step_complete("Building", 0) is True
    progress.cancel()
    assert monitor.step_complete("Building", 1) is False


def test_phases_that_were_never_announced_do_no_harm():
    progress = Progress("unet", print)
    assert progress.step("elsewhere", 3)
    progress.finish("elsewhere")
    assert progress.fraction() == 0.0


def test_the_first_ctrl_c_cancels_and_the_second_interrupts():
    progress = Progress("unet", print)
    before = signal.getsignal(signal.SIGINT)
    with cancelled_by_ctrl_c(progress):
        signal.raise_signal(signal.SIGINT)
        assert progress.cancelled
        assert not progress.step("Timing", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL], ids=["nohup", "default"])
def test_a_process_that_does_not_raise_at_ctrl_c_keeps_its_way(handler):
    before = signal.signal(signal.SIGINT, handler)
    try:
        with cancelled_by_ctrl_c(Progress("unet", print)):
            assert signal.getsignal(signal.SIGINT) == handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_handlers_stay_as_they_are():
    before, found = signal.getsignal(signal.SIGINT), []

    def build() -> None:
        with cancelled_by_ctrl_c(Progress("unet", print)):
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=build)
    thread.start()
    thread.join()
    assert found == [before]
