"""Prompts -> token ids, without transformers: the `tokenizers` library on the model's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgen.errors import InputError
from fastgen.files.jsonfiles import read_json


class Tokenizer:
    """CLIP's tokenizer: ids padded and truncated to `length`, the end token always kept.

    `backend` is a `tokenizers.Tokenizer` that adds the start and end tokens; `pad` the padding token's text.
    """

    def __init__(self, backend: Any, pad: str, length: int) -> None:
        pad_id = backend.token_to_id(pad)
        if pad_id is None:
            raise InputError(f"tokenizer: the padding token {pad!r} is not in its vocabulary")
        self.length = length
        self._backend, self._pad_id = backend, pad_id
        backend.no_padding()
        backend.no_truncation()

    @staticmethod
    def from_folder(folder: Path, length: int) -> Tokenizer:
        """Read `tokenizer.json` of a tokenizer folder and, for the padding token, the two files that may name it."""
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{folder / 'tokenizer.json'}: cannot be read as a tokenizer: {error}") from None
        configs = [folder / name for name in ("special_tokens_map.json", "tokenizer_config.json")]  # the first one wins
        pads = [read_json(file).get("pad_token") for file in configs if file.is_file()]
        pad = next((pad for pad in pads if pad), "<|endoftext|>")
        return Tokenizer(backend, pad["content"] if isinstance(pad, dict) else pad, length)

    def encode(self, prompts: Sequence[str]) -> tuple[np.ndarray, list[int]]:
        """(B, length) int64 ids, and for each prompt its number of tokens before truncation (start and end included)."""
        ids = np.full((len(prompts), self.length), self._pad_id, dtype=np.int64)
        counts = []
        for row, encoding in zip(ids, self._backend.encode_batch(list(prompts)), strict=True):
            tokens = encoding.ids
            counts.append(len(tokens))
            if len(tokens) > self.length:
                tokens = [*tokens[: self.length - 1], tokens[-1]]
            row[: len(tokens)] = tokens
        return ids, counts
