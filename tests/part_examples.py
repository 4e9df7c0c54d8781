"""Parts of a measurement that behave badly, for tests/benchmarks/test_parts.py. They run in the helper process of
benchmarks/parts.py."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path


def fine(run, value=1):
    yield {"what": "first", "passed": True, "process": os.getpid(), "value": value}
    print("this is no fact")
    yield {"what": "second", "passed": False, "left": run.left}


def raising(run):
    yield {"what": "before"}
    raise ValueError("of two\nlines")


def sleeping(run):
    yield {"what": "before"}
    time.sleep(60)


def holding(run):
    """In C, with Python's lock: neither an alarm nor a thread of Python's gets through."""
    yield {"what": "before"}
    ctypes.PyDLL(None).sleep(60)


def crashing(run):
    yield {"what": "before"}
    ctypes.string_at(0)


def leaving(run):
    yield {"what": "before"}
    os._exit(3)


def starting(run):
    """Hangs beside a process that it started."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Path(run.out, "child").write_text(str(child.pid))
    yield {"what": "before"}
    child.wait()
