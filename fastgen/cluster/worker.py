"""What runs on a machine of the cluster: a model on an engine, which makes the pictures of fixed batches as PNG files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.cluster.environment import environment_of, node_fields
from fastgen.cluster.shipping import Shipment, unpack
from fastgen.engines.batches import Batch
from fastgen.errors import FastgenError, Say, first_line
from fastgen.files.png import png_bytes
from fastgen.generate.decoder import Pictures
from fastgen.generate.job_record import Environment, Limits
from fastgen.generate.recipe import Recipe
from fastgen.generate.record import job_identity, manifest_line
from fastgen.generate.run import Run
from fastgen.generate.work import Files, JobPlan, plan_of

if TYPE_CHECKING:
    from fastgen.generate.pipeline import Pipeline
    from fastgen.generate.runner import ModelRunner
    from fastgen.generate.start import StartSource
    from fastgen.models.lora import Lora

KEPT = 4  # runs whose solver table and conditions stay in memory


@dataclass(frozen=True)
class WorkerOptions:
    """A model, and the arguments of `fastgen.load`. `model`, `rag` and `loras`: paths on the worker's machine, or shipments.
    `check`: is called with the loaded model; it raises FastgenError for one that must not be used. `mixed`: manifest lines
    record the worker's environment."""

    model: Path | Shipment
    engine: str | None = None
    load: Mapping[str, Any] = field(default_factory=dict)
    loras: Sequence[tuple[Lora, Path | Shipment]] | None = None
    rag: Path | Shipment | None = None
    check: Callable[[ModelRunner, Say], None] | None = None
    mixed: bool = False


@dataclass(frozen=True)
class Opened:
    """A worker that is ready. `said`: lines for the user."""

    environment: Environment
    said: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """Why a worker cannot do its work; `exit_code`: of the error."""

    text: str
    exit_code: int


@dataclass(frozen=True)
class OutOfMemory:
    """Memory ran out with a batch; `text`: the engine's words."""

    text: str


class Worker:
    """A model on an engine. `get`: reads a block of a shipment, or a recipe, from its reference.

    Two threads may call `make`: one samples while the pictures of the other are compressed, and on a GPU decoded.
    """

    def __init__(self, get: Callable[[Any], Any]) -> None:
        self._get, self._lock = get, threading.Lock()
        self._runs: OrderedDict[str, tuple[Run, dict[str, Any] | None]] = OrderedDict()
        self._pipeline: Pipeline | None = None
        self._source: StartSource | None = None
        self._environment: dict[str, str] = {}
        self._mixed = False

    def open(self, options: WorkerOptions) -> Opened | Refused:
        """Load the model."""
        said: list[str] = []
        try:
            self._open(options, said.append)
        except FastgenError as error:
            return Refused(" ".join([*said, str(error)]), error.exit_code)
        return Opened(self._environment, tuple(said))

    def _open(self, options: WorkerOptions, say: Say) -> None:
        from fastgen.generate.pipeline import load
        from fastgen.retrieval.index import open_index

        arguments = dict(options.load)
        if options.loras is not None:
            arguments["loras"] = [replace(lora, file=self._path(place)) for lora, place in options.loras]
        self._pipeline = load(self._path(options.model), options.engine, **arguments)
        if options.check is not None:
            options.check(self._pipeline, say)
        self._source = None if options.rag is None else open_index(self._path(options.rag))
        self._environment, self._mixed = environment_of(self._pipeline), options.mixed

    def _path(self, place: Path | Shipment) -> Path:
        return unpack(place, self._get) if isinstance(place, Shipment) else place

    def plan(
        self, key: str, recipe: Sequence[Any], batch_size: int | None, recorded: Limits | None
    ) -> JobPlan | Refused | OutOfMemory:
        """The plan of the run that is called `key`. `recipe`: a list of one reference to its `Recipe`."""
        try:
            with self._lock:
                plan = plan_of(self._run(key, recipe)[0], batch_size, recorded)
        except FastgenError as error:
            return Refused(str(error), error.exit_code)
        if not self._mixed:
            return replace(plan, environment=self._environment)
        return replace(plan, identity=plan.identity | {"mixed": True}, mixed=True)

    def make(self, key: str, recipe: Sequence[Any], batch: Batch, limits: Limits) -> Files | Refused | OutOfMemory:
        """The pictures of one batch, of a plan with these limits."""
        assert self._pipeline is not None
        try:
            with self._lock:
                run, identity = self._identified(key, recipe, limits)
                wait = run.begin(batch, decode_batch_size=limits.decode)
            pictures = wait()
        except FastgenError as error:
            return Refused(str(error), error.exit_code)
        except Exception as error:
            if not self._pipeline.engine.is_out_of_memory(error):
                raise
            text = first_line(error)  # the error itself keeps the tensors of the failed batch alive
        else:
            return self._files(run, batch, pictures, identity)
        with self._lock:
            self._pipeline.free_memory()
        return OutOfMemory(text)

    def _run(self, key: str, recipe: Sequence[Any]) -> tuple[Run, dict[str, Any] | None]:
        if key not in self._runs:
            assert self._pipeline is not None
            found: Recipe = self._get(recipe[0])
            self._runs[key] = found.run(self._pipeline, self._source), None
            while len(self._runs) > KEPT:
                self._runs.popitem(last=False)
        self._runs.move_to_end(key)
        return self._runs[key]

    def _identified(self, key: str, recipe: Sequence[Any], limits: Limits) -> tuple[Run, dict[str, Any]]:
        """A run, and its job's identity."""
        run, identity = self._run(key, recipe)
        if identity is None:
            identity = job_identity(run, limits.batch)
            self._runs[key] = run, identity
        return run, identity

    def _files(self, run: Run, batch: Batch, pictures: Pictures, identity: dict[str, Any]) -> Files:
        fields = node_fields(self._environment) if self._mixed else {}
        lines = [manifest_line(run, request, identity) | fields for request in run.requests[batch.rows]]
        problems = [str(problem) if problem else None for problem in pictures.problems]
        images = [
            None if problem else png_bytes(pixels, line)
            for pixels, line, problem in zip(pictures.pixels, lines, problems, strict=True)
        ]
        strips: list[bytes | None] | None = None
        if run.strip is not None and pictures.strips is not None:
            shown = {"strip": run.strip.to_json()}
            strips = [
                None if problem else png_bytes(strip, line | shown)
                for strip, line, problem in zip(pictures.strips, lines, problems, strict=True)
            ]
        return Files(images, problems, strips, fields or None)
