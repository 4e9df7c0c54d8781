"""Prompts -> token ids, without transformers: the `tokenizers` library on the model's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief, read_json

UNLIMITED = 10**9  # transformers' number for a tokenizer without a length is 1e30


class Tokenizer:
    """A tokenizer of transformers, such as CLIP's or T5's: ids padded and truncated to `length`, its start and end tokens kept.

    `backend` is a `tokenizers.Tokenizer` that adds the start and end tokens; `pad` the padding token's text; `vocabulary` the
    number of ids that the text encoder knows; `pad_left`, `cut_left`: ids are added or left out on the left side. A placeholder
    of textual inversion with several vectors, <cat> with <cat>_1, ... in the vocabulary, stands for all of them, as in
    diffusers.
    """

    def __init__(
        self, backend: Any, pad: str, length: int, vocabulary: int, pad_left: bool = False, cut_left: bool = False
    ) -> None:
        import tokenizers

        pad_id = backend.token_to_id(pad)
        if pad_id is None:
            raise InputError(f"tokenizer: the padding token {pad!r} is not in its vocabulary")
        self.length = length
        self._backend, self._pad_id, self._vocabulary, self._pad_left = backend, pad_id, vocabulary, pad_left
        self._vectors = _placeholders({token.content for token in backend.get_added_tokens_decoder().values()})
        backend.no_padding()
        backend.no_truncation()
        self._cutting = tokenizers.Tokenizer.from_str(backend.to_str())
        self._cutting.enable_truncation(length, direction="left" if cut_left else "right")

    @staticmethod
    def from_folder(folder: Path, length: int, vocabulary: int) -> Tokenizer:
        """Read `tokenizer.json` of a tokenizer folder and, for the padding token, the two files that may name it."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{folder / 'tokenizer.json'}: cannot be read as a tokenizer: {error}") from None
        files = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]  # the first one wins
        configs = [config for file in files if file.is_file() and isinstance(config := read_json(file), dict)]
        pad = next((pad for config in configs if (pad := config.get("pad_token"))), "<|endoftext|>")
        left = [any(config.get(f"{what}_side") == "left" for config in configs) for what in ("padding", "truncation")]
        return Tokenizer(backend, pad["content"] if isinstance(pad, dict) else pad, length, vocabulary, *left)

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """(B, length) int64 ids, and for each prompt its number of tokens before truncation (start and end included). Raises
        InputError for a token that the text encoder does not know."""
        ids = np.full((len(prompts), self.length), self._pad_id, dtype=np.int64)
        counts = []
        encodings = self._backend.encode_batch([self._expanded(prompt) for prompt in prompts])
        for row, encoding, prompt in zip(ids, encodings, prompts, strict=True):
            tokens = encoding.ids
            counts.append(len(tokens))
            if len(tokens) > self.length:
                tokens = self._cutting.encode(self._expanded(prompt)).ids
            row[slice(-len(tokens), None) if self._pad_left and tokens else slice(len(tokens))] = tokens
            if (highest := int(row.max())) >= self._vocabulary:
                problem = f"its tokenizer gives id {highest} for prompt {brief(prompt)}"
                raise InputError(
                    f"{problem}, but the text encoder knows {self._vocabulary} ids: they do not belong together"
                )
        return ids, counts

    def _expanded(self, prompt: str) -> str:
        """The prompt with all vectors of each placeholder, as diffusers' `maybe_convert_prompt` writes them."""
        present = [token for token in self._vectors if token in prompt]
        if present:
            tokens = set(self._backend.encode(prompt, add_special_tokens=False).tokens)
            for token in present:
                if token in tokens:
                    prompt = prompt.replace(token, " ".join([token, *self._vectors[token]]))
        return prompt


def _placeholders(added: set[str]) -> dict[str, list[str]]:
    """Token -> its further vectors token_1, token_2, ..., for the tokens that have any."""
    vectors: dict[str, list[str]] = {}
    for token in sorted(added):
        while (following := f"{token}_{len(vectors.get(token, ())) + 1}") in added:
            vectors.setdefault(token, []).append(following)
    return vectors
