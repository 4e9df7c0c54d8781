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
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError
from fastgen.files.hashes import check_file, sha256_file
from fastgen.files.jsonfiles import infinity_from_text, located, read_json
from fastgen.models.signatures import Signature
from fastgen.models.spec import Spec
from fastgen.models.tokenizer import Tokenizer
from fastgen.sampling.defaults import Sampling

if TYPE_CHECKING:
    from fastgen.sampling.tables import SolverTable, TableStore

FORMAT_VERSION = 1
MANIFEST = "bundle.json"
TABLES = "scheduler/tables.npz"
REFERENCE = "reference.safetensors"
NETWORKS = {"text": {"text_encoder", "unet", "vae_decoder", "vae_encoder"}, "labels": {"unet"}}
LOWERED = ("fp16", "bf16")  # precisions that a bundle may hold graphs in, besides fp32
CERTIFICATES = "certificates"  # beside the hashed files: added to a bundle after it was written
COMPILED = "trt-rtx"  # name of the engine whose plans a bundle may hold, and of their folder: trt-rtx/<address>/


@dataclass(frozen=True)
class Bundle:
    """A bundle whose bundle.json has been read and checked. Files are verified when they are first asked for."""

    folder: Path
    spec: Spec
    files: Mapping[str, Mapping[str, Any]]  # relative path -> {"bytes": int, "sha256": hex}
    sha256: str  # of bundle.json, hence of everything
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    def file(self, name: str) -> Path:
        """Path of a bundle file after verifying it. Raises InputError for a missing, truncated or altered one."""
        path = self.folder / name
        if name not in self.files:
            raise InputError(f"{self.folder / MANIFEST}: files: {name} is not listed")
        if name not in self._verified:
            check_file(path, self.files[name], MANIFEST, "export the model again")
            self._verified.add(name)
        return path

    def network(self, name: str, dtype: str = "fp32") -> Path:
        """Path of a network's ONNX file in this precision, its external data verified too.

        Inputs and outputs are float32 in every precision. Raises InputError when the bundle was exported without it.
        """
        graph = graph_name(name, dtype)
        if graph not in self.files:
            command = f"fastgen export MODEL --out {self.folder} --dtype {dtype}"
            raise InputError(
                f"{self.folder}: has no {dtype} graph of {name}; `{command}`, with the model folder, adds it"
            )
        for other in self.files:
            if other.startswith(graph):
                self.file(other)
        return self.file(graph)

    def verify(self, dtype: str = "fp32") -> None:
        """Verify every file that generating in this precision reads, before the first image. `network` verifies graphs of other
        precisions, and an engine its compiled networks. Raises InputError for a missing or altered file."""
        others = ("vae_encoder/", "reference.", f"{COMPILED}/")
        for name in self.files:
            if _precision(name) in ("fp32", dtype) and not name.startswith(others):
                self.file(name)

    def prompt_tokenizer(self) -> Tokenizer:
        for name in self.files:
            if name.startswith("tokenizer/"):
                self.file(name)
        length = int(self.spec.signatures["text_encoder"].inputs[0].shape[1])
        return Tokenizer.from_folder(self.folder / "tokenizer", length)

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
    value = read_json(path)
    version = value.get("format_version") if isinstance(value, dict) else value
    if not isinstance(value, dict) or version != FORMAT_VERSION:
        problem = f"format_version is {version!r}, this fastgen reads {FORMAT_VERSION}"
        raise InputError(f"{path}: {problem}; export the model again")
    field_name = "signatures"
    try:
        signatures = {name: Signature.from_json(s) for name, s in value["signatures"].items()}
        field_name = "sampling"
        with located(path):
            sampling = Sampling(**value["sampling"])
        field_name = "files"
        files = {name: {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in value["files"].items()}
        field_name = "family"
        needed = NETWORKS[value["family"]]
        field_name = "scheduler_config, scaling_factor, objects, source_sha256"
        spec = Spec(
            family=value["family"],
            signatures=signatures,
            sampling=sampling,
            scheduler_config=infinity_from_text(value["scheduler_config"]),
            scaling_factor=float(value["scaling_factor"]),
            objects=value["objects"],
            sha256=value["source_sha256"],
            checkpoint=value.get("checkpoint"),
            image_mode=value.get("image_mode"),
            component_sha256=dict(value.get("component_sha256", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: {field_name}: malformed ({type(error).__name__}: {error})") from None
    if set(signatures) != needed:
        raise InputError(f"{path}: signatures: found {sorted(signatures)}, expected {sorted(needed)}")
    return Bundle(folder, spec, files, sha256_file(path))
