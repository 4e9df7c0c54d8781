"""The process that runs the parts of benchmarks/parts.py: a request per line on stdin, facts as JSON lines on stdout."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from benchmarks.parts import Fact, Run, failure

FRAMES = 4


def facts_of(request: Mapping[str, Any]) -> Iterator[Fact]:
    """The facts of one part; what it raises is its last one."""
    given, requests = request["given"], request["given"]["requests"]
    places = {name: Path(given[name]) for name in ("out", "work")}
    deadline = time.monotonic() + request["seconds"]
    run = Run(**given | places | {"deadline": deadline, "requests": Path(requests) if requests else None})
    module, _, name = request["run"].partition(":")
    try:
        yield from getattr(importlib.import_module(module), name)(run, **request["arguments"])
    except Exception as error:  # whatever it is, it is what this part found, and the others still run
        yield raised("the part", error)


def raised(what: str, error: BaseException) -> Fact:
    """An exception as a fact: type, message, and the frames that it came through last."""
    frames = [f"{f.filename}:{f.lineno} {f.name}: {f.line}" for f in traceback.extract_tb(error.__traceback__)]
    return failure(what, type(error).__name__, " ".join(str(error).split()), frames[-FRAMES:])


def serve(requests: TextIO, answers: TextIO) -> None:
    for line in requests:
        for fact in facts_of(json.loads(line)):
            print(json.dumps(fact, default=float), file=answers, flush=True)
        print(json.dumps({"done": True}), file=answers, flush=True)


if __name__ == "__main__":
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no fact
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=False)  # says where it hangs, from C too
    serve(sys.stdin, stream)
