"""Prompts or label lists -> the conditions that the UNet sees, as arrays of an engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastgen.engines.batches import Batch, cut, even_size
from fastgen.errors import InputError
from fastgen.generate.requests import Request, multi_hot

if TYPE_CHECKING:
    from fastgen.engines.base import Array, Engine
    from fastgen.models.spec import Spec

ENCODE_BATCH = 16  # prompts per forward of the text encoder
STATE_BYTES = 2**28  # 1,700 prompts of 77 tokens, 512 wide: ten batches of a large job


class LabelConditions:
    """Label lists -> multi-hot rows (B, K); the unconditional row is all zero."""

    texts: Sequence[str] = ()
    truncated: Mapping[str, int] = {}

    def __init__(self, engine: Engine, objects: Mapping[str, int]) -> None:
        self._engine, self._objects = engine, objects

    def __call__(self, requests: Sequence[Request]) -> Array:
        return self._engine.array(multi_hot(requests, self._objects))

    def uncond(self) -> Array:
        return self._engine.array(np.zeros((1, len(self._objects)), np.float32))


class PromptConditions:
    """Prompts -> text states (B, tokens, D); the unconditional row is the empty prompt.

    The batches of the text encoder are fixed by the prompts of the whole job: a resumed job encodes each prompt in the same
    batch, hence to the same bits. A batch runs when it is first needed. The latest ones stay on the engine's device, up to
    `state_bytes` (at least one batch); older ones are encoded again. `texts`: each prompt once; `truncated`: prompt -> its
    number of tokens, for prompts that are too long for the text encoder.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, prompts: Sequence[str], guided: bool, state_bytes: int = STATE_BYTES
    ) -> None:
        distinct = dict.fromkeys([*([""] if guided else []), *prompts])
        self._engine = engine
        self.texts = list(distinct)
        self._ids, counts = tokenizer.encode(self.texts)
        self._batches = _batches(engine, len(distinct))
        places = [(number, row) for number, batch in enumerate(self._batches) for row in range(len(batch))]
        self._place = dict(zip(distinct, places, strict=True))
        self._states: OrderedDict[int, Array] = OrderedDict()  # number of a batch -> its states; the latest at the end
        self._state_bytes = state_bytes
        self._uncond: Array | None = None
        self.truncated = {p: n for p, n in zip(distinct, counts, strict=True) if n > tokenizer.length}

    def __call__(self, requests: Sequence[Request]) -> Array:
        return self._engine.xp.stack([self._state(r.prompt or "") for r in requests])

    def uncond(self) -> Array:
        """(1, tokens, D)"""
        if self._uncond is None:  # stack copies: a view would keep the whole batch in memory
            self._uncond = self._engine.xp.stack([self._state("")])
        return self._uncond

    def _state(self, prompt: str) -> Array:
        number, row = self._place[prompt]
        if number not in self._states:
            self._states[number] = _encode(self._engine, self._ids, self._batches[number])[0]
            while len(self._states) > 1 and sum(s.nbytes for s in self._states.values()) > self._state_bytes:
                self._states.popitem(last=False)
        self._states.move_to_end(number)
        return self._states[number][row]


Conditions = LabelConditions | PromptConditions


def conditions_for(engine: Engine, spec: Spec, tokenizer: Any, requests: Sequence[Request], guided: bool) -> Conditions:
    """The conditions of all requests of a run. Raises InputError as `check_kind` does."""
    check_kind(requests, spec.family)
    if spec.family == "text":
        return PromptConditions(engine, tokenizer, [r.prompt or "" for r in requests], guided)
    return LabelConditions(engine, spec.objects or {})


def check_kind(requests: Sequence[Request], family: str) -> None:
    """InputError for requests of another kind than a model of this family takes."""
    for request in requests:
        if request.kind != family:
            takes = "prompts" if family == "text" else "labels"
            raise InputError(f"request {request.id} holds {request.kind}; this model takes {takes}")


def pooled_states(
    engine: Engine, tokenizer: Any, texts: Sequence[str], done: Callable[[int], None] = lambda count: None
) -> np.ndarray:
    """The text encoder's pooled state of every text, (N, D) float32. `done(n)` is called after each batch of n texts."""
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
    """The text encoder on one batch of token ids: states (B, tokens, D) and pooled states (B, D), of B = bucket rows where
    the engine has static shapes."""
    rows = engine.array(ids[batch.rows])
    return engine.run("text_encoder", engine.padded(rows, batch.bucket) if engine.static_shapes else rows)
