"""job.json: which job an output folder is of, the limits of its batches, and the timing of its runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from msgspec import Meta, structs

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, located
from fastgen.files.names import JOB
from fastgen.files.records import Count, Record
from fastgen.files.store import Store

HELP = "choose another --out"
MIXED = "mixed"  # field of a job whose images come from machines of several kinds
NODE_FIELDS = ("engine", "dtype", "device", "node")  # of a manifest line, which then differ from image to image
BUNDLE = "bundle_sha256"  # field of a job and of its lines: the digest of the bundle's record, where a bundle made the images

RunId = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
Environment = Mapping[str, str]  # of a machine of a cluster: field -> its value, see `cluster.environment`
Rows = Annotated[int, Meta(ge=1, le=1_000_000)]  # images in a batch


class Limits(Record, frozen=True):
    """Most images per batch, and per forward of the VAE decoder (None: not recorded, or no VAE). They may depend on the memory
    that was free, and the images' bytes depend on them: a job that is continued keeps both."""

    batch: Rows
    decode: Rows | None


class Timing(Record, frozen=True):
    """A run that finished: the images that it generated, its seconds, and the rows of its smallest batch."""

    images: Count
    seconds: Annotated[float, Meta(ge=0, le=1e9)]
    smallest_batch: Count = 0


class JobRecord(Record, frozen=True):
    """`job`: see `record.job_identity`. `limits`: None in records of older versions. `run_ids`: of those runs that have an id;
    a run is added once. `environment`: of the machines of a cluster that made the images, see `cluster.environment`."""

    job: dict[str, Any]
    runs: tuple[Timing, ...]
    limits: Limits | None = None
    run_ids: tuple[RunId, ...] = ()
    environment: dict[str, str] | None = None

    def of_job(self, job: dict[str, Any], runs: Mapping[str, Timing]) -> JobRecord:
        """This record with the identity `job`, and with those of the `runs` that it lacks."""
        new = {run: timing for run, timing in runs.items() if run not in self.run_ids}
        return structs.replace(self, job=job, runs=(*self.runs, *new.values()), run_ids=(*self.run_ids, *new))


def read_job(store: Store) -> JobRecord:
    """The record of a job. Raises InputError for another file."""
    try:
        return store.read_record(JOB, JobRecord)
    except InputError as error:
        raise InputError(f"{error}; is it the record of a fastgen job? else {HELP}") from None


def without_bundle(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A job's identity, or a manifest line, without the bundle's digest. Files may be added to a bundle while one of its jobs
    is stopped, and older versions recorded no digest: images are compared without it, and `check_same_job` compares it."""
    return {key: value for key, value in fields.items() if key != BUNDLE}


def check_same_job(
    store: Store, identity: Mapping[str, Any], *, any_batch_size: bool = False, extends: Collection[str] = ()
) -> None:
    """InputError when the job that `store` holds, if any, is another one. `any_batch_size`: it may run in other batches.
    `extends`: digests of the bundle before files were added to it."""
    if not store.exists(JOB):
        return
    job = read_job(store).job
    if job.get(MIXED) and not identity.get(MIXED):
        raise InputError(f"{store}: machines of several kinds made its images; continue it with --ray --allow-mixed")
    for key, value in identity.items():
        if key == BUNDLE and (job.get(key) is None or job[key] in extends):
            continue
        if identity.get(MIXED) and key in NODE_FIELDS:
            continue
        if job.get(key) != value and not (any_batch_size and key == "batch_size"):
            difference = f"{key} is {brief(job.get(key))} there and {brief(value)} now"
            raise InputError(f"{store}: holds another job: {difference}; {HELP}")


def difference(there: Environment, here: Environment) -> str | None:
    """The first field that differs, as `onnxruntime is 1.22 there and 1.20 here`; None where all are equal."""
    for field in [*here, *(name for name in there if name not in here)]:
        if there.get(field) != here.get(field):
            return f"{field} is {there.get(field, 'none')} there and {here.get(field, 'none')} here"
    return None


def check_same_environment(store: Store, environment: Environment) -> None:
    """InputError when another kind of machine made the images that the job in `store` has."""
    before = recorded_environment(store)
    if before is not None and (found := difference(before, environment)) is not None:
        raise InputError(f"{store}: {found}; the same kind of machine must continue the job, or choose another --out")


def recorded_environment(store: Store) -> dict[str, str] | None:
    """The environment that the job in `store` has recorded; None without one."""
    return read_job(store).environment if store.exists(JOB) else None


def recorded_runs(store: Store) -> tuple[Timing, ...]:
    """The finished runs of the job in `store`."""
    return read_job(store).runs


def recorded_limits(store: Store) -> Limits | None:
    """The limits of the job in `store`, so that a resumed one cuts its requests into the same batches; None without a job."""
    if not store.exists(JOB):
        return None
    record = read_job(store)
    if record.limits is not None or "batch_size" not in record.job:
        return record.limits
    with located(f"{store.place(JOB)}: job.batch_size"):  # an older version recorded the batch size alone
        batch = record.job["batch_size"]
        if type(batch) is not int or batch < 1:
            raise InputError(f"found {brief(batch)}, expected a whole number from 1")
        return Limits(batch, None)
