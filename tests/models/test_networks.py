"""Model folders: what is saved loads again, here and in diffusers; what does not fit is one clear line."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgen.errors import InputError
from fastgen.models.condition import CLASS
from fastgen.models.folder import LabelConditioner, load_model
from fastgen.models.networks.denoiser import Denoiser
from fastgen.models.networks.labels import label_words, load_conditioner, save_conditioner
from fastgen.models.saving import save_model


def outputs(model, seed=0):
    """Every network's outputs on its signature's sample inputs."""
    import numpy as np

    found = {}
    for name, module in model.networks().items():
        inputs = model.signatures()[name].sample_inputs(2, np.random.default_rng(seed))
        with torch.no_grad():
            result = module(*[torch.from_numpy(value) for value in inputs.values()])
        found[name] = result if isinstance(result, tuple) else (result,)
    return found


@pytest.mark.parametrize("fixture", ["text_model", "label_model"])
def test_a_saved_model_computes_the_same_after_loading(fixture, request, tmp_path):
    model = load_model(request.getfixturevalue(fixture))
    save_model(model, tmp_path / "copy")
    for (name, first), second in zip(
        outputs(model).items(), outputs(load_model(tmp_path / "copy")).values(), strict=True
    ):
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b), name


@pytest.mark.parametrize("fixture", ["text_model", "label_model"])
def test_outputs_have_the_shapes_of_their_signature(fixture, request):
    model = load_model(request.getfixturevalue(fixture))
    for name, found in outputs(model).items():
        expected = [tensor.with_batch(2) for tensor in model.signatures()[name].outputs]
        assert [tuple(y.shape) for y in found] == expected


def test_text_encoder_weights_keep_the_prefix_that_transformers_4_needs(text_model):
    keys = load_file(text_model / "text_encoder" / "model.safetensors").keys()
    assert keys
    assert all(key.startswith("text_model.") for key in keys)
    vocabulary = json.loads((text_model / "tokenizer" / "vocab.json").read_text())
    merges = (text_model / "tokenizer" / "merges.txt").read_text().splitlines()
    assert "<|endoftext|>" in vocabulary
    assert merges[0].startswith("#version")


def test_the_concat_conditioner_feeds_the_labels_as_channels():
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3 + 5,
        out_channels=3,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    conditioner = LabelConditioner("concat", num_labels=4, dim=5)
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]), torch.eye(4)[:2]
    with torch.no_grad():
        found = Denoiser(unet, [CLASS], conditioner)(x, t, labels)
        planes = conditioner.embed(labels)[:, :, None, None] * torch.ones(2, 5, 8, 8)
        expected = unet(torch.cat([x, planes], 1), t).sample
    torch.testing.assert_close(found, expected)


def test_labels_share_the_embeddings_of_their_words(tmp_path):
    names = {"red cube": 0, "red_sphere": 2, "small blue cube": 1}
    words = label_words(names)
    assert words == [[0, 1], [2, 3, 1], [0, 4]]
    torch.manual_seed(0)
    conditioner = LabelConditioner("tokens", 3, 8, embed="words", words=words)
    rows, absent = conditioner.embed.present.weight, conditioner.embed.absent
    expected = torch.stack([torch.stack([(rows[0] + rows[1]) / 2, absent, absent]), torch.stack([absent] * 3)])
    expected[1, 1] = (rows[2] + rows[3] + rows[1]) / 3
    torch.testing.assert_close(conditioner(torch.tensor([[1.0, 0, 0], [0, 1, 0]])), expected)
    save_conditioner(conditioner, tmp_path / "words")
    again = load_conditioner(tmp_path / "words")
    assert torch.equal(again(torch.eye(3)), conditioner(torch.eye(3)))


@pytest.mark.parametrize(
    "change",
    [
        {"words": None},
        {"words": [[0]]},
        {"words": [[0], [], [1]]},
        {"words": [[0], [-1], [1]]},
        {"words": [[0], [1.5], [1]]},
        {"words": 3},
        {"words": ["ab", "c", "d"]},
        {"words": [[0], [10**12], [1]]},
        {"kind": "class_embed"},
        {"embed": "tokens"},
    ],
    ids=str,
)
def test_words_that_do_not_fit_are_one_clear_line(tmp_path, change):
    config = {"kind": "tokens", "num_labels": 3, "dim": 8, "embed": "words", "words": [[0, 1], [2, 1], [0, 3]]}
    with pytest.raises(InputError, match="conditioner") as caught:
        LabelConditioner(**config | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "damage", "named"),
    [
        ("unet/diffusion_pytorch_model.safetensors", "truncate", "unet"),
        ("conditioner/model.safetensors", "truncate", "conditioner"),
        ("conditioner/model.safetensors", "reshape", "conditioner"),
        ("unet/diffusion_pytorch_model.safetensors", "drop", "weights do not match"),
        ("unet/config.json", "remove", "config.json is missing"),
        ("fastgen.json", "other", "sampling: unknown field 'steps'"),
        ("labels.json", "empty", "labels.json"),
        ("model_index.json", "remove", "not a model folder"),
    ],
)
def test_a_damaged_model_folder_is_one_clear_line(label_model, tmp_path, file, damage, named):
    folder = tmp_path / "model"
    shutil.copytree(label_model, folder)
    path = folder / file
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "remove":
        path.unlink()
    elif damage == "empty":
        path.write_text("{}")
    elif damage == "other":
        path.write_text('{"sampling": {"steps": 5}}')
    else:
        tensors = load_file(path)
        first = sorted(tensors)[0]
        tensor = tensors.pop(first)
        if damage == "reshape":
            tensors[first] = torch.zeros(tensor.numel() + 1)
        save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=named) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer/tokenizer.json", b"{}", "tokenizer.json: cannot be read as a tokenizer"),
        ("tokenizer", None, "tokenizer: its tokenizer is missing"),
        ("vae/diffusion_pytorch_model.safetensors", b"nothing", "vae/.*: not a readable safetensors file"),
        ("text_encoder/config.json", b'{"hidden_size": 64}', r"text_encoder/.* found shape \[77, 32\], expected"),
        (
            "vae/config.json",
            b'{"_class_name": "AutoencoderKL", "latent_channels": 3}',
            r"vae/.*: decoder.conv_in.bias: found shape \[16\]",
        ),
        (
            "vae/config.json",
            b'{"_class_name": "AutoencoderDC"}',
            "vae/config.json: _class_name: found 'AutoencoderDC', fastgen runs AutoencoderKL, ",
        ),
        ("model_index.json", b"[]", "model_index.json: found \\[\\], expected"),
        ("scheduler/scheduler_config.json", b"[]", "scheduler_config.json: found \\[\\], expected"),
    ],
)
def test_a_damaged_text_model_is_one_clear_line(text_model, tmp_path, file, content, named):
    folder = tmp_path / "model"
    shutil.copytree(text_model, folder)
    if content is None:
        for inner in (folder / file).iterdir():
            inner.unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=named) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_a_model_whose_conditioner_is_gone_is_refused(label_model, tmp_path):
    """Its UNet takes a vector of 32 values, and nothing says how 24 labels make it."""
    folder = tmp_path / "model"
    shutil.copytree(label_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    del index["conditioner"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="names for 24 labels or classes, but the network has 32"):
        load_model(folder)
    (folder / "labels.json").unlink()
    with pytest.raises(
        InputError, match="class_embed_type = 'identity': the UNet takes a vector of 32 values, and there is no"
    ):
        load_model(folder)
