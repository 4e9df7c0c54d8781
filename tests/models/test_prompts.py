"""Token ids without transformers are those of transformers' CLIPTokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen.errors import InputError
from fastgen.models.tokenizer import Tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data" / "monsters"
LENGTH, VOCABULARY = 77, 1000  # of the text model: ids are smaller
ADDED_TOKEN = {
    "__type": "AddedToken",
    "content": "!",
    "lstrip": False,
    "rstrip": False,
    "normalized": True,
}  # version 4
NASTY = [
    "",
    " ",
    "\t\n a  dragon \r\n",
    "A RED Dragon, with WINGS!!!",
    "crème brûlée naïve Ångström",
    "re\u0301sume\u0301 in two code points",
    "竜 дракон تنين ドラゴン",
    "🐉🔥👩‍👩‍👧‍👦🏳️‍🌈",
    "a\u00a0non-breaking\u200bzero\u200dwidth\ufeffspace",
    "it's don't we've I'll she'd they're",
    "<|endoftext|>",
    "a dragon <|endoftext|> after the end <|startoftext|>",
    "</w> <w> &amp; <b>bold</b>",
    "1234567890 3.14 10,000 #1 50%",
    "\x00\x01\x7f control",
    "\ud7ff\ue000\U0010ffff",
    "word " * 74,
    "word " * 75,
    "word " * 76,
    "a red dragon " * 100,
    "x" * 5000,
]


@pytest.fixture(scope="module")
def reference(text_model):
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(text_model / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(text_model):
    return Tokenizer.from_folder(text_model / "tokenizer", LENGTH, VOCABULARY)


def transformers_ids(reference, prompts):
    return reference(prompts, padding="max_length", max_length=LENGTH, truncation=True).input_ids


@pytest.mark.parametrize("prompt", NASTY)
def test_ids_are_those_of_transformers(tokenizer, reference, prompt):
    assert tokenizer.encode([prompt])[0].tolist() == transformers_ids(reference, [prompt])


@given(st.lists(st.text(max_size=200), min_size=1, max_size=4))
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_are_those_of_transformers_for_any_text(tokenizer, reference, prompts):
    assert tokenizer.encode(prompts)[0].tolist() == transformers_ids(reference, prompts)


@pytest.mark.skipif(not REAL.is_dir(), reason="the task's own files are not here")
def test_ids_are_those_of_transformers_for_the_real_prompts(tokenizer, reference):
    requests = json.loads((REAL / "test.json").read_text())
    prompts = [value["text_prompt"] for value in requests.values()]
    assert len(prompts) > 1000
    assert tokenizer.encode(prompts)[0].tolist() == transformers_ids(reference, prompts)


@pytest.mark.parametrize(("words", "tokens"), [(75, 77), (76, 78), (300, 302)])
def test_a_long_prompt_keeps_its_start_and_end_tokens_and_its_length_is_counted(tokenizer, reference, words, tokens):
    ids, counts = tokenizer.encode(["a " * words])
    assert ids.shape == (1, LENGTH)
    assert counts == [tokens]
    assert ids[0, 0] == reference.bos_token_id
    assert ids[0, -1] == reference.eos_token_id


def test_a_prompt_does_not_depend_on_those_encoded_with_it(tokenizer):
    together = tokenizer.encode(NASTY)[0]
    alone = [tokenizer.encode([prompt])[0][0].tolist() for prompt in NASTY]
    assert together.tolist() == alone


@pytest.mark.parametrize(
    ("map_pad", "config_pad"),
    [("!", "<|endoftext|>"), (None, "!"), (None, None), ({"content": "!"}, None), (None, ADDED_TOKEN)],
)
def test_the_padding_token_is_the_one_that_transformers_takes(text_model, tmp_path, map_pad, config_pad):
    """Stable Diffusion 2 pads with "!", and says so in special_tokens_map.json only."""
    from transformers import CLIPTokenizer

    shutil.copytree(text_model / "tokenizer", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(config | ({"pad_token": config_pad} if config_pad else {}))
    )
    if map_pad:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": map_pad}))
    expected = transformers_ids(CLIPTokenizer.from_pretrained(tmp_path), ["a dragon", ""])
    assert Tokenizer.from_folder(tmp_path, LENGTH, VOCABULARY).encode(["a dragon", ""])[0].tolist() == expected


def test_a_padding_token_outside_the_vocabulary_is_named(text_model, tmp_path):
    shutil.copytree(text_model / "tokenizer", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "<pad>"}')
    with pytest.raises(InputError, match="'<pad>' is not in its vocabulary"):
        Tokenizer.from_folder(tmp_path, LENGTH, VOCABULARY)


@pytest.mark.parametrize("content", [b"", b"{}", b"not json", b"\xff\xfe\x00"])
def test_a_damaged_tokenizer_is_one_line_that_names_the_file(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(InputError, match=r"tokenizer\.json: (cannot be read as a tokenizer|.*not UTF-8)") as error:
        Tokenizer.from_folder(tmp_path, LENGTH, VOCABULARY)
    assert "\n" not in str(error.value)


def test_a_placeholder_of_several_vectors_stands_for_all_of_them(text_model):
    """As diffusers' `load_textual_inversion` leaves the tokenizer, and `maybe_convert_prompt` writes the prompt."""
    from diffusers.loaders import TextualInversionLoaderMixin
    from transformers import CLIPTokenizer

    slow = CLIPTokenizer.from_pretrained(text_model / "tokenizer")
    slow.add_tokens(["<cat>", "<cat>_1", "<cat>_2", "<dog>"])
    ours = Tokenizer(slow.backend_tokenizer, slow.pad_token, LENGTH, VOCABULARY)
    for prompt in ("a <cat> on a hill", "<cat>", "a <dog>", "no placeholder", "<dog> and <cat>"):
        expected = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, slow)
        assert ours.encode([prompt])[0].tolist() == transformers_ids(slow, [expected])
    added = slow.convert_tokens_to_ids(["<cat>", "<cat>_1", "<cat>_2"])
    assert [i for i in ours.encode(["a <cat>"])[0][0].tolist() if i in added] == added


def test_ids_that_the_text_encoder_does_not_know_are_refused(text_model):
    with pytest.raises(InputError, match="but the text encoder knows 100 ids: they do not belong together"):
        Tokenizer.from_folder(text_model / "tokenizer", LENGTH, 100).encode(["a dragon"])
