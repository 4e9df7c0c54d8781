"""The base class of engines, which run a model's networks. An engine knows no scheduler, no seed and no request."""

from __future__ import annotations

import abc
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastgen.engines.batches import cut
from fastgen.engines.machine import slow_precisions
from fastgen.errors import InputError
from fastgen.files.installing import Install
from fastgen.models.signatures import Signature, network_dtype

if TYPE_CHECKING:
    from pathlib import Path

    from fastgen.engines.cache.artifacts import Artifact, Recipe
    from fastgen.engines.doctor.diagnosis import Machine, Problem
    from fastgen.engines.machine import Cpu

Array = Any  # of the engine's namespace: numpy.ndarray or torch.Tensor


class Engine(abc.ABC):
    """Runs the networks of one model.

    A module `fastgen/engines/<name>/engine.py` defines one subclass called `Engine` whose constructor takes
    (source, *, device, dtype, threads); nothing else has to be registered.
    """

    name: ClassVar[str]
    source_kind: ClassVar[str]  # "model" (folder) | "bundle"
    packages: ClassVar[Sequence[str]]  # import names it needs
    install: ClassVar[Install]  # the command that installs them, as text
    dtypes: ClassVar[Sequence[str]]  # precisions it can execute, the default first where the hardware has it
    static_shapes: ClassVar[bool] = False  # compiles per batch size: callers pad their last batch
    threadsafe: ClassVar[bool] = False  # several threads may run it, also at the same time
    # The option of `fastgen export` that builds it beforehand; None: it is ready, or built when it is first needed.
    built_by: ClassVar[str | None] = None
    # Precisions for which it needs graphs of their own in the bundle; in others it runs the fp32 graphs.
    lowered_graphs: ClassVar[Sequence[str]] = ()
    cpu_only: ClassVar[bool] = False  # never runs on a GPU
    reference: ClassVar[bool] = (
        False  # the others are compared with it; it runs without CUDA graphs, as its users run it
    )

    xp: Any  # array namespace of its arrays
    device: str
    dtype: str  # the precision that is executed
    signatures: Mapping[str, Signature]
    decode_pixels: int = 2**16  # per forward of the VAE decoder: more are slower per image on a CPU, and cost memory
    gpu: str | None = None  # its name, where one build runs on different cards: each of them needs a certificate
    batch_invariant: bool = False  # a row's outputs are the same bytes in a batch of any size
    splits: ClassVar[bool] = False  # also runs the two networks of a split UNet, `Spec.split_signatures`, on a CPU
    capturable: bool = False  # `run` may be recorded into a CUDA graph: current stream, no host synchronisation

    @classmethod
    def open(cls, source: Any, *, device: str | None, dtype: str | None, threads: int | None) -> Engine:
        """An engine over a model folder or bundle, of this class, or of the device's where a name has a class per device.
        Raises InputError for a precision or device that it does not have."""
        return cls(source, device=device, dtype=dtype, threads=threads)  # type: ignore[call-arg]

    @classmethod
    def problems(cls, machine: Machine) -> list[Problem]:
        """Why this engine cannot run on a machine, and what helps: packages, its libraries, the cache."""
        from fastgen.engines.doctor.diagnosis import Problem
        from fastgen.engines.doctor.packages import package_problems

        problems = [*package_problems(cls.packages, cls.install, machine), *cls.library_problems(machine)]
        if machine.cache.error and cls.recipe is not Engine.recipe:
            problems.append(Problem("its compiled networks have no place", machine.cache.error))
        return list(dict.fromkeys(problems))

    @classmethod
    def library_problems(cls, machine: Machine) -> Iterator[Problem]:
        """Problems of its libraries, of those that can be imported, and of the tools that it needs."""
        return iter(())

    @classmethod
    def priority(cls, folder: Path, device: str | None) -> int:
        """Of the engines for bundles the one of the highest priority is the default, never one of 0. It depends on what is
        installed and built; no package of the engine is imported. `device`: the user's, None for none."""
        return 0

    @abc.abstractmethod
    def run(self, network: str, *inputs: Array) -> tuple[Array, ...]:
        """One forward of `network`; inputs and outputs float32 (ids int64), in the order of its signature.

        Raises InputError for inputs that `checked_rows` refuses.
        """

    def checked_rows(self, network: str, inputs: Sequence[Array]) -> int:
        """The number of rows of a network's inputs. Raises InputError unless each has the dtype and shape of the signature:
        libraries broadcast a wrong one, or read past its end."""
        tensors, shapes = self.signatures[network].inputs, [tuple(x.shape) for x in inputs]
        if len(shapes) != len(tensors):
            raise InputError(f"engine {self.name}: {network} takes {len(tensors)} inputs, not {len(shapes)}")
        rows = next(iter(shapes[0]), 0)
        for value, shape, tensor in zip(inputs, shapes, tensors, strict=True):
            expected = tensor.with_batch(rows)
            if shape != expected or value.dtype != getattr(self.xp, tensor.dtype):
                dtype = str(value.dtype).removeprefix("torch.")
                what = f"{tensor.name} is {dtype} {shape}, expected {tensor.dtype} {expected}"
                raise InputError(f"engine {self.name}: {network}: {what}")
        return rows

    def run_any(self, network: str, *inputs: Array) -> tuple[Array, ...]:
        """`run` for any number of rows: cut and padded to the batch sizes that the engine has for this network."""
        sizes, count = self.batch_sizes(network), len(inputs[0])
        if sizes is None:
            return self.run(network, *inputs)
        parts = []
        for batch in cut(count, max(sizes), sizes):
            outputs = self.run(network, *(self.padded(x[batch.rows], batch.bucket) for x in inputs))
            parts.append([y[: len(batch)] for y in outputs])
        return tuple(self.xp.concatenate(column) for column in zip(*parts, strict=True))

    def padded(self, rows: Array, size: int) -> Array:
        """(B, ...) -> (size, ...), the last row repeated."""
        return rows if len(rows) == size else self.xp.concatenate([rows, *[rows[-1:]] * (size - len(rows))])

    def run_guided(self, sample: Array, timestep: Array, *conds: Array) -> Array:
        """The UNet on sample (B, ...) and timestep (B,) under each half of the conditions (2B, ...): predictions (2B, ...).

        Classifier-free guidance needs the same state under two conditions; an engine may compute once what does not depend
        on the condition.
        """
        return self.run_halves("unet", sample, timestep, *conds)[0]

    def run_halves(self, network: str, sample: Array, timestep: Array, *conds: Array) -> tuple[Array, ...]:
        """All outputs (2B, ...) of a denoiser, the UNet or one of the split ones, as in `run_guided`."""
        concat = self.xp.concatenate
        return self.run(network, concat([sample, sample]), concat([timestep, timestep]), *conds)

    def batch_sizes(self, network: str) -> Sequence[int] | None:
        """The batch sizes that `run` takes for this network, ascending, as a range where there are no gaps; None for any."""
        return None

    def recipe(self, network: str, rows: int | None) -> Recipe | None:
        """Cache key of this network compiled for `rows` rows (None: any number); a None field matches anything. None for an
        engine that keeps nothing on disk."""
        return None

    def buckets(self, guided: bool) -> Sequence[int] | None:
        """The batch sizes in images that the UNet can be run with, ascending; None for any. A guided image takes two rows."""
        sizes = self.batch_sizes("unet")
        if not guided or sizes is None:
            return sizes
        if isinstance(sizes, range):
            return range(1, sizes[-1] // 2 + 1)
        return [size // 2 for size in sizes if size % 2 == 0]

    def compiled(self) -> Sequence[Artifact]:
        """Everything that was compiled for this engine, of any model, and can still be loaded."""
        from fastgen.engines.cache import artifacts

        return artifacts.scan(self.name)[0]

    def probe(self, network: str, rows: int) -> None:
        """One forward of so many rows, to measure time and memory."""
        self.run_any(network, *self.samples(network, rows))

    def samples(self, network: str, rows: int) -> list[Array]:
        """Random inputs of so many rows, always the same."""
        inputs = self.signatures[network].sample_inputs(rows, np.random.default_rng(0))
        return [self.array(x) for x in inputs.values()]

    def synchronize(self) -> None:  # noqa: B027
        """Wait until everything that was queued on the device has run."""

    def executed(self, network: str) -> str:
        """The precision that this network is executed in: some stay fp32."""
        return network_dtype(network, self.dtype)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether a smaller batch might succeed where this error was raised."""
        return isinstance(error, MemoryError)

    def release_memory(self) -> None:  # noqa: B027
        """Give unused device memory back, after an allocation has failed."""

    @abc.abstractmethod
    def array(self, values: np.ndarray) -> Array:
        """A NumPy array as an array of this engine, on its device."""

    @abc.abstractmethod
    def numpy(self, values: Array) -> np.ndarray:
        """An array of this engine as NumPy."""


def choose_dtype(engine: type[Engine], dtype: str | None, default: str) -> str:
    """`dtype`, or the default if it is None. Raises InputError when the engine cannot execute it."""
    if dtype is None:
        return default
    if dtype not in engine.dtypes:
        raise InputError(f"engine {engine.name} executes {', '.join(engine.dtypes)}, not {dtype}")
    return dtype


def announce(line: str) -> None:
    """A line to the user, on stderr, about something slow or unexpected."""
    print(line, file=sys.stderr, flush=True)


def announce_slow(engine: Engine, cpu: Cpu) -> None:
    """Say of an engine on a CPU that has no instructions for its precision that it will be slow. Plans are for GPUs."""
    if engine.device == "cpu" and not engine.built_by and (line := slow_precisions(cpu).get(engine.dtype)):
        announce(f"{cpu.name} has {line}")
