"""What an engine is: something that runs a model's networks. It knows nothing of diffusion."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from fastgen.errors import InputError
from fastgen.signatures import Signature

Array = Any  # of the engine's namespace: numpy.ndarray or torch.Tensor


class Engine(abc.ABC):
    """Runs the networks of one model.

    A module `fastgen/engines/<name>.py` defines one subclass called `Engine` whose constructor takes
    (source, *, device, dtype, threads); nothing else has to be registered.
    """

    name: ClassVar[str]
    source_kind: ClassVar[str]  # "model" (folder) | "bundle"
    packages: ClassVar[Sequence[str]]  # import names it needs
    install: ClassVar[str]  # the command that installs them
    dtypes: ClassVar[Sequence[str]]  # precisions it can execute, the default first where the hardware has it
    static_shapes: ClassVar[bool] = False  # compiles per batch size: callers pad their last batch

    xp: Any  # array namespace of its arrays
    device: str
    dtype: str  # the precision that is executed
    signatures: Mapping[str, Signature]

    @abc.abstractmethod
    def run(self, network: str, *inputs: Array) -> tuple[Array, ...]:
        """One forward of `network`; inputs and outputs float32 (ids int64), in the order of its signature."""

    @abc.abstractmethod
    def array(self, values: np.ndarray) -> Array:
        """A NumPy array as an array of this engine, on its device."""

    @abc.abstractmethod
    def numpy(self, values: Array) -> np.ndarray:
        """An array of this engine as NumPy."""


def choose_dtype(engine: type[Engine], dtype: str | None, default: str) -> str:
    """The asked-for precision, or the default; InputError when the engine cannot execute it."""
    if dtype is None:
        return default
    if dtype not in engine.dtypes:
        raise InputError(f"engine {engine.name} executes {', '.join(engine.dtypes)}, not {dtype}")
    return dtype
