"""Which files of a network's folder hold its weights: safetensors first, then half precision, then pickles. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from fastgen.errors import InputError
from fastgen.files.jsonfiles import located
from fastgen.files.names import check_relative
from fastgen.files.records import Name, Record, read_record

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
VARIANTS = (None, "fp16", "bf16", "fp32")  # of those that exist the first one; None: the plain name


class ShardIndex(Record, frozen=True, forbid_unknown_fields=False):
    """The index of weights in several files: name of a weight -> its file. `metadata`: diffusers reads no index without it."""

    metadata: dict[str, Any]
    weight_map: Annotated[dict[Name, Name], Meta(min_length=1, max_length=1_000_000)]


@dataclass(frozen=True)
class ChosenWeights:
    """Files of weights, and the arguments with which `from_pretrained` reads just these."""

    files: tuple[Path, ...]
    options: dict[str, Any] = field(default_factory=dict)


def weight_files(folder: Path, *, allow_pickle: bool = False) -> ChosenWeights:
    """The weights of a network's folder: one file or shards, of the plain name, else in fp16 or another variant; safetensors,
    and pickles (.bin) where there are no safetensors and with `allow_pickle` alone. Raises InputError where there are none."""
    for safe in (True, False):
        for variant, files in _candidates(folder, ".safetensors" if safe else ".bin"):
            if not safe and not allow_pickle:
                raise InputError(
                    f"{files[0]}: weights in a pickle; if you trust where they came from, read them with --allow-pickle"
                )
            options: dict[str, Any] = {} if safe else {"use_safetensors": False}
            return ChosenWeights(files, options | ({"variant": variant} if variant else {}))
    raise InputError(f"{folder}: holds no weights, expected {' or '.join(f'{stem}.safetensors' for stem in STEMS[:2])}")


def _candidates(folder: Path, ending: str) -> Iterator[tuple[str | None, tuple[Path, ...]]]:
    for variant in VARIANTS:
        for stem in STEMS:
            name = f"{stem}.{variant}" if variant else stem
            if (file := folder / f"{name}{ending}").is_file():
                yield variant, (file,)
            for index in (f"{stem}{ending}.index{f'.{variant}' if variant else ''}.json", f"{name}{ending}.index.json"):
                if (file := folder / index).is_file():
                    yield variant, shard_files(file)


def shard_files(index: Path) -> tuple[Path, ...]:
    """The files that an index of weights names, sorted. Raises InputError for a malformed index, for names that leave its
    folder, and for files that are not there."""
    places = read_record(index, ShardIndex).weight_map
    with located(index):
        files = [index.parent / check_relative(name, "weight_map") for name in sorted(set(places.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: no such file, {index.name} names it")
    return tuple(files)
