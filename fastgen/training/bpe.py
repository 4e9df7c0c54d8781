"""Training a byte-level BPE tokenizer in CLIP's format (https://github.com/openai/CLIP/blob/main/clip/simple_tokenizer.py)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fastgen.errors import InputError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
END_OF_WORD = "</w>"


def train_tokenizer(texts: Iterable[str], vocab_size: int, length: int = 77) -> CLIPTokenizer:
    """Learn at most `vocab_size` tokens from the texts: 256 bytes, the same 256 at the end of a word, merges that occur at
    least twice, `<|startoftext|>`, `<|endoftext|>` (also the padding). Every text can be encoded. The same texts give the
    same ids.

    The end token has the highest id, as in OpenAI's vocabulary: transformers looks for it by its id, or takes the highest id.
    Raises InputError when `vocab_size` leaves no room for the bytes.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
    if vocab_size < len(symbols) + 2:
        raise InputError(f"text_encoder.config.vocab_size = {vocab_size}: expected at least {len(symbols) + 2}")
    template = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer, learner.pre_tokenizer = template.normalizer, template.pre_tokenizer
    # The symbols go in as "special tokens" because that fixes their ids; those of the trainer's own alphabet depend on the
    # order of a hash map, and ties between merges are broken by id.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=symbols,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    learner.train_from_iterator(sorted(set(texts)), trainer)
    vocabulary = learner.get_vocab()
    merged = sorted(vocabulary, key=vocabulary.__getitem__)[len(symbols) :]
    ids = {token: index for index, token in enumerate([*symbols, *merged, START, END])}
    merges: Any = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=length)
