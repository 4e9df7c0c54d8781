"""Reading a bundle: the folder that `fastgen export` writes, from which one generates without torch and diffusers.

A file's size and SHA-256 are compared with bundle.json before a runtime gets it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from fastgen.errors import InputError
from fastgen.files.hashes import FileRecord, check_file, check_inside, sha256_file
from fastgen.files.jsonfiles import brief
from fastgen.models.bundle_record import AGAIN, Weights, read_contents, spec_of
from fastgen.models.onnx_graph import read_graph
from fastgen.models.signatures import EIGHT_BITS
from fastgen.models.spec import Spec
from fastgen.models.tokenizer import BACKEND, CONFIGS, Tokenizer

if TYPE_CHECKING:
    from fastgen.sampling.tables import SolverTable, TableStore

MANIFEST = "bundle.json"
TABLES = "scheduler/tables.npz"
REFERENCE = "reference.safetensors"
# Precisions that a bundle may hold graphs in, besides fp32; see `plan_graph`.
LOWERED = ("fp16", "bf16", "int8", "int8-fp16", "fp8-fp16")
AROUND = "-fp16"  # the end of those in eight bits for TensorRT
CERTIFICATES = "certificates"  # beside the hashed files: added to a bundle after it was written
COMPILED = "trt-rtx"  # name of the engine whose plans a bundle may hold, and of their folder: trt-rtx/<address>/


@dataclass(frozen=True)
class Bundle:
    """A bundle whose bundle.json has been read and checked. Files are verified when they are first asked for."""

    folder: Path
    spec: Spec
    files: Mapping[str, FileRecord]  # by relative path
    sha256: str  # of bundle.json, hence of everything
    versions: Mapping[str, str]  # of the packages that exported it
    weights: Weights  # the precision in which graphs that compute in fp32 keep theirs
    counted_share: float | None  # see `shallow_share`
    sealed: bool  # bundle.json states the digest over its content, see `bundle_record.record_digest`
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)  # files
    _checked: set[str] = field(default_factory=set, repr=False, compare=False)  # graphs

    def file(self, name: str) -> Path:
        """Path of a bundle file after verifying it. Raises InputError for a missing, truncated or altered one."""
        path = self.folder / name
        if name not in self.files:
            raise InputError(f"{self.folder / MANIFEST}: files: {name} is not listed")
        if name not in self._verified:
            check_inside(path, self.folder)
            check_file(path, self.files[name], MANIFEST, AGAIN)
            self._verified.add(name)
        return path

    def network(self, name: str, dtype: str = "fp32", option: str = "") -> Path:
        """Path of a network's ONNX file in this precision, its external data verified too. `option`: what tells
        `fastgen export` to add it, besides --dtype.

        Inputs and outputs are float32 in every precision. Raises InputError when the bundle was exported without it, for a
        graph with other inputs or outputs than the network's signature, and for external data in a file that bundle.json does
        not list: a runtime would read it unverified.
        """
        graph = graph_name(name, dtype)
        if graph not in self.files:
            asked = dtype.removesuffix(AROUND) + (f" {option}" if dtype.endswith(AROUND) else "")
            command = f"fastgen export MODEL --out {self.folder} --dtype {asked}"
            raise InputError(
                f"{self.folder}: has no {dtype} graph of {name}; `{command}`, with the model folder, adds it"
            )
        return self.graph(graph)

    def graph(self, name: str) -> Path:
        """Path of an ONNX file of the bundle, `unet/model.onnx`, verified and checked as `network` says."""
        path = self.file(name)
        network = name.partition("/")[0]
        if name not in self._checked:
            graph = read_graph(path)
            graph.check(self.spec.all_signatures[network])
            for location in sorted(graph.data):
                if f"{network}/{location}" not in self.files:
                    problem = f"keeps weights in {brief(location)}, which {MANIFEST} does not list"
                    raise InputError(f"{path}: {problem}; {AGAIN}")
                self.file(f"{network}/{location}")
            self._checked.add(name)
        return path

    def verify(self, dtype: str = "fp32") -> None:
        """Verify every file that generating in this precision reads, before the first image. `network` verifies graphs of other
        precisions, and an engine its compiled networks. Raises InputError for a missing or altered file."""
        others = ("vae_encoder/", "reference.", f"{COMPILED}/", *(f"{name}/" for name in self.spec.split_signatures))
        for name in self.files:
            if _precision(name) in ("fp32", dtype) and not name.startswith(others):
                is_graph = name.endswith(".onnx") and name.partition("/")[0] in self.spec.signatures
                self.graph(name) if is_graph else self.file(name)
        for network in self.spec.signatures:
            if network != "vae_encoder":
                self.network(network)

    def prompt_tokenizers(self) -> list[Tokenizer]:
        """One per text encoder. Raises InputError for a tokenizer's file that bundle.json does not list."""
        tokenizers = []
        for i, ids in enumerate(self.spec.signatures["text_encoder"].inputs):
            folder = f"tokenizer_{i + 1}" if i else "tokenizer"
            self.file(f"{folder}/{BACKEND}")
            for name in CONFIGS:
                if os.path.lexists(self.folder / folder / name):
                    self.file(f"{folder}/{name}")
            tokenizers.append(Tokenizer.from_folder(self.folder / folder, ids.with_batch(1)[1], ids.high))
        return tokenizers

    def check_split(self) -> None:
        """InputError, with the command that adds them, for a bundle without the graphs of a split UNet."""
        if self.spec.deep_feature is None:
            command = f"fastgen export MODEL --out {self.folder} --feature-cache"
            raise InputError(
                f"{self.folder}: has no graphs for --cache-interval; `{command}`, with the model folder, adds them"
            )

    def shallow_share(self) -> float:
        """See `Source.shallow_share`. Raises InputError for a bundle of an older version too, which does not state it."""
        self.check_split()
        if self.counted_share is None:
            command = f"fastgen export MODEL --out {self.folder} --feature-cache"
            lacks = f"{self.folder / MANIFEST}: shallow_share is missing"
            raise InputError(f"{lacks}; `{command}`, with the model folder, adds it")
        return self.counted_share

    @cached_property
    def _tables(self) -> TableStore:
        from fastgen.sampling.tables import TableStore

        return TableStore(self.file(TABLES))

    def solver_keys(self) -> list[str]:
        """The keys of all stored solver tables."""
        return self._tables.names()

    def table(self, key: str) -> SolverTable:
        """The stored solver table `NAME:STEPS[:NOISE_STEPS]`; one that is not stored is compiled if diffusers is installed.

        Raises InputError (with the nearest stored key) when it is not stored and diffusers is not installed.
        """
        if key in self._tables or importlib.util.find_spec("diffusers") is None:
            return self._tables.get(key)
        from fastgen.sampling.compile import TableCompiler

        return TableCompiler(self.spec.scheduler_config).table(key)


def graph_name(network: str, dtype: str) -> str:
    """Where a bundle keeps the graph of a network that computes in `dtype`."""
    return f"{network}/model.onnx" if dtype == "fp32" else f"{network}/model.{dtype}.onnx"


def plan_graph(dtype: str) -> str:
    """The precision of the graph that TensorRT plans in `dtype` are built from. Those in eight bits have graphs of their own,
    with fp16 around the quantised layers and no zero points; "int8" is the graph for CPUs."""
    return f"{dtype}{AROUND}" if dtype in EIGHT_BITS else dtype


def _precision(file: str) -> str:
    """The precision of a graph's files, `unet/model.fp16.onnx.data`; fp32 for any other."""
    return next((part for part in file.split(".") if part in LOWERED), "fp32")


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    return (Path(folder) / MANIFEST).is_file()


def read_bundle(folder: str | os.PathLike[str]) -> Bundle:
    """Read bundle.json. Raises InputError that names the field when it is malformed or of a foreign version."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError(
            f"{folder}: not a bundle ({MANIFEST} is missing); make one with `fastgen export MODEL --out BUNDLE`"
        )
    contents, digest = read_contents(path)
    spec = spec_of(contents, digest, path)
    sealed = contents.record_sha256 is not None
    return Bundle(
        folder,
        spec,
        contents.files,
        sha256_file(path),
        contents.versions,
        contents.weights,
        contents.shallow_share,
        sealed,
    )
