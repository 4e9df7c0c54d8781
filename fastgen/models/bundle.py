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
from fastgen.files.jsonfiles import infinity_from_text, read_json
from fastgen.files.records import to_record
from fastgen.models.condition import Condition, Text
from fastgen.models.signatures import Signature, TensorSpec
from fastgen.models.space import Space
from fastgen.models.spec import Spec
from fastgen.models.tokenizer import Tokenizer
from fastgen.sampling.defaults import Sampling

if TYPE_CHECKING:
    from fastgen.sampling.tables import SolverTable, TableStore

FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 knew two kinds of model: text to latents, labels to pixels
MANIFEST = "bundle.json"
TABLES = "scheduler/tables.npz"
REFERENCE = "reference.safetensors"
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

    def prompt_tokenizers(self) -> list[Tokenizer]:
        """One per text encoder."""
        tokenizers = []
        for i, ids in enumerate(self.spec.signatures["text_encoder"].inputs):
            folder = f"tokenizer_{i + 1}" if i else "tokenizer"
            for name in self.files:
                if name.startswith(f"{folder}/"):
                    self.file(name)
            tokenizers.append(Tokenizer.from_folder(self.folder / folder, int(ids.shape[1]), ids.high))
        return tokenizers

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
    if not isinstance(value, dict) or version not in READABLE:
        problem = f"format_version is {version!r}, this fastgen reads {' and '.join(map(str, READABLE))}"
        raise InputError(f"{path}: {problem}; export the model again")
    field_name = "signatures"
    try:
        signatures = to_record(value["signatures"], dict[str, Signature], path, "signatures")
        field_name = "sampling"
        sampling = to_record(value["sampling"], Sampling, path, "sampling")
        field_name = "files"
        files = {name: {"bytes": int(f["bytes"]), "sha256": str(f["sha256"])} for name, f in value["files"].items()}
        field_name = "condition, space" if version == FORMAT_VERSION else "family, signatures, scaling_factor, objects"
        condition, space = _described(value, path) if version == FORMAT_VERSION else _version_1(value, signatures)
        field_name = "scheduler_config, source_sha256"
        spec = Spec(
            condition=condition,
            space=space,
            sampling=sampling,
            scheduler_config=infinity_from_text(value["scheduler_config"]),
            sha256=value["source_sha256"],
            checkpoint=value.get("checkpoint"),
            image_mode=value.get("image_mode"),
            component_sha256=dict(value.get("component_sha256", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        raise InputError(f"{path}: {field_name}: malformed ({type(error).__name__}: {error})") from None
    if signatures != spec.signatures:
        name = next((n for n in (*spec.signatures, *signatures) if signatures.get(n) != spec.signatures.get(n)), "")
        raise InputError(f"{path}: signatures: {name} is not what condition and space say; export the model again")
    return Bundle(folder, spec, files, sha256_file(path))


def _described(value: Mapping[str, Any], path: Path) -> tuple[Condition, Space]:
    condition = to_record(value["condition"], Condition, path, "condition")
    return condition, to_record(value["space"], Space, path, "space")


def _sizes(tensor: TensorSpec) -> tuple[int, int, int]:
    _, channels, height, width = map(int, (0, *tensor.shape[1:]))
    return channels, height, width


def _version_1(value: Mapping[str, Any], signatures: Mapping[str, Signature]) -> tuple[Condition, Space]:
    """The condition and space of a bundle of version 1, whose family was "text" (to latents) or "labels" (to pixels)."""
    state = _sizes(signatures["unet"].inputs[0])
    if value["family"] == "labels":
        return Condition(labels=dict(value["objects"])), Space(state, state, latent=False)
    if value["family"] != "text":
        raise ValueError(f"found {value['family']!r}, expected text or labels")
    ids, (states, pooled) = signatures["text_encoder"].inputs[0], signatures["text_encoder"].outputs
    text = Text((int(ids.shape[1]),), (ids.high,), int(states.shape[2]), int(pooled.shape[1]))
    image = _sizes(signatures["vae_decoder"].outputs[0])
    return Condition(text), Space(state, image, latent=True, scaling_factor=float(value["scaling_factor"]))
