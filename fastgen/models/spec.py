"""The facts about a model that generation needs besides its networks, the same for a model folder and a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastgen.models.condition import Condition
from fastgen.models.signatures import Signature, model_signatures, split_signatures
from fastgen.models.space import Space
from fastgen.sampling.defaults import Sampling

if TYPE_CHECKING:
    from fastgen.models.tokenizer import Tokenizer
    from fastgen.sampling.tables import SolverTable


@dataclass(frozen=True)
class Spec:
    """Facts about a diffusion model.

    `sha256`: of the weights of all networks; `component_sha256`: of each of text_encoder and vae, for what depends on them
    alone; old bundles have none. `checkpoint`: the label of a training run's weights, such as best@115; None for the model
    folder's own. `image_mode`: how training made images square, where that is recorded. `bundle_sha256`: of a bundle's record,
    see `bundle_record.record_digest`; `bundle_extends`: what it was before files were added to it; of a model folder there is
    none. `deep_feature`: (C, h, w) of the UNet's deep feature; None where the denoiser cannot be split, or a bundle lacks the
    networks of a split one.
    """

    condition: Condition
    space: Space
    sampling: Sampling
    scheduler_config: Mapping[str, Any]
    sha256: str
    checkpoint: str | None = None
    image_mode: str | None = None
    component_sha256: Mapping[str, str] = field(default_factory=dict, compare=False)  # implied by `sha256`
    bundle_sha256: str | None = field(default=None, compare=False)
    bundle_extends: tuple[str, ...] = field(default=(), compare=False)
    deep_feature: tuple[int, int, int] | None = field(default=None, compare=False)

    @cached_property
    def signatures(self) -> Mapping[str, Signature]:
        return model_signatures(self.condition, self.space)

    @cached_property
    def split_signatures(self) -> Mapping[str, Signature]:
        """Of the networks that `--cache-interval` runs; empty where there are none."""
        return {} if self.deep_feature is None else split_signatures(self.signatures["unet"], self.deep_feature)

    @cached_property
    def all_signatures(self) -> Mapping[str, Signature]:
        return {**self.signatures, **self.split_signatures}


class Source(Protocol):
    """A model folder or a bundle, from which an engine takes its networks."""

    @property
    def spec(self) -> Spec: ...

    @property
    def folder(self) -> Path | None: ...

    def prompt_tokenizers(self) -> list[Tokenizer]: ...

    def table(self, key: str) -> SolverTable: ...

    def check_split(self) -> None:
        """InputError, with what helps, where the networks of a split UNet are not there."""

    def shallow_share(self) -> float:
        """The products of the shallow network of a split UNet, as a share of the whole one's. Raises InputError where there
        is none, or where an old bundle does not state it."""
