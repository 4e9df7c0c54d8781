"""Prompts -> token ids, without transformers: the `tokenizers` library on the model's own tokenizer.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta

from fastgen.errors import InputError, first_line
from fastgen.files.jsonfiles import brief, read_text
from fastgen.files.quiet import no_panics
from fastgen.files.records import Name, Record, read_record

UNLIMITED = 10**9  # transformers' number for a tokenizer without a length is 1e30
LONGEST = 65_536  # tokens of a prompt
BACKEND = "tokenizer.json"
CONFIGS = ("special_tokens_map.json", "tokenizer_config.json")

Side = Literal["left", "right"]


class AddedToken(Record, frozen=True, forbid_unknown_fields=False):
    """A token beside those of the vocabulary."""

    content: Name


class TokenizerConfig(Record, frozen=True, forbid_unknown_fields=False):
    """What fastgen and transformers read of a tokenizer's tokenizer_config.json, or special_tokens_map.json."""

    model_max_length: Annotated[float, Meta(ge=2, le=1e31)] | None = None
    tokenizer_class: Name | None = None
    pad_token: Name | AddedToken | None = None
    bos_token: Name | AddedToken | None = None
    eos_token: Name | AddedToken | None = None
    unk_token: Name | AddedToken | None = None
    padding_side: Side | None = None
    truncation_side: Side | None = None
    added_tokens_decoder: dict[Annotated[str, Meta(pattern="^[0-9]{1,7}$")], AddedToken] | None = None
    additional_special_tokens: tuple[Name | AddedToken, ...] | None = None
    auto_map: None = None

    def __post_init__(self) -> None:
        length = self.model_max_length
        if length is not None and (length % 1 or LONGEST < length < UNLIMITED):
            expected = f"a whole number from 2 to {LONGEST}, or 1e30 where there is no limit"
            raise ValueError(f"model_max_length: found {length:g}, expected {expected}")

    @property
    def sides(self) -> tuple[Side | None, Side | None]:
        """Where it pads, and where it truncates."""
        return self.padding_side, self.truncation_side


def read_configs(folder: Path) -> list[TokenizerConfig]:
    """The files of a tokenizer folder that name its special tokens. Raises InputError."""
    return [read_record(folder / name, TokenizerConfig) for name in CONFIGS if (folder / name).is_file()]


def read_backend(file: Path) -> Any:
    """The `tokenizers.Tokenizer` in tokenizer.json. Raises InputError."""
    import tokenizers

    text = read_text(file)
    try:
        with no_panics():
            return tokenizers.Tokenizer.from_str(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exception, and a panic is not even that
        raise InputError(f"{file}: cannot be read as a tokenizer: {first_line(error)[:120]}") from None


def check_tokenizer_files(folder: Path) -> str | None:
    """The `tokenizer_class` of a tokenizer folder, after its files were read. Raises InputError."""
    if (folder / BACKEND).exists():
        read_backend(folder / BACKEND)
    return next((config.tokenizer_class for config in read_configs(folder) if config.tokenizer_class), None)


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
        backend = read_backend(folder / BACKEND)
        configs = read_configs(folder)  # the first one that names it wins
        pad = next((config.pad_token for config in configs if config.pad_token), "<|endoftext|>")
        text = pad if isinstance(pad, str) else pad.content
        left = [any(side == "left" for side in sides) for sides in zip(*(c.sides for c in configs), strict=True)]
        return Tokenizer(backend, text, length, vocabulary, *left)

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
