"""`--shard auto`: which part of a job this process generates, read from the variables of Kubernetes, Slurm or torchrun."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fastgen.engines.machine import gpus
from fastgen.errors import InputError, Say
from fastgen.files.jsonfiles import brief
from fastgen.generate.shards import MAX_SHARDS, Shard

KUBERNETES, SLURM, TORCHRUN = "JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID", "RANK"
GPUS = "CUDA_VISIBLE_DEVICES"
Variables = Mapping[str, str]


@dataclass(frozen=True)
class Place:
    """This process among those of a job. `index`: from 0. `source`: the variables that said so."""

    index: int
    count: int
    source: str


def auto_shard(variables: Variables, of: int | None, say: Say) -> Shard:
    """The shard of this process, by the first of JOB_COMPLETION_INDEX, SLURM_ARRAY_TASK_ID and RANK that is set.

    `of`: the number of shards (`--of`), which Kubernetes does not tell; None: not given. `say` gets a line with the shard and
    the variables. Raises InputError for none of the three, a value that is no whole number or out of range, an array with
    holes, and an `of` that is missing or differs from the number that the variables tell.
    """
    present = [name for name in _READERS if name in variables]
    if not present:
        names = f"{KUBERNETES} (with --of N), {SLURM} and {TORCHRUN} are not set"
        raise InputError(
            f"--shard auto: {names}; start it by a Kubernetes Indexed Job, a Slurm array or torchrun, or give I/N"
        )
    name, *ignored = present
    place = _READERS[name](variables, of)
    if of not in (None, place.count):
        raise InputError(f"--of: found {of}, expected {place.count}, by {place.source}")
    if not 0 <= place.index < place.count:
        raise InputError(f"{name}: found {variables[name]}, out of range for {place.count} shards ({place.source})")
    shard = Shard(place.index + 1, place.count)
    others = f"; {', '.join(ignored)} not used" if ignored else ""
    say(f"shard {shard}, by {place.source}{others}")
    return shard


def gpu_of_rank(variables: Variables) -> str | None:
    """The value of CUDA_VISIBLE_DEVICES for the process LOCAL_RANK of those that torchrun started on a machine with several
    GPUs: one GPU each. None where nothing is to be set. Raises InputError for a rank without a GPU."""
    if "LOCAL_RANK" not in variables or next(name for name in _READERS if name in variables) != TORCHRUN:
        return None
    rank = _whole(variables, "LOCAL_RANK")
    visible = variables[GPUS].split(",") if GPUS in variables else [str(i) for i in range(len(gpus()[0]))]
    if len(visible) < 2:
        return None
    if rank >= len(visible):
        raise InputError(
            f"LOCAL_RANK: found {rank}, and this machine shows {len(visible)} GPUs; start as many processes"
        )
    return visible[rank].strip()


def _kubernetes(variables: Variables, of: int | None) -> Place:
    if of is None:
        raise InputError(
            f"--shard auto: {KUBERNETES} does not tell the number of shards; add --of N, the Job's completions"
        )
    return Place(_whole(variables, KUBERNETES), of, f"{KUBERNETES}={variables[KUBERNETES]} of {of}")


def _slurm(variables: Variables, of: int | None) -> Place:
    """Of an array whose ids are consecutive, such as 0-7 or 1-8: Slurm tells the smallest and the largest one."""
    name = "SLURM_ARRAY_TASK_COUNT"
    index, count = _whole(variables, SLURM), _whole(variables, name, low=1)
    first = _whole(variables, "SLURM_ARRAY_TASK_MIN", 0)
    last = _whole(variables, "SLURM_ARRAY_TASK_MAX", first + count - 1)
    step = _whole(variables, "SLURM_ARRAY_TASK_STEP", 1)
    if step != 1 or last - first + 1 != count:
        found = f"found {count} tasks from {first} to {last}, with step {step}"
        raise InputError(f"{name}: {found}, expected an array without holes, such as --array=0-{max(count, 2) - 1}")
    return Place(index - first, count, f"{SLURM}={index} of {first}-{last}")


def _torchrun(variables: Variables, of: int | None) -> Place:
    rank, count = _whole(variables, TORCHRUN), _whole(variables, "WORLD_SIZE", low=1)
    return Place(rank, count, f"{TORCHRUN}={rank} and WORLD_SIZE={count}")


def _whole(variables: Variables, name: str, default: int | None = None, low: int = 0) -> int:
    """A variable's whole number; `default` where it is not set. Raises InputError."""
    text = variables.get(name)
    if text is None and default is not None:
        return default
    number = int(text) if text is not None and re.fullmatch(r"[0-9]{1,7}", text, re.ASCII) else -1
    if not low <= number <= MAX_SHARDS:
        found = "is not set" if text is None else f"found {brief(text)}"
        raise InputError(f"{name}: {found}, expected a whole number from {low} to {MAX_SHARDS}")
    return number


_READERS: dict[str, Callable[[Variables, int | None], Place]] = {
    KUBERNETES: _kubernetes,
    SLURM: _slurm,
    TORCHRUN: _torchrun,
}
