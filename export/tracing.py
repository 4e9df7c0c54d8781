"""Tracing a model's networks to ONNX: in this process, or, of a large model, in others beside it.

torch's exporter is Python code that uses one core, for a minute where the UNet has 100 M parameters. The reference and the
solver tables do not need the graphs, so they are made at the same time.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.engines.machine import cpu
from fastgen.errors import FastgenError, InputError, Say
from fastgen.models.bundle import graph_name

if TYPE_CHECKING:
    from fastgen.models.folder import Model

LARGE = 2**27  # bytes of weights: a smaller model is traced in less time than a process takes to import torch
COPIES = 3  # of the weights that are in memory while a process traces a model
CHILD = "import sys; sys.path[:] = sys.argv[1:]; from export.tracing import main; main()"
FAILED, OTHER_WEIGHTS = 3, 4  # exit codes: the model cannot be exported; the folder has other weights by now
ERRORS = {error.__name__: error for error in (InputError, FastgenError)}


@dataclass(frozen=True)
class Trace:
    """One graph to write: of a network, in a precision."""

    network: str
    dtype: str


@dataclass(frozen=True)
class Source:
    """What `load_model` makes a model of: a folder, and further arguments."""

    folder: Path
    how: Mapping[str, Any]

    def load(self) -> Model:
        from fastgen.models.folder import load_model

        return load_model(self.folder, **self.how)


@dataclass(frozen=True)
class Order:
    """What a process is told: the traces of a model, whose weights have the hash `sha256`, for the bundle `out`."""

    source: Source
    sha256: str
    traces: Sequence[Trace]
    out: Path


def trace(model: Model, traces: Sequence[Trace], out: Path) -> None:
    """Write graphs into the bundle `out`, one after another. Raises what `export_onnx` raises."""
    from export.onnx import export_onnx

    networks = model.networks()
    for one in traces:
        signature = model.spec.signatures[one.network]
        export_onnx(networks[one.network], signature, out / graph_name(one.network, one.dtype), one.dtype)


class Tracing(AbstractContextManager["Tracing"]):
    """Other processes write graphs while the block runs. Inside it call `run_here`, then `finish`.

    If a process was killed, or found other weights in the folder, `finish` writes its graphs in this process.
    """

    def __init__(self, model: Model, source: Source, traces: Sequence[Trace], out: Path, say: Say) -> None:
        self._model, self._source, self._out, self._say = model, source, out, say
        self._here = list(traces)
        self._processes: list[_Process] = []

    def __enter__(self) -> Tracing:
        networks, machine = len({one.network for one in self._here}), cpu()
        count = processes(_weights_bytes(self._model), networks, machine.cores, machine.memory_free)
        try:
            for share in _shares(self._model, self._here, count) if count else ():
                self._start(share)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self, share: Sequence[Trace]) -> None:
        try:
            self._processes.append(_Process(Order(self._source, self._model.spec.sha256, share, self._out)))
        except OSError:  # the system has no room for another process
            return
        for one in share:
            self._here.remove(one)
            self._say_begins(one)

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()

    def run_here(self) -> None:
        """Write the graphs that no other process writes. Raises InputError or FastgenError for what cannot be exported."""
        for one in self._here:
            self._say_begins(one)
            trace(self._model, [one], self._out)

    def finish(self) -> None:
        """Wait for the other processes. Raises InputError or FastgenError for what cannot be exported."""
        for process in self._processes:
            if (reason := process.wait()) is not None:
                names = ", ".join(one.network for one in process.order.traces)
                self._say(f"exporting {names} here, as {reason}")
                trace(self._model, process.order.traces, self._out)

    def _say_begins(self, one: Trace) -> None:
        self._say(f"exporting {one.network}" + ("" if one.dtype == "fp32" else f" in {one.dtype}"))


def processes(weights: int, networks: int, cores: int, memory_free: int | None) -> int:
    """How many processes trace a model of so many bytes: one for every two cores, as far as memory allows; 0: none pays."""
    if weights < LARGE or cores < 2 or memory_free is None:
        return 0
    return max(0, min(networks, cores // 2, memory_free // (COPIES * weights) - 1))


def _shares(model: Model, traces: Sequence[Trace], count: int) -> list[list[Trace]]:
    """The traces of each process: the largest network goes to whoever has least."""
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in model.networks().items()}
    shares: list[list[Trace]] = [[] for _ in range(count)]
    for one in sorted(traces, key=lambda one: -parameters[one.network]):
        min(shares, key=lambda share: sum(parameters[other.network] for other in share)).append(one)
    return [share for share in shares if share]


def _weights_bytes(model: Model) -> int:
    """Of all networks, of which two may share an autoencoder."""
    parameters = {id(p): p for network in model.networks().values() for p in network.parameters()}
    return sum(p.numel() * p.element_size() for p in parameters.values())


class _Process:
    """A process that traces. It ends when this one does, for it watches its standard input."""

    def __init__(self, order: Order) -> None:
        self.order, message = order, pickle.dumps(order)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", CHILD, *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except BrokenPipeError:  # it ended at once: `wait` says how
            pass

    def wait(self) -> str | None:
        """None where all graphs are there, else why the process did not write them. Raises what it raised."""
        assert self._process.stdout is not None
        last = self._process.stdout.read().strip().rpartition(b"\n")[2]
        code = self._process.wait()
        if code == 0:
            return None
        if code == OTHER_WEIGHTS:
            return "the folder has changed"
        if code == FAILED:
            name, text = json.loads(last)
            raise ERRORS[name](text)
        return f"the process that did it ended with {f'signal {-code}' if code < 0 else f'exit code {code}'}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not written to a process that has ended
                pipe.close()


def main() -> None:
    """Execute the pickled `Order` on standard input. An error is a line of JSON, its class and its text, on standard output."""
    order: Order = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        model = order.source.load()
    except FastgenError:  # it could be loaded a moment ago
        raise SystemExit(OTHER_WEIGHTS) from None
    if model.spec.sha256 != order.sha256:
        raise SystemExit(OTHER_WEIGHTS)
    try:
        trace(model, order.traces, order.out)
    except FastgenError as error:
        kind = InputError if isinstance(error, InputError) else FastgenError
        print(json.dumps([kind.__name__, str(error)]), flush=True)
        raise SystemExit(FAILED) from None


def _end_with_parent() -> None:
    """Standard input ends when the other process does. It is read without Python's buffer, whose lock would be held at exit."""
    os.read(0, 1)
    os._exit(1)
