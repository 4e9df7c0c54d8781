"""torch.compile in training: its gradients are checked, and every layer of a compiled network learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from test_trainer import CPU, RECIPE, SCHEDULE, TinyUNet, diffusion_task, trained
from torch import Tensor, nn

from fastgen.errors import FastgenError
from fastgen.models.build import build_module
from fastgen.training.diffusion import DiffusionTask
from fastgen.training.sources import LabelSource, PixelSpace

pytestmark = pytest.mark.slow  # code is generated and compiled
COMPILED = replace(RECIPE, steps=4, compile=True)
CONFIG: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 8,
}


class Detached(TinyUNet):
    """Loses a gradient when it is compiled, as a faulty compiler would."""

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        embedding = self.condition(torch.cat([labels, timesteps[:, None] / 100], dim=1))
        if torch.compiler.is_compiling():
            embedding = embedding.detach()
        return self.outer(torch.tanh(self.dropout(self.inner(x)) + embedding[:, :, None, None]))


class Rounded(TinyUNet):
    """Half a gradient too much in bf16 without compilation, as where rounding adds up; right in fp32 and when compiled."""

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        embedding = self.condition(torch.cat([labels, timesteps[:, None] / 100], dim=1))
        if torch.is_autocast_enabled("cpu") and not torch.compiler.is_compiling():
            embedding = 1.5 * embedding - 0.5 * embedding.detach()
        return self.outer(torch.tanh(self.dropout(self.inner(x)) + embedding[:, :, None, None]))


class WithTokens(nn.Module):
    """diffusers' UNet with a token of 8 numbers in cross-attention: (b, 3, 8, 8), (b,), (b, 8) -> (b, 3, 8, 8)."""

    def __init__(self) -> None:
        from diffusers import UNet2DConditionModel

        super().__init__()
        self.unet = build_module(UNet2DConditionModel, CONFIG, "unet", 0)

    def forward(self, x: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        return self.unet(x, timesteps, labels[:, None], return_dict=False)[0]


@pytest.mark.parametrize(("dropout", "precision"), [(0.0, "bf16"), (0.1, "fp32")])
def test_gradients_that_the_compiler_loses_are_one_line(tmp_path: Path, dropout: float, precision: str) -> None:
    task = diffusion_task(dropout)
    task.module.__class__ = Detached
    with pytest.raises(
        FastgenError, match=r"other gradients than the network itself: condition\.weight by 100%"
    ) as raised:
        trained(tmp_path, COMPILED, task, precision)
    assert "\n" not in str(raised.value)
    assert "train with compile = false" in str(raised.value)
    assert not (tmp_path / "checkpoints").exists()


def test_a_compiled_gradient_that_is_nearer_to_fp32_than_the_networks_own_passes(tmp_path: Path) -> None:
    task = diffusion_task(0.0)
    task.module.__class__ = Rounded
    weights = {name: weight.detach().clone() for name, weight in task.module.named_parameters()}
    found = trained(tmp_path, COMPILED, task, "bf16")
    assert not any(torch.equal(found[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_network_that_compiles_rightly_passes_with_its_weights_as_they_were(tmp_path: Path, dropout: float) -> None:
    task = diffusion_task(dropout)
    with torch.no_grad():
        task.module.outer.weight.zero_()
    eager = diffusion_task(dropout)
    eager.module.load_state_dict(task.module.state_dict())
    expected = trained(tmp_path / "eager", replace(COMPILED, compile=False), eager)
    found = trained(tmp_path / "compiled", COMPILED, task)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-6)


def test_every_layer_of_a_compiled_unet_learns(tmp_path: Path) -> None:
    precision = "bf16"  # in which torch 2.13 loses gradients with its defaults
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 8, 8, 3), np.uint8), rng.random((40, 8), np.float32)
    module = WithTokens()
    zeros = [name for name, weight in module.named_parameters() if not weight.any() and name.endswith("weight")]
    task = DiffusionTask(
        module,
        PixelSpace(images, CPU),
        LabelSource(labels, CPU),
        SCHEDULE,
        (np.arange(30), np.arange(30, 40)),
        dropout=0.1,
        flip=True,
    )
    found = trained(tmp_path, COMPILED, task, precision)
    assert {name.split(".")[1] for name in zeros} == {"down_blocks", "mid_block", "up_blocks", "conv_out"}
    assert [name for name in zeros if not found[name].any()] == []


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    import torch._inductor.config as options

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    with options.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


def test_without_a_compiler_it_is_one_line_that_says_so(tmp_path: Path, no_compiler: None) -> None:
    with pytest.raises(
        FastgenError, match=r"^unet: torch\.compile does not work here: .*ompiler.*; train with"
    ) as raised:
        trained(tmp_path / "run", COMPILED)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", ["no compiler", "other gradients"])
def test_where_compilation_is_not_demanded_training_goes_on_without_it(
    tmp_path: Path, fault: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    expected = trained(tmp_path / "eager", replace(COMPILED, compile=False))
    task = diffusion_task()
    if fault == "no compiler":
        request.getfixturevalue("no_compiler")
    else:
        task.module.__class__ = Detached
    monkeypatch.setattr("fastgen.training.compiling.AUTO_STEPS", COMPILED.steps)
    found = trained(tmp_path / "auto", replace(COMPILED, compile="auto"), task)
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "torch.compile" in line]
    assert line.startswith("note: unet: torch.compile ")
    assert line.endswith("; training goes on without it")


def test_a_short_run_is_not_compiled_unless_it_must(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(*_: Any, **__: Any) -> None:
        raise AssertionError("compiled")

    monkeypatch.setattr(nn.Module, "compile", compiled)
    trained(tmp_path / "auto", replace(COMPILED, compile="auto"))
    with pytest.raises(AssertionError, match="compiled"):
        trained(tmp_path / "must", COMPILED)
