"""The facts about a model that generation needs besides its networks, the same for a model folder and a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fastgen.models.signatures import Signature
from fastgen.sampling.defaults import Sampling

if TYPE_CHECKING:
    from fastgen.models.tokenizer import Tokenizer
    from fastgen.sampling.tables import SolverTable


@dataclass(frozen=True)
class Spec:
    """Facts about a conditional diffusion model.

    `scaling_factor`: diffusion latents = VAE latents x this. `objects`: label name -> index (label family).
    `sha256`: of the weights of all networks; `component_sha256`: of each of text_encoder and vae, for what depends on them
    alone; old bundles have none. `checkpoint`: the label of a training run's weights, such as best@115; None for the model
    folder's own. `image_mode`: how training made images square, where that is recorded.
    """

    family: str  # "text" | "labels"
    signatures: Mapping[str, Signature]
    sampling: Sampling
    scheduler_config: Mapping[str, Any]
    scaling_factor: float
    objects: Mapping[str, int] | None
    sha256: str
    checkpoint: str | None = None
    image_mode: str | None = None
    component_sha256: Mapping[str, str] = field(default_factory=dict, compare=False)  # implied by `sha256`

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the space that is denoised."""
        _, c, h, w = self.signatures["unet"].inputs[0].shape
        return int(c), int(h), int(w)

    @property
    def image_size(self) -> int:
        """Height and width of a generated image, in pixels."""
        network = "vae_decoder" if self.family == "text" else "unet"
        return int(self.signatures[network].outputs[0].shape[-1])


class Source(Protocol):
    """A model folder or a bundle, from which an engine takes its networks."""

    @property
    def spec(self) -> Spec: ...

    @property
    def folder(self) -> Path | None: ...

    def prompt_tokenizer(self) -> Tokenizer: ...

    def table(self, key: str) -> SolverTable: ...
