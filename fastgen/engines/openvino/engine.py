"""OpenVINO on the bundle's ONNX graphs: bf16 where the CPU has it, compiled per batch size.

A batch of an even number of images runs as two halves side by side, each on half of the threads: they wait for each other
once per forward instead of once per operation. Compiled graphs are kept in the cache without their weights, which are read
from the bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.engines import base
from fastgen.engines.base import announce
from fastgen.engines.cache.artifacts import Artifact, Recipe, obtain
from fastgen.engines.machine import cpu, has_int8
from fastgen.engines.openvino.rewrites import (
    CONDITION,
    VERSION,
    interleave_channels_last,
    join_quantisation,
    multiply_weights,
    normalise_channels_last,
    numbers,
    pad_products,
    share_rows,
    take_embedding,
    time_embedding,
    widen_convolutions,
)
from fastgen.errors import FastgenError, InputError, one_line
from fastgen.files.installing import Install
from fastgen.models.bundle import graph_name
from fastgen.models.bundle_record import AGAIN
from fastgen.models.signatures import DENOISERS

if TYPE_CHECKING:
    from fastgen.models.bundle import Bundle

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}
NETWORK, EMBEDDING = "network.blob", "time_embedding.blob"  # files of a compiled network
LOADS = 3  # at most, of a network whose lanes do not agree
ANNOUNCED = 2**27  # announce compiling from so many bytes of weights on: smaller networks take under a second


@dataclass(frozen=True)
class Lane:
    """A thread or more of its own: infer requests of the network, and of the time embedding where that is apart."""

    request: Any
    embedding: Any | None
    numbers: Sequence[int] = ()  # places of the inputs that the embedding takes

    def start(self, inputs: Sequence[np.ndarray]) -> None:
        """Begin a forward. The inputs have to live until `outputs`."""
        if self.embedding is not None:
            self.embedding.infer(inputs, share_inputs=True)
            others = [x for i, x in enumerate(inputs) if i not in self.numbers]
            inputs = (*others, *(tensor.data for tensor in self.embedding.output_tensors))
        self.request.start_async(inputs, share_inputs=True)

    def outputs(self) -> list[np.ndarray]:
        """What the forward computed, to be copied before the next one."""
        self.request.wait()
        return [tensor.data for tensor in self.request.output_tensors]


@cache
def shared_core() -> Any:
    """The process's one `openvino.Core`, which is never freed.

    Its CPU plugin gives the thread that loads it a stack for signal handlers. A plugin that another thread frees, as a garbage
    collection may, takes that stack away while it is in use (OpenVINO 2026.4): then Ctrl-C is a segmentation fault.
    """
    import openvino

    return openvino.Core()


class Engine(base.Engine):
    name = "openvino"
    source_kind = "bundle"
    packages = ("openvino",)
    install = Install("cpu")
    cpu_only = True
    dtypes = ("bf16", "fp32", "fp16", "int8")
    lowered_graphs = ("int8",)
    static_shapes = True
    threadsafe = True
    batch_invariant = True
    splits = True
    decode_pixels = 2**17  # two halves of one image each

    def __init__(
        self, source: Bundle, *, device: str | None = None, dtype: str | None = None, threads: int | None = None
    ) -> None:
        import openvino

        if device not in (None, "cpu"):
            raise InputError(f"engine openvino runs on cpu, not {device}")
        self.xp = np
        self.device = "cpu"
        self._core = shared_core()
        capabilities = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        native = "bf16" if "BF16" in capabilities else "fp32"
        self.dtype = base.choose_dtype(Engine, dtype, native)
        self._around = native if self.dtype == "int8" else self.dtype  # the precision of what is not in eight bits
        if _HINTS[self._around].upper() not in ("F32", *(c.upper().replace("FP", "F") for c in capabilities)):
            raise InputError(f"engine openvino: this CPU has no {self.dtype}; it has {', '.join(capabilities)}")
        self.signatures = source.spec.all_signatures
        self._bundle, self._version, self._cpu, self._threads = source, openvino.__version__, cpu(), threads
        self._lanes: dict[tuple[str, int, bool], list[Lane]] = {}
        self._locks: dict[tuple[str, int, bool], Lock] = {}

    @classmethod
    def priority(cls, folder: Path, device: str | None) -> int:
        return 2

    def run(self, network: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        with self._opened(network, self.checked_rows(network, inputs), guided=False) as lanes:
            parts = [np.split(x, len(lanes)) for x in inputs]
            outputs = self._run_all(network, lanes, list(zip(*parts, strict=True)))
            return tuple(np.concatenate(column) for column in zip(*outputs, strict=True))

    def run_halves(
        self, network: str, sample: np.ndarray, timestep: np.ndarray, *conds: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        try:
            with self._opened(network, len(sample), guided=True) as lanes:
                parts = [np.split(x, len(lanes)) for x in (sample, timestep)]
                parts += [_halves(cond, len(lanes)) for cond in conds]
                inputs = list(zip(*parts, strict=True))
                columns = list(zip(*self._run_all(network, lanes, inputs), strict=True))  # a list of lanes per output
                return tuple(_joined(np.stack(column)) for column in columns)
        except NotSharedError:
            return super().run_halves(network, sample, timestep, *conds)

    def recipe(self, network: str, rows: int | None) -> Recipe:
        return self._recipe(network, rows, None if rows is None else False)

    def array(self, values: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(values)

    def numpy(self, values: np.ndarray) -> np.ndarray:
        return values

    def _graph_dtype(self, network: str) -> str:
        """The precision of the graph that is compiled: lower ones than fp32 are OpenVINO's own matter, but for eight bits."""
        return "int8" if self.executed(network) == "int8" else "fp32"

    def _computed(self, network: str) -> str:
        """The precision of all layers that are not in eight bits."""
        return self._around if self.executed(network) == "int8" else self.executed(network)

    def _run_all(
        self, network: str, lanes: Sequence[Lane], inputs: Sequence[Sequence[np.ndarray]]
    ) -> list[list[np.ndarray]]:
        """One forward of every lane, at the same time. Raises FastgenError for what OpenVINO refuses."""
        try:
            for lane, lane_inputs in zip(lanes, inputs, strict=True):
                lane.start(lane_inputs)
            return [lane.outputs() for lane in lanes]
        except RuntimeError as error:
            path = self._bundle.folder / graph_name(network, self._graph_dtype(network))
            raise FastgenError(f"{path}: OpenVINO cannot run it: {_brief(error)}") from None

    @contextmanager
    def _opened(self, network: str, batch: int, guided: bool) -> Iterator[list[Lane]]:
        """The lanes for so many rows, for the time of the block: one thread at a time runs them, and copies what they give."""
        key = (network, batch, guided)
        with self._locks.setdefault(key, Lock()):
            if key not in self._lanes:
                self._lanes[key] = self._open(network, batch, guided)
            yield self._lanes[key]

    def _open(self, network: str, batch: int, guided: bool) -> list[Lane]:
        """The lanes of a network for `batch` rows, or images where it is guided, which give the same bytes for the same rows.

        In some processes (3 of 21) the first network that OpenVINO 2026.4 loads in two lanes comes out in one of them as coarse
        as in bf16, at every run, although it is to run in fp32. Loaded once more, it does not.
        """
        for _ in range(LOADS):
            lanes = self._load(network, batch, guided)
            if self._agree(network, lanes, batch // len(lanes), guided):
                return lanes
        raise FastgenError(
            f"{network}: OpenVINO {self._version} computes it differently in threads side by side; use --threads 1"
        )

    def _agree(self, network: str, lanes: Sequence[Lane], rows: int, guided: bool) -> bool:
        """Whether all lanes give the same bytes for the same inputs."""
        if len(lanes) == 1:
            return True
        rng = np.random.default_rng(0)
        inputs = [
            tensor.sample(2 * rows if guided and i >= CONDITION else rows, rng)
            for i, tensor in enumerate(self.signatures[network].inputs)
        ]
        first, *others = self._run_all(network, lanes, [inputs] * len(lanes))
        return all(np.array_equal(x, y, equal_nan=True) for other in others for x, y in zip(first, other, strict=True))

    def _load(self, network: str, batch: int, guided: bool) -> list[Lane]:
        """The lanes as OpenVINO loads them, compiled when the cache has none."""
        path = self._bundle.network(network, self._graph_dtype(network))  # verified, its weights too
        weights = self._bundle.file(f"{network}/{path.name}.data")
        fresh: dict[str, Any] = {}

        def make(folder: Path) -> None:
            fresh.update(self._compiled(network, path, batch, guided))
            for name, model in fresh.items():
                (folder / name).write_bytes(model.export_model().getbuffer())

        large = weights.stat().st_size >= ANNOUNCED
        artifact = obtain(self._recipe(network, batch, guided), make, announce, say_built=large)
        models = fresh or self._imported(artifact, network, weights, batch)
        return [
            Lane(
                models[NETWORK].create_infer_request(),
                models[EMBEDDING].create_infer_request() if EMBEDDING in models else None,
                numbers(self.signatures[network].inputs),
            )
            for _ in range(self._split(batch))
        ]

    def _split(self, batch: int) -> int:
        """In how many parts a batch is run at once."""
        return 2 if batch % 2 == 0 and (self._threads or self._cpu.cores) > 1 else 1

    def _compiled(self, network: str, path: Path, batch: int, guided: bool) -> dict[str, Any]:
        """Compiled models by the names of their files. Raises NotSharedError; FastgenError for what OpenVINO refuses."""
        rows, inputs = batch // self._split(batch), self.signatures[network].inputs
        try:
            model = self._core.read_model(path)
            join_quantisation(model)
            if not has_int8(self._cpu):
                multiply_weights(model)
            if guided and not share_rows(model):
                raise NotSharedError
            counts = [2 * rows if guided and i >= CONDITION else rows for i in range(len(inputs))]
            model.reshape({t.name: t.with_batch(n) for t, n in zip(inputs, counts, strict=True)})
            if network == "vae_decoder":  # not where a rounded moment would be met again at every step
                normalise_channels_last(model)
            interleave_channels_last(model)
            if self._computed(network) != "fp32":
                pad_products(model)
                widen_convolutions(model)
            self._check_outputs(model, network, path, counts[-1])
            models = {NETWORK: model}
            if network in DENOISERS and self._computed(network) != "fp32":
                models = {EMBEDDING: time_embedding(model)} | models
                models[EMBEDDING] = self._core.compile_model(models[EMBEDDING], "CPU", self._config("fp32", 1))
                take_embedding(model, numbers(inputs))
            config = self._config(self._computed(network), self._split(batch))
            return models | {NETWORK: self._core.compile_model(model, "CPU", config)}
        except (RuntimeError, TypeError, ValueError) as error:
            what = f"OpenVINO {self._version.partition('-')[0]} cannot compile it: {_brief(error)}"
            raise InputError(f"{path}: {what}; {AGAIN}") from None

    def _check_outputs(self, model: Any, network: str, path: Path, rows: int) -> None:
        """InputError for outputs of other shapes than those of the signature, for so many rows."""
        for output, tensor in zip(model.outputs, self.signatures[network].outputs, strict=True):
            shape = output.partial_shape
            if shape.is_static and tuple(shape.to_shape()) != tensor.with_batch(rows):
                found = f"{tensor.name} is {shape}, expected {tensor.with_batch(rows)}"
                raise InputError(f"{path}: {found}; {AGAIN}")

    def _imported(self, artifact: Artifact, network: str, weights: Path, batch: int) -> dict[str, Any]:
        """What `_compiled` returned, from the cache; the files are verified."""
        dtypes = {EMBEDDING: "fp32", NETWORK: self._computed(network)}
        lanes = {EMBEDDING: 1, NETWORK: self._split(batch)}
        try:
            return {
                name: self._core.import_model(
                    artifact.file(name).read_bytes(),
                    "CPU",
                    self._config(dtypes[name], lanes[name]) | {"WEIGHTS_PATH": str(weights)},
                )
                for name in artifact.files
            }
        except (RuntimeError, TypeError, ValueError) as error:
            help_ = "delete the folder, and it is compiled again"
            raise FastgenError(f"{artifact.folder}: OpenVINO cannot load it: {_brief(error)}; {help_}") from None

    def _config(self, dtype: str, lanes: int) -> dict[str, Any]:
        """OpenVINO's settings. A blob of mode OPTIMIZE_SIZE holds the graph without the weights."""
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": _HINTS[dtype], "CACHE_MODE": "OPTIMIZE_SIZE"}
        config |= {"PERFORMANCE_HINT": "LATENCY"} if lanes == 1 else {"NUM_STREAMS": lanes}
        return config | ({"INFERENCE_NUM_THREADS": self._threads} if self._threads else {})

    def _recipe(self, network: str, batch: int | None, guided: bool | None) -> Recipe:
        files, graph = self._bundle.files, graph_name(network, self._graph_dtype(network))
        for name in (graph, f"{graph}.data"):
            if name not in files:
                self._bundle.network(
                    network, self._graph_dtype(network)
                )  # says what is missing, and the command that adds it
        return Recipe(
            self.name,
            {
                "network": network,
                "batch": batch,
                "guided": guided,
                "dtype": self.executed(network),
                "around": self._computed(network),
                "graph": files[graph].sha256,
                "weights": files[f"{graph}.data"].sha256,
                "openvino": self._version,
                "rewrites": VERSION,
                "cpu": self._cpu.name,
                "isa": " ".join(self._cpu.isa),
                "cores": self._cpu.cores,
                "threads": self._threads,
            },
        )


def _halves(cond: np.ndarray, count: int) -> list[np.ndarray]:
    """(2B, ...), unconditional rows first, -> for each of `count` lanes its share of both halves (2B / count, ...)."""
    lanes = cond.reshape(2, count, -1, *cond.shape[1:]).swapaxes(0, 1)  # (lanes, 2, B / lanes, ...)
    return [np.ascontiguousarray(lane.reshape(-1, *cond.shape[1:])) for lane in lanes]


def _joined(lanes: np.ndarray) -> np.ndarray:
    """The inverse of `_halves`: (lanes, 2B / lanes, ...) -> (2B, ...), unconditional rows first."""
    count, _, *rows = lanes.shape
    return lanes.reshape(count, 2, -1, *rows).swapaxes(0, 1).reshape(-1, *rows)


class NotSharedError(Exception):
    """The graph cannot compute once what both halves of a guided batch have in common."""


def _brief(error: Exception) -> str:
    """What OpenVINO says, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith(("Exception from ", "Check '"))]
    return one_line(" ".join(said) or str(error), 100)
