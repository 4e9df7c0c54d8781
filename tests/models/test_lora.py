"""LoRA weights are fused as W + scale * alpha / rank * up @ down, whatever the keys; what does not fit changes nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastgen.errors import InputError
from fastgen.models.lora import METADATA, Lora, fuse, parse_loras

RANK = 2


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(6, 4), "to_out": nn.ModuleList([nn.Linear(4, 6)])})
        self.conv_in = nn.Conv2d(3, 5, 3)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.text_model = nn.ModuleDict({"q_proj": nn.Linear(8, 8)})


@pytest.fixture
def networks() -> tuple[Denoiser, Encoder]:
    torch.manual_seed(0)
    return Denoiser(), Encoder()


def pair(out: int, inside: int, *kernel: int) -> tuple[Tensor, Tensor]:
    """down (RANK, inside, ...) and up (out, RANK, 1, ...)"""
    generator = torch.Generator().manual_seed(out)
    down = torch.randn(RANK, inside, *kernel, generator=generator)
    return down, torch.randn(out, RANK, *[1] * len(kernel), generator=generator)


def lora(folder: Path, state: dict[str, Tensor], scale: float = 1.0, settings: dict[str, Any] | None = None) -> Lora:
    file = folder / "lora.safetensors"
    save_file(state, file, metadata={METADATA: json.dumps(settings)} if settings else None)
    return Lora(file, scale, "0" * 64)


def fused(found: Lora, networks: tuple[nn.Module, nn.Module]) -> dict[str, Tensor]:
    """The change of each weight that changed."""
    weights = {f"{i}.{name}": p for i, network in enumerate(networks) for name, p in network.named_parameters()}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    fuse(found, networks[0], networks[1:])
    return {name: w.detach() - before[name] for name, w in weights.items() if not torch.equal(w, before[name])}


@pytest.mark.parametrize(
    ("down_key", "up_key"),
    [
        ("unet.attn.to_q.lora_A.weight", "unet.attn.to_q.lora_B.weight"),
        ("transformer.attn.to_q.lora_A.default.weight", "transformer.attn.to_q.lora_B.default.weight"),
        ("unet.attn.to_q.lora.down.weight", "unet.attn.to_q.lora.up.weight"),
        ("attn.to_q.lora_A.weight", "attn.to_q.lora_B.weight"),
        ("unet.attn.processor.to_q_lora.down.weight", "unet.attn.processor.to_q_lora.up.weight"),
        ("lora_unet_attn_to_q.lora_down.weight", "lora_unet_attn_to_q.lora_up.weight"),
    ],
)
def test_every_way_of_writing_the_keys_is_the_same_sum(tmp_path, networks, down_key, up_key) -> None:
    down, up = pair(4, 6)
    changes = fused(lora(tmp_path, {down_key: down, up_key: up}, scale=0.7), networks)
    assert list(changes) == ["0.attn.to_q.weight"]
    torch.testing.assert_close(changes["0.attn.to_q.weight"], 0.7 * up @ down, atol=1e-6, rtol=1e-5)


def test_the_processors_output_is_the_first_of_to_out(tmp_path, networks) -> None:
    down, up = pair(6, 4)
    key = "unet.attn.processor.to_out_lora"
    changes = fused(lora(tmp_path, {f"{key}.down.weight": down, f"{key}.up.weight": up}), networks)
    torch.testing.assert_close(changes["0.attn.to_out.0.weight"], up @ down, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("key", ["lora_te_text_model_q_proj", "lora_te1_text_model_q_proj"])
def test_kohyas_alpha_is_divided_by_the_rank(tmp_path, networks, key) -> None:
    down, up = pair(8, 8)
    state = {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(5.0)}
    changes = fused(lora(tmp_path, state, scale=-1.5), networks)
    expected = -1.5 * 5.0 / RANK * up @ down
    torch.testing.assert_close(changes["1.text_model.q_proj.weight"], expected, atol=1e-6, rtol=1e-5)


def test_a_convolution_is_fused_over_its_kernel(tmp_path, networks) -> None:
    down, up = pair(5, 3, 3, 3)
    state = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_up.weight": up}
    changes = fused(lora(tmp_path, state), networks)
    expected = torch.einsum("orxy,rikl->oikl", up, down)
    torch.testing.assert_close(changes["0.conv_in.weight"], expected, atol=1e-6, rtol=1e-5)
    x = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(
        nn.functional.conv2d(x, changes["0.conv_in.weight"]),
        nn.functional.conv2d(nn.functional.conv2d(x, down), up),
        atol=1e-5,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"unet.lora_alpha": 6}, 6 / RANK),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 / RANK**0.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"attn.to_q": 1}}, 1 / RANK),
        ({"text_encoder.lora_alpha": 6}, 1.0),
    ],
)
def test_pefts_settings_in_the_metadata_count(tmp_path, networks, settings, factor) -> None:
    down, up = pair(4, 6)
    state = {"unet.attn.to_q.lora_A.weight": down, "unet.attn.to_q.lora_B.weight": up}
    changes = fused(lora(tmp_path, state, settings=settings), networks)
    torch.testing.assert_close(changes["0.attn.to_q.weight"], factor * up @ down, atol=1e-6, rtol=1e-5)


def good() -> dict[str, Tensor]:
    down, up = pair(4, 6)
    return {"unet.attn.to_q.lora_A.weight": down, "unet.attn.to_q.lora_B.weight": up}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("unet.conv_in", pair(5, 4, 3, 3)), "conv_in: its weights are .* it was made for another model"),
        (("unet.conv_in", pair(5, 3, 1, 1)), "conv_in: its weights are .* it was made for another model"),
        (("unet.mid.to_q", pair(4, 6)), "the model has no such layer: it was made for another model"),
        (("text_encoder_2.q_proj", pair(8, 8)), "this model has no text encoder 2"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(tmp_path, networks, more, words) -> None:
    name, (down, up) = more
    found = lora(tmp_path, good() | {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    before = [p.clone() for network in networks for p in network.parameters()]
    with pytest.raises(InputError, match=words) as error:
        fuse(found, networks[0], networks[1:])
    assert "\n" not in str(error.value)
    assert all(map(torch.equal, before, [p for network in networks for p in network.parameters()]))


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"unet.attn.to_q.lora_A.weight": torch.zeros(2, 6)}, "has one half of a pair"),
        ({"lora_unet_x.alpha": torch.tensor(1.0)}, "holds no LoRA weights"),
        ({"lora_unet_x.hada_w1_a": torch.zeros(2)}, "of the kind LoHa; fastgen fuses LoRA"),
        ({"unet.attn.to_q.lora_magnitude_vector": torch.zeros(2)}, "of the kind DoRA"),
        ({"attn.to_q.weight": torch.zeros(4, 6)}, "is no LoRA weight that fastgen knows"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path, networks, state, words) -> None:
    with pytest.raises(InputError, match=words):
        fuse(lora(tmp_path, state), networks[0], networks[1:])


def test_the_option_takes_a_file_or_a_folder_and_a_scale(tmp_path) -> None:
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_file(good(), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert Lora.parse(str(file)) == Lora(file, 1.0, digest)
    assert Lora.parse(f"{tmp_path}:0.5") == Lora(file, 0.5, digest)
    assert (parse_loras([]), parse_loras(["none"])) == (None, [])
    for texts, words in (
        (["none", str(file)], "--lora none leaves LoRA weights out; give it alone"),
        ([f"{file}:nan"], "the scale is nan, expected a finite number"),
        ([f"{tmp_path}/x.safetensors:2"], "is no file, expected FILE.safetensors"),
    ):
        with pytest.raises(InputError, match=words):
            parse_loras(texts)
