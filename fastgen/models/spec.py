"""What generation needs to know of a model besides running its networks: the same for a model folder and for a bundle."""

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
    `sha256`: of the weights of all its networks; `component_sha256`: of single ones (text_encoder, vae), for what depends on
    them alone. Bundles that were exported before it was recorded have none. `checkpoint`: which of a training run's weights
    were chosen, such as best@115; None for those of the model folder itself. `image_mode`: how its training made images
    square, where that is recorded.
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
    """A model folder or a bundle: where an engine takes its networks from."""

    @property
    def spec(self) -> Spec: ...

    @property
    def folder(self) -> Path | None: ...

    def prompt_tokenizer(self) -> Tokenizer: ...

    def table(self, key: str) -> SolverTable: ...
