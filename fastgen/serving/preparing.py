"""From a task to a run: its request, settings, solver table and conditions; the latter two are kept for the next tasks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastgen.errors import InputError
from fastgen.generate.conditions import Conditions
from fastgen.generate.job_input import default_name
from fastgen.generate.record import job_identity, manifest_line
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.settings import Settings
from fastgen.generate.start import Start, late_start
from fastgen.models.bundle import TABLES, Bundle
from fastgen.sampling.tables import parse_key
from fastgen.serving.messages import ImageTask

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner
    from fastgen.retrieval.index import Index
    from fastgen.sampling.tables import SolverTable

KEPT_TABLES, KEPT_CONDITIONS = 256, 64
T = TypeVar("T")
PARAMS = (  # a field of the request -> words by which an error of the model's own checks names it
    ("prompt", ("; this model takes",)),
    ("guidance_interval", ("guidance_interval",)),
    ("guidance_scale", ("guidance_scale", "guidance scale", "cannot be guided")),
    ("num_inference_steps", ("num_inference_steps", "steps", "noise steps")),
    ("scheduler", ("scheduler", "solver")),
    ("labels", ("label", "class", "labels")),
    ("rag", ("index", "rag")),
    ("prompt", ("prompt",)),
)


class Refusal(InputError):
    """A task that this model does not take. `param`: the field of the request."""

    def __init__(self, message: str, param: str | None) -> None:
        super().__init__(message)
        self.param = param


class Preparer:
    """Makes runs of tasks. Solver tables are read or compiled on a thread: diffusers takes seconds to import."""

    def __init__(self, pipeline: ModelRunner, rag: Path | None = None) -> None:
        self._pipeline = pipeline
        self._index: Index | None = None
        if rag is not None:
            from fastgen.retrieval.index import open_index

            self._index = open_index(rag)
        self._tables: OrderedDict[str, Future[SolverTable]] = OrderedDict()
        self._conditions: OrderedDict[Hashable, Conditions] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="solver-tables")

    @property
    def has_index(self) -> bool:
        return self._index is not None

    def settings(self, task: ImageTask) -> Settings:
        """How a task's image is sampled. Raises Refusal."""
        try:
            settings = self._full(task)
            return settings.late(task.noise_steps, task.strength) if task.rag else settings
        except InputError as error:
            raise self.refusal(error, task) from None

    def _full(self, task: ImageTask) -> Settings:
        """The settings of a run from noise."""
        return self._pipeline.settings(
            scheduler=task.scheduler,
            num_inference_steps=task.num_inference_steps,
            guidance_scale=task.guidance_scale,
            guidance_interval=task.guidance_interval,
            seed=task.seed,
            normalize=task.normalize,
        )

    def table(self, task: ImageTask) -> Future[SolverTable]:
        """The solver table of a task, which may take a while. Raises Refusal; the future raises InputError."""
        key = self.settings(task).solver
        return _kept(self._tables, key, KEPT_TABLES, lambda: self._thread.submit(self._pipeline.source.table, key))

    def run(self, task: ImageTask, table: SolverTable) -> Run:
        """The run of one task, whose table is at hand. Raises Refusal."""
        text = task.prompt if task.prompt is not None else ", ".join(task.labels or ())
        try:
            name = f"{default_name(text, task.seed)}.png"
            request = Request("0", name, task.prompt, task.labels, task.seed)
            settings, start = self._start(task, request)
            conditions = self._conditions_of(request, settings)
            return Run(self._pipeline, [request], settings, start, table=table, conditions=conditions)
        except InputError as error:
            raise self.refusal(error, task) from None

    def refusal(self, error: InputError, task: ImageTask) -> Refusal:
        """The error of a model's own checks for a client: with the request's field that it is about, and without the path of
        the model."""
        if isinstance(error, Refusal):
            return error
        source, text = self._pipeline.source, str(error)
        if isinstance(source, Bundle) and "is not stored" in text:
            stored = {parse_key(key)[0] for key in source.solver_keys()}
            name = task.scheduler or self._pipeline.spec.sampling.scheduler
            return Refusal(
                text.replace(f" in {source.folder / TABLES}", ""),
                "num_inference_steps" if name in stored else "scheduler",
            )
        text = text.replace(f"{source.folder}/", "") if source.folder is not None else text
        words = text.lower()
        return Refusal(text, next((param for param, signs in PARAMS if any(s in words for s in signs)), None))

    def _start(self, task: ImageTask, request: Request) -> tuple[Settings, Start | None]:
        settings = self._full(task)
        if not task.rag:
            return settings, None
        if self._index is None:
            raise InputError("rag: this server has no index; start it with --rag INDEX")
        late: dict[str, Any] = {"noise_steps": task.noise_steps, "strength": task.strength, "rag_top_k": task.rag_top_k}
        return late_start(self._index, self._pipeline, [request], settings, **late)

    def _conditions_of(self, request: Request, settings: Settings) -> Conditions:
        def make() -> Conditions:
            pipeline = self._pipeline
            return Conditions(
                pipeline.engine, pipeline.spec.condition, pipeline.tokenizers, [request], settings.guidance_scale
            )

        embedded = settings.guidance_scale if self._pipeline.spec.condition.guidance_width else settings.guided
        key = request.prompt, request.labels, embedded
        return _kept(self._conditions, key, KEPT_CONDITIONS, make)


def metadata_of(run: Run) -> dict[str, Any]:
    """The manifest line of a run's only image, as `fastgen generate` writes it for this image alone."""
    return manifest_line(run, run.requests[0], job_identity(run, 1))


def _kept(store: OrderedDict[Any, T], key: Any, most: int, make: Callable[[], T]) -> T:
    """The value under `key`, made if it is not there; the oldest go where there are too many."""
    if key not in store:
        store[key] = make()
        while len(store) > most:
            store.popitem(last=False)
    store.move_to_end(key)
    return store[key]
