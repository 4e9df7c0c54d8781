"""Previews during training: ground truth, the same conditions generated, the preset's own prompts or labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastgen.errors import InputError
from fastgen.files import png
from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.presets import NetworkPreset, Preset, Training, load_preset
from fastgen.sampling.compile import TableCompiler
from fastgen.sampling.defaults import Sampling
from fastgen.training.autocast import choose
from fastgen.training.previews import (
    COUNT,
    PresetConditions,
    default_table,
    fixed_labels,
    fixed_prompts,
    preview_rows,
    sampled_preview,
)
from fastgen.training.sources import LabelSource, PixelSpace

CPU = torch.device("cpu")
SCHEDULE = {"_class_name": "DDIMScheduler", "prediction_type": "sample", "clip_sample": False}
TEXTS = ["one", "two", "three"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Painter(nn.Module):
    """Knows that the labels are the colour: (b, 3, 8, 8), (b,), (b, 3) -> (b, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        self.batches.append(len(x))
        return (2 * labels - 1)[:, :, None, None].expand(x.shape)


def preview(fixed: PresetConditions | None) -> tuple[np.ndarray, Painter]:
    labels = np.eye(3, dtype=np.float32)
    png = np.full((3, 8, 8, 3), 128, np.uint8)
    png[:, :4] = 40
    sources = PixelSpace(png, CPU), LabelSource(labels, CPU)
    painter = Painter()
    draw = sampled_preview(
        *sources, np.arange(3), TEXTS, SCHEDULE, Sampling("ddim", 3, 1.0), choose("fp32", "cpu"), fixed
    )
    first, again = draw(painter), draw(painter)
    assert np.array_equal(np.asarray(first), np.asarray(again))
    return np.asarray(first), painter


def sheet(*rows: list[tuple[Any, str]]) -> np.ndarray:
    pictures = [[Image.fromarray(image) for image, _ in row] for row in rows]
    return np.asarray(png.sheet(pictures, [[text for _, text in row] for row in rows], cell=96))


def test_ground_truth_is_above_what_is_generated_for_the_same_conditions_and_the_presets_own_below() -> None:
    truth = np.full((8, 8, 3), 128, np.uint8)
    truth[:4] = 40
    colours = [np.full((8, 8, 3), 255 * np.eye(3, dtype=np.uint8)[i], np.uint8) for i in range(3)]
    real = [(truth, f"real: {text}") for text in TEXTS]
    expected = real, list(zip(colours, TEXTS, strict=True))
    assert np.array_equal(preview(None)[0], sheet(*expected))
    yellow = np.full((8, 8, 3), (255, 255, 0), np.uint8)
    own = PresetConditions((torch.tensor([[1.0, 1.0, 0.0]] * 11),), tuple(f"yellow {i}" for i in range(11)))
    found, painter = preview(own)
    cells = [(yellow, f"yellow {i}") for i in range(11)]
    assert np.array_equal(found, sheet(*expected, cells[:COUNT], cells[COUNT:]))
    assert set(painter.batches) == {3, COUNT}  # never more at a time than fit beside each other


def test_examples_shown_are_spread_over_the_validation_rows() -> None:
    assert preview_rows(np.arange(100, 171)).tolist() == [100, 110, 120, 130, 140, 150, 160, 170]
    assert preview_rows(np.array([7, 5])).tolist() == [7, 5]


def test_a_preview_samples_with_the_table_that_generate_compiles_also_at_every_training_timestep() -> None:
    preset = load_preset("monsters-ddim", ["sampling.num_inference_steps=1000"])
    table, expected = (
        default_table(preset.scheduler, preset.sampling),
        TableCompiler(preset.scheduler).table("ddim:1000"),
    )
    assert table.timesteps.tolist() == list(range(999, -1, -1)) == expected.timesteps.tolist()
    assert np.array_equal(table.a, expected.a)


def preset(**preview: Any) -> Preset:
    network, schedule = NetworkPreset(config={"a": 1}, train=Training(steps=1)), {"_class_name": "DDPMScheduler"}
    if "labels" in preview:
        return Preset("p", 8, "pad", network, schedule, conditioner={"kind": "concat"}, preview=preview)
    parts = {"text_encoder": network, "vae": network}
    return Preset("p", 8, "pad", network, schedule, preview=preview, **parts)


def test_the_presets_prompts_and_labels_are_read_as_they_are() -> None:
    assert fixed_prompts(preset()) == ()
    assert fixed_prompts(preset(prompts=["A red bat.", "東"])) == ("A red bat.", "東")
    lists = [["gray cube"], ["red cube", "blue sphere"]]
    assert fixed_labels(preset(labels=lists), ICLEVR_OBJECTS) == (("gray cube",), ("red cube", "blue sphere"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompts": "A bat."}, r"preview\.prompts: found 'A bat\.', expected a list"),
        ({"prompts": ["a", 5]}, r"preview\.prompts: entry 2: found 5"),
        ({"prompts": [" "]}, r"preview\.prompts: entry 1: is empty"),
        ({"prompts": ["x"] * 65}, "up to 64"),
        ({"labels": [["gray cube"], ["red cub"]]}, r"preview\.labels: entry 2: .*did you mean 'red cube'"),
        ({"labels": ["red cube"]}, r"preview\.labels: entry 1: labels: found 'red cube'"),
        ({"labels": [[]]}, r"preview\.labels: entry 1: labels: found \[\]"),
    ],
)
def test_preview_conditions_that_cannot_be_drawn_are_one_line(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        fixed_prompts(preset(**given)) if "prompts" in given else fixed_labels(preset(**given), ICLEVR_OBJECTS)
    assert "\n" not in str(raised.value)
