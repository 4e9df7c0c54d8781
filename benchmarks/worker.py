"""A side in a process of its own, so that its memory and its packages are its own: JSON lines in, JSON lines out.

Imports nothing but the standard library and numpy here: optimum's environments hold no fastgen.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from benchmarks.memory import Meter

REPOSITORY = Path(__file__).parents[1]
RUNNERS = {
    "diffusers": "benchmarks.runners.diffusion",
    "diffusers-compile": "benchmarks.runners.diffusion",
    "two-calls": "benchmarks.runners.diffusion",
    "optimum-onnx": "benchmarks.runners.optimum",
    "optimum-intel": "benchmarks.runners.optimum",
}


class Local:
    """A side in this process. `call` takes and returns what travels as JSON between processes.

    {"do": "open", "name", "dtype", "channels_last", "graphs", "device", "threads", "model", "bundle", "work", ...}
        -> {"load_s", "build_s", "dtype", "versions", "note"}; build_s, what exporting took, is not part of load_s
    {"do": "generate", "batch", "steps", "count", "prompts" | "labels", "latents": file, "out": file or None}
        -> {"seconds", "peak_mib", "driver_mib"}; images (count, H, W, 3) uint8 go to `out`
    Either may answer {"error": one line}.
    """

    _runner: Any = None

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._open(request) if request["do"] == "open" else self._generate(request)
        except Exception as error:  # whatever another project's package raises becomes the row's reason
            return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}

    def close(self) -> None:
        """Let go of what is loaded."""
        self._runner = None
        gc.collect()
        if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_available():
            cuda.empty_cache()

    def _open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        start = time.perf_counter()
        self._meter = Meter(request["device"])
        self._meter.begin()
        module: Any = importlib.import_module(RUNNERS.get(request["name"], "benchmarks.runners.engine"))
        runner = self._runner = module.open_runner(request)
        load_s = time.perf_counter() - start
        self._meter.end()
        load_s -= getattr(runner, "exported_now_s", 0.0)
        facts = {name: getattr(runner, name) for name in ("build_s", "dtype", "versions", "note")}
        return {"load_s": load_s, **facts}

    def _generate(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._runner is not None
        latents = np.load(request["latents"])[: request["count"]]
        self._meter.begin()
        start = time.perf_counter()
        images = self._runner.generate(request, latents)
        seconds = time.perf_counter() - start
        memory = self._meter.end()
        if len(images) != request["count"]:
            raise RuntimeError(f"{len(images)} images for {request['count']} requests")
        if request["out"]:
            np.save(request["out"], images)
        return {"seconds": seconds, **memory}


class Process:
    """The same in a process of `python`, which may belong to another environment."""

    def __init__(self, python: str | Path = sys.executable, threads: int | None = None) -> None:
        environment = dict(os.environ)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 what packages print: told when the process dies
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self._process = subprocess.Popen(
            [str(python), "-m", "benchmarks.worker"],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(dict(request)) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            return {"error": f"the process ended with code {self._process.wait()}: {self._last_words()}"}
        return json.loads(line)

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing (out of memory?)"

    def close(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def _serve(requests: TextIO, answers: TextIO) -> None:
    side = Local()
    for line in requests:
        print(json.dumps(side.call(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    _serve(sys.stdin, stream)
