"""What the UNet is conditioned on: prompts or label lists, as rows of an engine's arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.buckets import Batch, cut, even_size
from fastgen.requests import Request, multi_hot

if TYPE_CHECKING:
    from fastgen.engines.base import Array, Engine

ENCODE_BATCH = 16  # prompts per forward of the text encoder


class LabelConditions:
    """Label lists -> multi-hot rows (B, K); the unconditional row is all zero."""

    def __init__(self, engine: Engine, objects: Mapping[str, int]) -> None:
        self._engine, self._objects = engine, objects

    def __call__(self, requests: Sequence[Request]) -> Array:
        return self._engine.array(multi_hot(requests, self._objects))

    def uncond(self) -> Array:
        return self._engine.array(np.zeros((1, len(self._objects)), np.float32))


class PromptConditions:
    """Prompts -> text states (B, tokens, D), each distinct prompt encoded once; the unconditional row is the empty prompt.

    Distinct prompts are encoded in fixed batches of the whole job, so that a resumed job encodes them in the same company.
    """

    def __init__(self, engine: Engine, tokenizer: Any, prompts: Sequence[str], guided: bool) -> None:
        distinct = dict.fromkeys([*([""] if guided else []), *prompts])
        self._engine = engine
        self._ids, counts = tokenizer.encode(list(distinct))
        self._batches = _batches(engine, len(distinct))
        places = [(number, row) for number, batch in enumerate(self._batches) for row in range(len(batch))]
        self._place = dict(zip(distinct, places, strict=True))
        self._states: dict[int, Array] = {}
        self.truncated = {p: n for p, n in zip(distinct, counts, strict=True) if n > tokenizer.length}

    def __call__(self, requests: Sequence[Request]) -> Array:
        return self._engine.xp.stack([self._state(r.prompt or "") for r in requests])

    def uncond(self) -> Array:
        return self._state("")[None]

    def _state(self, prompt: str) -> Array:
        number, row = self._place[prompt]
        if number not in self._states:
            self._states[number] = _encode(self._engine, self._ids, self._batches[number])[0]
        return self._states[number][row]


Conditions = LabelConditions | PromptConditions


def pooled_states(
    engine: Engine, tokenizer: Any, texts: Sequence[str], done: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """The text encoder's pooled state of every text, (N, D) float32; `done(n)` hears of each batch of n texts."""
    ids, _ = tokenizer.encode(list(texts))
    parts = []
    for batch in _batches(engine, len(texts)):
        parts.append(engine.numpy(_encode(engine, ids, batch)[1])[: len(batch)].copy())
        done(len(batch))
    return np.concatenate(parts)


def _batches(engine: Engine, count: int) -> list[Batch]:
    sizes = engine.batch_sizes("text_encoder") or [even_size(count, ENCODE_BATCH)]
    return cut(count, max(sizes), sizes)


def _encode(engine: Engine, ids: np.ndarray, batch: Batch) -> tuple[Array, ...]:
    """What the text encoder says of one batch of token ids: states (B, tokens, D), pooled (B, D), perhaps padded."""
    rows = engine.array(ids[batch.rows])
    return engine.run("text_encoder", engine.padded(rows, batch.bucket) if engine.static_shapes else rows)
