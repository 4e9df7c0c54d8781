"""bundle.json as a record, in both versions that fastgen reads; and the digest over its content."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from fastgen.errors import InputError
from fastgen.files.hashes import FileRecord
from fastgen.files.jsonfiles import infinity_from_text, located, read_json
from fastgen.files.names import check_relative
from fastgen.files.records import Edge, Factor, Index, Name, Record, Sha256, Width, to_record
from fastgen.models.condition import Condition, Text
from fastgen.models.signatures import Signature, TensorSpec
from fastgen.models.space import Space
from fastgen.models.spec import Spec
from fastgen.sampling.config import check_schedule
from fastgen.sampling.defaults import Sampling

FORMAT_VERSION = 2
READABLE = (1, 2)  # version 1 knew two kinds of model: text to latents, labels to pixels
DIGEST, EXTENDS = "record_sha256", "extends"
MAX_ELEMENTS = 2**30  # of one tensor of one image: 4 GiB in float32
AGAIN = "export the model again"
Weights = Literal["fp32", "fp16"]


class Contents(Record, frozen=True, kw_only=True):
    """The fields that both versions have.

    `files`: of the bundle, by their relative names. `record_sha256`: see `record_digest`; None in bundles of older versions of
    fastgen. `extends`: the digests of this bundle before files were added to it, the oldest first. `deep_feature`: there where
    the bundle has the graphs of a split UNet, with `shallow_share`, see `Source.shallow_share`. `weights`: the precision in
    which graphs that compute in fp32 keep theirs. Other fields: see `Spec`.
    """

    source_sha256: Sha256
    checkpoint: Name | None = None
    image_mode: Name | None = None
    component_sha256: dict[Name, Sha256] = msgspec.field(default_factory=dict)
    versions: dict[Name, Name] = msgspec.field(default_factory=dict)
    sampling: Sampling
    scheduler_config: dict[Name, Any]
    signatures: dict[Name, Signature]
    files: dict[Name, FileRecord]
    record_sha256: Sha256 | None = None
    extends: Annotated[tuple[Sha256, ...], Meta(max_length=10_000)] = ()
    deep_feature: tuple[Width, Edge, Edge] | None = None
    shallow_share: Annotated[float, Meta(gt=0, lt=1)] | None = None
    weights: Weights = "fp32"

    def __post_init__(self) -> None:
        places: dict[str, str] = {}
        for name in self.files:
            check_relative(name, "files")
            if (other := places.setdefault(name.casefold(), name)) != name:
                raise InputError(f"files: found {other!r} and {name!r}, which are one file on some systems")
        for name, signature in self.signatures.items():
            for tensor in (*signature.inputs, *signature.outputs):
                elements = 1
                for size in tensor.with_batch(1):
                    elements *= size
                if elements > MAX_ELEMENTS:
                    shape = list(tensor.shape)
                    raise InputError(f"signatures.{name}: {tensor.name} is {shape}, expected at most 2^30 numbers")
        if self.deep_feature is not None and math.prod(self.deep_feature) > MAX_ELEMENTS:
            raise InputError(f"deep_feature: found {list(self.deep_feature)}, expected at most 2^30 numbers")

    def described(self) -> tuple[Condition, Space]:
        """What the model is conditioned on, and where it denoises. Raises InputError."""
        raise NotImplementedError


class Version2(Contents, frozen=True, kw_only=True):
    format_version: Literal[2]
    condition: Condition
    space: Space

    def described(self) -> tuple[Condition, Space]:
        return self.condition, self.space


class Version1(Contents, frozen=True, kw_only=True):
    """`family`: "text" (to latents) or "labels" (to pixels)."""

    format_version: Literal[1]
    family: Literal["text", "labels"]
    scaling_factor: Factor = 1.0
    objects: dict[Name, Index] | None = None

    def described(self) -> tuple[Condition, Space]:
        state = self._sizes("unet", "sample")
        if self.family == "labels":
            if self.objects is None:
                raise InputError("objects: found null, expected the labels of a model of labels")
            return Condition(labels=self.objects), Space(state, state, latent=False)
        ids = self._tensor("text_encoder", "input_ids", 2)
        states = self._tensor("text_encoder", "last_hidden_state", 3)
        pooled = self._tensor("text_encoder", "pooler_output", 2)
        text = Text((ids.with_batch(1)[1],), (ids.high,), states.with_batch(1)[2], pooled.with_batch(1)[1])
        space = Space(state, self._sizes("vae_decoder", "sample"), latent=True, scaling_factor=self.scaling_factor)
        return Condition(text), space

    def _sizes(self, network: str, name: str) -> tuple[int, int, int]:
        _, channels, height, width = self._tensor(network, name, 4).with_batch(1)
        return channels, height, width

    def _tensor(self, network: str, name: str, axes: int) -> TensorSpec:
        signature = self.signatures.get(network)
        for tensor in () if signature is None else (*signature.inputs, *signature.outputs):
            if tensor.name == name and len(tensor.shape) == axes:
                return tensor
        raise InputError(f"signatures: {network} has no {name} of {axes} axes, which a bundle of version 1 has")


def read_contents(path: Path) -> tuple[Contents, str]:
    """bundle.json, and the digest over its content, which agrees with the one that it states, if it states one.

    Raises InputError that names the field when it is malformed, of a foreign version, or was changed.
    """
    value = read_json(path)
    version = value.get("format_version") if isinstance(value, dict) else value
    if not isinstance(value, dict) or type(version) is not int or version not in READABLE:
        readable = " and ".join(map(str, READABLE))
        raise InputError(f"{path}: format_version is {version!r:.60}, this fastgen reads {readable}; {AGAIN}")
    contents: Contents = to_record(value, Version2 if version == FORMAT_VERSION else Version1, path)
    digest = record_digest(value)
    if contents.record_sha256 not in (None, digest):
        found = f"the content has {digest[:12]}..., expected {str(contents.record_sha256)[:12]}..."
        raise InputError(f"{path}: {DIGEST}: {found}: the file was changed after the export; {AGAIN}")
    return contents, digest


def spec_of(contents: Contents, digest: str, path: Path) -> Spec:
    """The model's facts. Raises InputError where the networks' signatures are not those of the condition and the space."""
    with located(path):
        condition, space = contents.described()
        spec = Spec(
            condition=condition,
            space=space,
            sampling=contents.sampling,
            scheduler_config=check_schedule(infinity_from_text(contents.scheduler_config), "scheduler_config"),
            sha256=contents.source_sha256,
            checkpoint=contents.checkpoint,
            image_mode=contents.image_mode,
            component_sha256=contents.component_sha256,
            bundle_sha256=digest,
            bundle_extends=contents.extends,
            deep_feature=contents.deep_feature,
        )
        stated, derived = contents.signatures, spec.signatures
        if stated != derived:
            name = next((n for n in (*derived, *stated) if stated.get(n) != derived.get(n)), "")
            raise InputError(f"signatures: {name} is not what condition and space say; {AGAIN}")
    return spec


def record_digest(value: Mapping[str, Any]) -> str:
    """Hex SHA-256 of bundle.json's value without its digest: of its JSON in ASCII, with sorted keys and without spaces."""
    rest = {key: field for key, field in value.items() if key != DIGEST}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """bundle.json's value with its digest."""
    return {**value, DIGEST: record_digest(value)}
