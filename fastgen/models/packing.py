"""Packing a finished model or evaluator folder: what loading it needs and how it was trained, nothing else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError, unknown
from fastgen.files.folders import new_folder
from fastgen.files.jsonfiles import brief, located, read_json, read_jsonl, write_bytes
from fastgen.files.names import check_relative

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("fp16", "fp32")
INDEX, RECORD, PRESET, LOG = "model_index.json", "training.json", "preset.toml", "log.jsonl"
KEPT = (".json", ".md", ".toml", ".txt")  # of the files beside the weights
LOG_ROWS = 50  # per stage, besides those of validations
MEGABYTE = 1e6


@dataclass(frozen=True)
class PackedNetwork:
    """One file of weights."""

    name: str
    parameters: int
    bytes: int
    error: float  # the largest rounding error
    worst: str  # the weight that it is in
    relative: float  # root mean square of all errors, divided by that of all weights


@dataclass(frozen=True)
class PackReport:
    """A folder that `pack` wrote."""

    folder: Path
    dtype: str
    networks: tuple[PackedNetwork, ...]
    weights_before: int  # bytes of the source's weights
    bytes: int  # of all files of the folder

    def lines(self) -> list[str]:
        """What was packed, a line for each network, and the sum."""
        width = max(len(network.name) for network in self.networks)
        rows = [
            f"{n.name:{width}}  {n.parameters:>12,} weights  {n.bytes / MEGABYTE:6.2f} MB  "
            f"largest rounding error {n.error:.2g} ({n.worst}), root mean square {100 * n.relative:.3f}%"
            for n in self.networks
        ]
        before, after = self.weights_before / MEGABYTE, self.bytes / MEGABYTE
        return [*rows, f"{self.folder}: {after:.2f} MB in {self.dtype}; its weights were {before:.2f} MB"]


def pack(model: str | os.PathLike[str], out: str | os.PathLike[str], dtype: str = "fp16") -> PackReport:
    """Write the model or evaluator folder `model` to the new folder `out`, its weights in `dtype` under their own names.

    Checkpoints, previews, bundles and indices are left out; the training record is kept, the log keeps some of its rows, and
    the recorded preset becomes preset.toml. The same folder gives the same bytes. Loading it gives float32 networks with the
    rounded weights. Raises InputError when `model` is neither or is not finished, when a weight is not finite or overflows, or
    when `out` exists; FastgenError when the disk refuses. Nothing is written then.
    """
    source, target = Path(model), Path(out)
    if dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    files = _files(source)
    if os.path.lexists(target):
        raise InputError(f"{target}: exists already; choose another OUT")
    with new_folder(target) as folder:
        networks = tuple(_write(source, folder, files, dtype))
    before = sum((source / file).stat().st_size for file in files if file.suffix == ".safetensors")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return PackReport(target, dtype, networks, before, size)


def _files(source: Path) -> list[Path]:
    """The files to pack, relative to `source`. Raises InputError when it is no finished model or evaluator."""
    if (source / INDEX).is_file():
        folders = [source, *(source / name for name in _components(source / INDEX))]
    elif (source / "config.json").is_file() and (source / "model.safetensors").is_file():
        folders = [source]
    else:
        raise InputError(
            f"{source}: neither a finished model folder ({INDEX}) nor an evaluator (config.json and model.safetensors)"
        )
    if _record(source).get("finished") is False:
        raise InputError(
            f"{source}: its training is not finished; `fastgen train` with the same arguments continues it"
        )
    files = [file for folder in folders for file in sorted(folder.glob("*")) if file.is_file()]
    for file in files:
        if file.suffix in (".bin", ".pt", ".pth", ".ckpt"):
            raise InputError(f"{file}: is a pickle, expected weights in safetensors; save the model with safetensors")
    kept = [file.relative_to(source) for file in files if file.suffix in (*KEPT, ".safetensors") or file.name == LOG]
    if not any(file.suffix == ".safetensors" for file in kept):
        raise InputError(f"{source}: holds no weights (*.safetensors)")
    return kept


def _components(index: Path) -> list[str]:
    """The folders that a model_index.json names."""
    entries = read_json(index)
    if not isinstance(entries, dict):
        raise InputError(f"{index}: found {brief(entries)}, expected an object")
    with located(index):
        return [check_relative(name, "component") for name, e in entries.items() if isinstance(e, list) and e and e[0]]


def _record(source: Path) -> dict[str, Any]:
    """How the model was trained; empty where that is not recorded."""
    record = read_json(source / RECORD) if (source / RECORD).is_file() else {}
    return record if isinstance(record, dict) else {}


def _write(source: Path, folder: Path, files: list[Path], dtype: str) -> Iterator[PackedNetwork]:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".safetensors":
            yield _write_weights(source, folder, file, dtype)
        elif file == Path(LOG):
            rows = thin_log([row for _, row in read_jsonl(source / file)])
            write_bytes(folder / file, "".join(json.dumps(row) + "\n" for row in rows).encode())
        else:
            write_bytes(folder / file, (source / file).read_bytes())
    preset = _record(source).get("preset")
    if isinstance(preset, dict) and Path(PRESET) not in files:
        import tomli_w

        write_bytes(folder / PRESET, tomli_w.dumps(without_empty(preset)).encode())


def without_empty(value: Any) -> Any:
    """A preset without None, which TOML lacks, and without empty tables: leaving these out changes nothing."""
    if isinstance(value, list):
        return [without_empty(item) for item in value]
    if not isinstance(value, dict):
        return value
    rest = {key: without_empty(item) for key, item in value.items()}
    return {key: item for key, item in rest.items() if item is not None and item != {}}


def _write_weights(source: Path, folder: Path, file: Path, dtype: str) -> PackedNetwork:
    from safetensors.torch import save

    from fastgen.models.tensor_files import read_safetensors

    state = read_safetensors(source / file)
    rounded = {name: _rounded(value, dtype, f"{source / file}: {name}") for name, value in state.items()}
    data = save(rounded, metadata={"format": "pt"})
    write_bytes(folder / file, data)
    name = file.parent.name or "evaluator"
    return PackedNetwork(name, sum(v.numel() for v in state.values()), len(data), *_errors(state, rounded))


def _rounded(value: Tensor, dtype: str, where: str) -> Tensor:
    """Floating-point weights in `dtype`, others as they are. Raises InputError for what is not finite before or after."""
    import torch

    if not value.is_floating_point():
        return value.contiguous()
    if not torch.isfinite(value).all():
        raise InputError(f"{where}: holds NaN or infinity; this training went wrong, take an earlier checkpoint")
    rounded = value.to({"fp16": torch.float16, "fp32": torch.float32}[dtype]).contiguous()
    if not torch.isfinite(rounded).all():
        largest = float(value.abs().max())
        raise InputError(f"{where}: {largest:.6g} overflows {dtype} (at most 65504); pack it with --dtype fp32")
    return rounded


def _errors(state: Mapping[str, Tensor], rounded: Mapping[str, Tensor]) -> tuple[float, str, float]:
    """(largest rounding error, the weight it is in, root mean square of the errors divided by that of the weights)."""
    largest, worst, squares, total = 0.0, next(iter(state), ""), 0.0, 0.0
    for name, value in state.items():
        error = (value.double() - rounded[name].double()).abs()
        if error.numel() and float(error.max()) > largest:
            largest, worst = float(error.max()), name
        squares, total = squares + float((error**2).sum()), total + float((value.double() ** 2).sum())
    return largest, worst, math.sqrt(squares / total) if total else 0.0


def thin_log(rows: list[dict[str, Any]], limit: int = LOG_ROWS) -> list[dict[str, Any]]:
    """At most `limit` evenly spaced rows of each stage, and all that a validation wrote, in their order."""
    kept: set[int] = {i for i, row in enumerate(rows) if any(key.startswith("validation") for key in row)}
    for stage in {row.get("stage") for row in rows}:
        places = [i for i, row in enumerate(rows) if row.get("stage") == stage]
        count = min(limit, len(places))
        kept |= {places[round(k * (len(places) - 1) / max(1, count - 1))] for k in range(count)}
    return [row for i, row in enumerate(rows) if i in kept]
