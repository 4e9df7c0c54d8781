"""Prompts, labels and classes -> the conditions that the denoiser sees, as arrays of an engine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastgen.engines.batches import Batch, cut, even_size
from fastgen.errors import InputError
from fastgen.files.jsonfiles import located
from fastgen.generate.requests import Request, multi_hot

if TYPE_CHECKING:
    from fastgen.engines.base import Array, Engine
    from fastgen.models.condition import Condition
    from fastgen.models.tokenizer import Tokenizer

ENCODE_BATCH = 16  # prompts per forward of the text encoder
STATE_BYTES = 2**28  # 1,700 prompts of 77 tokens, 512 wide: ten batches of a large job


class PromptConditions:
    """Prompts -> text states (B, tokens, D) and pooled states (B, P); the unconditional row is the empty prompt.

    The batches of the text encoder are fixed by the prompts of the whole job: a resumed job encodes each prompt in the same
    batch, hence to the same bits. A batch runs when it is first needed. The latest ones stay on the engine's device, up to
    `state_bytes` (at least one batch); older ones are encoded again. `texts`: each prompt once; `truncated`: prompt -> its
    number of tokens, for prompts that are too long for the text encoder.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizers: Sequence[Tokenizer],
        prompts: Sequence[str],
        guided: bool,
        state_bytes: int = STATE_BYTES,
    ) -> None:
        distinct = dict.fromkeys([*([""] if guided else []), *prompts])
        self._engine = engine
        self.texts = list(distinct)
        self._ids, self.truncated = token_ids(tokenizers, self.texts)
        self._batches = _batches(engine, len(distinct))
        places = [(number, row) for number, batch in enumerate(self._batches) for row in range(len(batch))]
        self._place = dict(zip(distinct, places, strict=True))
        # Number of a batch -> its states (B, tokens, D) and pooled states (B, P); the latest at the end.
        self._states: OrderedDict[int, tuple[Array, ...]] = OrderedDict()
        self._state_bytes = state_bytes
        self._uncond: list[Array] | None = None

    def __call__(self, requests: Sequence[Request]) -> list[Array]:
        """States (B, tokens, D) and pooled states (B, P)."""
        return self._stacked([r.prompt or "" for r in requests])

    def uncond(self) -> list[Array]:
        """(1, tokens, D) and (1, P)"""
        if self._uncond is None:
            self._uncond = self._stacked([""])
        return self._uncond

    def _stacked(self, prompts: Sequence[str]) -> list[Array]:
        """`stack` copies: a view would keep a whole batch in memory."""
        rows = [self._state(prompt) for prompt in prompts]
        return [self._engine.xp.stack(list(column)) for column in zip(*rows, strict=True)]

    def _state(self, prompt: str) -> tuple[Array, ...]:
        number, row = self._place[prompt]
        if number not in self._states:
            self._states[number] = _encode(self._engine, self._ids, self._batches[number])
            while len(self._states) > 1 and self._bytes() > self._state_bytes:
                self._states.popitem(last=False)
        self._states.move_to_end(number)
        return tuple(array[row] for array in self._states[number])

    def _bytes(self) -> int:
        return sum(array.nbytes for arrays in self._states.values() for array in arrays)


class Conditions:
    """The conditions of a run's requests: arrays in the order of `Condition.inputs`, and their unconditional rows.

    `guidance_scale` of the run is itself a condition of a distilled model. Unconditional are: the empty prompt (or zeros), no
    label, the class id that stands for none. What has no unconditional value keeps the request's own. `texts`: each prompt
    once; `truncated`: see `PromptConditions`. Raises InputError for requests that this model does not take."""

    def __init__(
        self,
        engine: Engine,
        condition: Condition,
        tokenizers: Sequence[Tokenizer],
        requests: Sequence[Request],
        guidance_scale: float,
    ) -> None:
        check_requests(requests, condition)
        condition.check_guided(guidance_scale)
        self._engine, self._condition = engine, condition
        self.guided = guidance_scale != 1.0 and not condition.guidance_width
        self._prompts: PromptConditions | None = None
        if condition.text is not None:
            empty = self.guided and not condition.text.zero_unconditional
            self._prompts = PromptConditions(engine, tokenizers, [r.prompt or "" for r in requests], empty)
        self._guidance = (
            guidance_embedding(guidance_scale, condition.guidance_width) if condition.guidance_width else None
        )

    @property
    def texts(self) -> Sequence[str]:
        return self._prompts.texts if self._prompts else ()

    @property
    def truncated(self) -> Mapping[str, int]:
        return self._prompts.truncated if self._prompts else {}

    def __call__(self, requests: Sequence[Request]) -> tuple[Array, ...]:
        """Arrays (B, ...)."""
        arrays: list[Array] = []
        if self._prompts is not None:
            arrays += self._prompts(requests)[: self._text_inputs]
        arrays += [self._engine.array(values) for values in self._labels(requests)]
        if self._guidance is not None:
            arrays.append(self._engine.array(np.repeat(self._guidance[None], len(requests), axis=0)))
        return tuple(arrays)

    def uncond(self, requests: Sequence[Request]) -> tuple[Array, ...]:
        """Arrays (1, ...), or (B, ...) where each request keeps its own."""
        condition = self._condition
        arrays: list[Array] = []
        if self._prompts is not None and condition.text is not None:
            if condition.text.zero_unconditional:
                shapes = [[1, *map(int, shape[1:])] for _, _, shape, _ in condition.inputs[: self._text_inputs]]
                arrays += [self._engine.array(np.zeros(shape, np.float32)) for shape in shapes]
            else:
                arrays += self._prompts.uncond()[: self._text_inputs]
        if condition.labels is not None:
            arrays.append(self._engine.array(np.zeros((1, len(condition.labels)), np.float32)))
        elif condition.null_class is not None:
            arrays.append(self._engine.array(np.array([condition.null_class], np.int64)))
        else:
            arrays += [self._engine.array(values) for values in self._labels(requests)]
        return tuple(arrays)

    @property
    def _text_inputs(self) -> int:
        text = self._condition.text
        return 0 if text is None else 2 if text.pooled_input else 1

    def _labels(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Multi-hot rows (B, K) float32, class ids (B,) int64 or numbers (B,) float32; none for a model without these."""
        condition = self._condition
        if condition.labels is not None:
            return [multi_hot(requests, condition.labels)]
        if condition.classes is not None:
            return [np.array([condition.class_id(r.labels or ()) for r in requests], np.int64)]
        if condition.number:
            return [np.array([condition.numeric(r.labels or ()) for r in requests], np.float32)]
        return []


def guidance_embedding(guidance_scale: float, width: int) -> np.ndarray:
    """(width,) float32: sinusoids of 1000 * (guidance scale - 1), as diffusers' `get_guidance_scale_embedding` gives them for
    LCM (https://arxiv.org/abs/2310.04378)."""
    half = width // 2
    frequencies = np.exp(-np.arange(half, dtype=np.float32) * np.float32(np.log(10000.0) / (half - 1)))
    angles = np.float32((guidance_scale - 1.0) * 1000.0) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2, np.float32)]).astype(np.float32)


def check_requests(requests: Sequence[Request], condition: Condition) -> None:
    """InputError for requests of another kind than this model takes, and for labels that it does not know."""
    for request in requests:
        if request.kind != condition.kind:
            raise InputError(f"request {request.id} holds {request.kind}; this model takes {condition.takes}")
        if request.labels is not None:
            with located(f"request {request.id}"):
                condition.check_labels(request.labels)


def token_ids(tokenizers: Sequence[Tokenizer], texts: Sequence[str]) -> tuple[list[np.ndarray], dict[str, int]]:
    """The token ids (N, tokens) of each tokenizer; and text -> its number of tokens, for texts that are too long."""
    ids: list[np.ndarray] = []
    long: dict[str, int] = {}
    for tokenizer in tokenizers:
        rows, counts = tokenizer.encode(texts)
        ids.append(rows)
        for text, count in zip(texts, counts, strict=True):
            if count > tokenizer.length:
                long[text] = max(count, long.get(text, 0))
    return ids, long


def pooled_states(
    engine: Engine,
    tokenizers: Sequence[Tokenizer],
    texts: Sequence[str],
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """The text encoder's pooled state of every text, (N, D) float32. `done(n)` is called after each batch of n texts."""
    ids, _ = token_ids(tokenizers, list(texts))
    parts = []
    for batch in _batches(engine, len(texts)):
        parts.append(engine.numpy(_encode(engine, ids, batch)[1])[: len(batch)].copy())
        done(len(batch))
    return np.concatenate(parts)


def _batches(engine: Engine, count: int) -> list[Batch]:
    sizes = engine.batch_sizes("text_encoder") or [even_size(count, ENCODE_BATCH)]
    return cut(count, max(sizes), sizes)


def _encode(engine: Engine, ids: Sequence[np.ndarray], batch: Batch) -> tuple[Array, ...]:
    """The text encoder on one batch of token ids: states (B, tokens, D) and pooled states (B, D), of B = bucket rows where
    the engine has static shapes."""
    rows = [engine.array(part[batch.rows]) for part in ids]
    return engine.run("text_encoder", *(engine.padded(r, batch.bucket) if engine.static_shapes else r for r in rows))
