"""Model folders that lie: every one is refused in one line before anything is written."""

from __future__ import annotations

import pytest
from attacks import REMOVE, json_attacks

COMMAND = ["generate", "--model", "model", "--engine", "eager", "--prompt", "a red dragon", "--out", "out.png"]
UNET, INDEX = "model/unet/config.json", "model/model_index.json"
TEXT = [
    (INDEX, "", [], "expected an object"),
    (INDEX, "unet", REMOVE, "unet"),
    (UNET, "sample_size", "8", "sample_size"),
]


@pytest.mark.parametrize("attack", json_attacks("text", COMMAND, TEXT), ids=str)
def test_a_text_model_that_lies_is_refused(attack, refused, text_model):
    refused(attack, model=text_model)
