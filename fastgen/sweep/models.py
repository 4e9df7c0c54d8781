"""The model of a sweep, checkpoint by checkpoint: in this process, or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastgen.cluster.work import PoolWork
from fastgen.files.jsonfiles import located
from fastgen.files.store import Folder
from fastgen.generate.job_record import check_same_job, recorded_limits
from fastgen.generate.local_work import LocalWork
from fastgen.generate.pipeline import Pipeline, load, load_source
from fastgen.generate.recipe import Recipe
from fastgen.generate.record import job_identity
from fastgen.generate.work import Work, limits_of
from fastgen.models.bundle import is_bundle, read_bundle
from fastgen.models.checkpoint_choice import check_bundle_of, choose_checkpoint
from fastgen.retrieval.index import Index

if TYPE_CHECKING:
    from fastgen.cluster.pool import Pool
    from fastgen.models.spec import Source


class SweptModel(Protocol):
    """A checkpoint's model, ready to work. `together`: how many jobs run at the same time."""

    source: Source
    together: int

    def work(self, recipe: Recipe) -> Work:
        """The work of one job."""

    def check_folder(self, recipe: Recipe, folder: Path, batch_size: int | None) -> None:
        """InputError where a job's folder holds another job than this recipe's."""

    def close(self) -> None:
        """Free its memory."""


class Loader(Protocol):
    """Loads the checkpoints of a sweep's model, one after the other."""

    @property
    def folder(self) -> Path:
        """The bundle, or the model folder."""

    def load(self, checkpoint: str | None, index: Index | None) -> SweptModel:
        """The model of a checkpoint; `index`: of late starts. Raises what `fastgen.load` raises."""


@dataclass(frozen=True)
class LocalLoader:
    """A bundle or a model folder, its engine, and the other options of `fastgen.load`; `check` sees every pipeline once, and
    may raise."""

    folder: Path
    engine: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    check: Callable[[Pipeline], None] = lambda pipeline: None

    def load(self, checkpoint: str | None, index: Index | None) -> LocalModel:
        """See `Loader.load`."""
        pipeline = load(self.folder, self.engine, checkpoint=checkpoint, **self.options)
        self.check(pipeline)
        return LocalModel(pipeline, index)


class LocalModel:
    """A `SweptModel` in this process."""

    together = 1

    def __init__(self, pipeline: Pipeline, index: Index | None) -> None:
        self._pipeline, self._index, self.source = pipeline, index, pipeline.source

    def work(self, recipe: Recipe) -> Work:
        """See `SweptModel.work`."""
        return LocalWork(recipe.run(self._pipeline, self._index))

    def check_folder(self, recipe: Recipe, folder: Path, batch_size: int | None) -> None:
        """See `SweptModel.check_folder`."""
        run, store, pipeline = recipe.run(self._pipeline, self._index), Folder(folder), self._pipeline
        identity = job_identity(run, limits_of(run, batch_size, recorded_limits(store)).batch)
        before, any_size = pipeline.spec.bundle_extends, pipeline.engine.batch_invariant
        check_same_job(store, identity, any_batch_size=any_size, extends=before)

    def close(self) -> None:
        """See `SweptModel.close`."""
        self._pipeline.free_memory()


@dataclass(frozen=True)
class PoolLoader:
    """The same on a cluster. `open_pool(checkpoint)`: workers with that checkpoint, for the time of a block."""

    folder: Path
    open_pool: Callable[[str | None], AbstractContextManager[Pool]]
    options: Mapping[str, Any] = field(default_factory=dict)

    def load(self, checkpoint: str | None, index: Index | None) -> PoolModel:
        """See `Loader.load`; the workers have the index."""
        return PoolModel(load_source(self.folder, checkpoint, **self.options), self.open_pool(checkpoint))


class PoolModel:
    """A `SweptModel` on the workers of a pool, which share the batches of several jobs."""

    together = 3  # so that no worker waits while a job ends and the next one begins

    def __init__(self, source: Source, pool: AbstractContextManager[Pool]) -> None:
        self.source, self._stack = source, ExitStack()
        self._pool = self._stack.enter_context(pool)

    def work(self, recipe: Recipe) -> Work:
        """See `SweptModel.work`."""
        return PoolWork(self._pool, recipe)

    def check_folder(self, recipe: Recipe, folder: Path, batch_size: int | None) -> None:
        """See `SweptModel.check_folder`."""
        store = Folder(folder)
        plan = self.work(recipe).plan(batch_size, recorded_limits(store))
        check_same_job(store, plan.identity, any_batch_size=plan.any_batch_size, extends=plan.extends)

    def close(self) -> None:
        """See `SweptModel.close`."""
        self._stack.close()


def weights_of(folder: Path, checkpoint: str | None) -> str | None:
    """The label of a checkpoint, such as best@115, without loading it. Raises InputError when there is none."""
    if checkpoint is None:
        return None
    with located(f"--checkpoint {checkpoint}"):
        if not is_bundle(folder):
            return choose_checkpoint(folder, checkpoint).label
        label = read_bundle(folder).spec.checkpoint
        check_bundle_of(folder, label, checkpoint)
        return label
