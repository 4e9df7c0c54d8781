"""Who makes a job's pictures: this process, or workers on other machines. A job asks for a plan, and then for the pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from fastgen.engines.batches import Batch
from fastgen.errors import Say
from fastgen.generate.decoder import Pictures
from fastgen.generate.estimate import automatic_batch_size, decode_batch_size
from fastgen.generate.job_record import Limits
from fastgen.generate.record import job_identity, manifest_line
from fastgen.generate.strips import StripPlan

if TYPE_CHECKING:
    from fastgen.generate.requests import Request
    from fastgen.generate.run import Run
    from fastgen.generate.writer import StepBar


@dataclass(frozen=True)
class JobPlan:
    """A job without its pictures, in plain values that can be sent to another process.

    `identity`: see `record.job_identity`. `lines`: of the manifest, one per request. `sizes`: the batch sizes that the engine
    has; None for any. `steps`: rows of the solver table. `truncated`: prompt -> its number of tokens. `extends`,
    `any_batch_size`: see `job_record.check_same_job`. `environment`: of the machines that make the pictures, see
    `cluster.environment`; None: it is not recorded. `mixed`: machines of several kinds make them.
    """

    identity: dict[str, Any]
    limits: Limits
    lines: list[dict[str, Any]]
    batches: list[Batch]
    sizes: Sequence[int] | None
    steps: int
    strip: StripPlan | None
    truncated: dict[str, int]
    extends: tuple[str, ...]
    any_batch_size: bool
    environment: dict[str, str] | None = None
    mixed: bool = False


@dataclass(frozen=True)
class Files:
    """The pictures of a batch as PNG files. `images`, `strips`: None for a picture that is broken; `problems`: why. `fields`:
    those of the manifest lines that differ from the plan's, where another kind of machine made the pictures."""

    images: Sequence[bytes | None]
    problems: Sequence[str | None]
    strips: Sequence[bytes | None] | None = None
    fields: Mapping[str, Any] | None = None


class Work(Protocol):
    """Makes the pictures of one job."""

    requests: Sequence[Request]
    writers: int  # threads that write files

    def plan(self, batch_size: int | None, recorded: Limits | None) -> JobPlan:
        """The job in batches of `batch_size`, else of the limits that its folder has `recorded`, else of what suits the engine
        and its memory. Raises InputError for a size that the engine lacks."""

    def pictures(
        self, plan: JobPlan, pending: Sequence[Batch], advance: StepBar, say: Say
    ) -> Iterator[tuple[Batch, Pictures | Files]]:
        """The pictures of the batches `pending`, each as soon as it is there: all requests of these batches, once each, but the
        batches may be smaller than asked for. Raises FastgenError."""


def plan_of(run: Run, batch_size: int | None, recorded: Limits | None) -> JobPlan:
    """The plan of a run, see `Work.plan`."""
    limits = limits_of(run, batch_size, recorded)
    batches = run.batches(limits.batch)
    identity = job_identity(run, limits.batch)
    return JobPlan(
        identity,
        limits,
        [manifest_line(run, request, identity) for request in run.requests],
        batches,
        run.pipeline.buckets(run.settings),
        len(run.table),
        run.strip,
        dict(run.conditions.truncated),
        tuple(run.pipeline.spec.bundle_extends),
        run.pipeline.engine.batch_invariant,
    )


def limits_of(run: Run, batch_size: int | None, recorded: Limits | None) -> Limits:
    """`batch_size`, else the recorded limits, else what suits the engine and its memory."""
    batch = batch_size or (recorded.batch if recorded else automatic_batch_size(run.pipeline, run.settings))
    return Limits(batch, recorded.decode if recorded and recorded.decode else decode_batch_size(run.pipeline))
