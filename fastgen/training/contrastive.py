"""The text encoder's objective: a caption and an image of the same monster get similar vectors (Radford et al., CLIP, 2021).

Only the text encoder is saved. Its pooled output has no projection here, so that it can serve as the text's embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.training.draws import Draws
from fastgen.training.sources import draw_captions, to_signed
from fastgen.training.tasks import Task

IMAGE_SIZE = 32  # px of the image tower's input
WIDTHS = (32, 64, 128)
TEMPERATURE = 0.07
OTHER_POSE = 0.3  # target weight of a caption of the same monster in another action; the image's own captions have 1


class TextImageEncoder(nn.Module):
    """Text encoder and image tower -> unit vectors."""

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        blocks: list[nn.Module] = []
        for width_in, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            blocks += [nn.Conv2d(width_in, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            blocks += [nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.tower = nn.Sequential(*blocks)  # (b, 128, 4, 4)
        self.head = nn.Linear(WIDTHS[-1] * (IMAGE_SIZE // 2 ** len(WIDTHS)) ** 2, text_encoder.config.hidden_size)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))

    def forward(self, ids: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """ids (b, L), images (b, 3, 32, 32) -> text and image vectors (b, D) each, of length 1."""
        text = self.text_encoder(input_ids=ids).pooler_output.float()
        image = self.head(self.tower(images).flatten(1)).float()
        return functional.normalize(text, dim=1), functional.normalize(image, dim=1)


class ContrastiveTask(Task):
    """Softmax cross-entropy over the batch in both directions, with soft targets: weight 1 for all captions of the same
    monster in the same action, OTHER_POSE for those of the same monster in another action. So captions of one monster are
    never negatives, and the action still matters."""

    name = "text_encoder"
    splits_batches = False
    module: TextImageEncoder

    def __init__(
        self,
        text_encoder: Any,
        ids: np.ndarray,
        choices: Sequence[np.ndarray],
        subjects: tuple[np.ndarray, np.ndarray],
        images: np.ndarray,
        rows: tuple[np.ndarray, np.ndarray],
        device: torch.device,
    ) -> None:
        """`ids` (U, 77): the distinct captions; `choices[example]`: the indices of its captions in `ids`; `subjects`:
        for each example an index of its monster, and one of its set of captions."""
        super().__init__(TextImageEncoder(text_encoder), rows)
        self.ids, self.choices, self.subjects = ids, choices, subjects
        self.lengths = (ids == text_encoder.config.eos_token_id).argmax(axis=1) + 1  # up to the end token
        self.images, self.device = images, device

    def losses(self, module: nn.Module, rows: np.ndarray, draws: Draws) -> Tensor:
        text, image = self._vectors(module, draw_captions(self.choices, rows, draws), rows)
        scores = self.module.log_scale.clamp(max=math.log(100)).exp() * text @ image.T  # (b, b)
        targets = self._targets(rows)  # (b, b)
        text_to_image = -(targets * scores.log_softmax(dim=1)).sum(1)
        image_to_text = -(targets * scores.T.log_softmax(dim=1)).sum(1)
        entropy = torch.special.entr(targets).sum(dim=1)
        return (text_to_image + image_to_text) / 2 - entropy  # (b,), 0 at best

    def figures(self, module: nn.Module) -> dict[str, float]:
        """Of up to 64 validation images, the share whose nearest caption describes the same monster; each image's first
        caption takes part."""
        rows = self.validation_rows[:: max(1, len(self.validation_rows) // 64)][:64]
        captions = np.array([self.choices[row][0] for row in rows])
        text, image = self._vectors(module, captions, rows)
        nearest = (image @ text.T).argmax(dim=1).cpu().numpy()
        return {"retrieval": float((self.subjects[0][rows][nearest] == self.subjects[0][rows]).mean())}

    def _vectors(self, module: nn.Module, captions: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        length = int(self.lengths[captions].max())  # attention is causal: what follows the end token changes nothing
        ids = torch.from_numpy(self.ids[captions, :length]).to(self.device)
        images = to_signed(self.images[rows], self.device)
        size = (IMAGE_SIZE, IMAGE_SIZE)
        return module(ids, functional.interpolate(images, size, mode="bilinear", antialias=True))

    def _targets(self, rows: np.ndarray) -> Tensor:
        """The target probability of each pair of examples, (b, b); each row sums to 1."""
        monsters, captions = self.subjects[0][rows], self.subjects[1][rows]
        same = (captions[:, None] == captions).astype(np.float32)
        same_monster = (monsters[:, None] == monsters).astype(np.float32)
        weights = torch.from_numpy(np.maximum(same, OTHER_POSE * same_monster)).to(self.device)
        return weights / weights.sum(dim=1, keepdim=True)
