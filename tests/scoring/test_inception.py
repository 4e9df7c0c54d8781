"""FID's Inception: what can be known about it without its weights."""

from __future__ import annotations

import re

import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)
import torch.nn.functional as F  # noqa: E402

from fastgen.errors import InputError  # noqa: E402
from fastgen.scoring.inception import BlockA, BlockC, BlockE, Conv, FidInception, load_inception, resize  # noqa: E402


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return FidInception().eval()


def test_it_has_the_weights_of_inception_v3_with_1008_classes(network):
    auxiliary = 768 * 128 + 2 * 128 + 128 * 768 * 25 + 2 * 768 + 769 * 1000
    published = 27_161_264  # torchvision's documentation: inception_v3, with auxiliary logits, 1000 classes
    assert sum(p.numel() for p in network.parameters()) == published - auxiliary + 8 * 2049


def test_its_names_are_those_of_the_ported_file(network):
    state = network.state_dict()
    assert state["Conv2d_1a_3x3.conv.weight"].shape == (32, 3, 3, 3)
    assert state["Conv2d_4a_3x3.bn.running_var"].shape == (192,)
    assert state["Mixed_5b.branch_pool.conv.weight"].shape == (32, 192, 1, 1)
    assert state["Mixed_6a.branch3x3.conv.weight"].shape == (384, 288, 3, 3)
    assert state["Mixed_6e.branch7x7dbl_5.conv.weight"].shape == (192, 192, 1, 7)
    assert state["Mixed_7a.branch7x7x3_3.conv.weight"].shape == (192, 192, 7, 1)
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    assert state["fc.weight"].shape == (1008, 2048)
    convolutions = {name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")}
    assert len(convolutions) == 94
    assert {name for name in state if re.sub(r"\.(conv|bn)\.\w+$", "", name) not in convolutions} == {
        "fc.weight",
        "fc.bias",
    }


def test_images_become_2048_features_that_depend_on_the_image_alone(network):
    images = resize(torch.randint(0, 256, (2, 3, 64, 48), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        features = network(images)
        alone = network(images[1:])
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features[1:], alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [(64, 64), (96, 32), (256, 256), (299, 299)])
def test_enlarging_is_what_pytorch_fid_does(size):
    pixels = torch.randint(0, 256, (1, 3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    wanted = 2 * F.interpolate(pixels / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    torch.testing.assert_close(resize(pixels), wanted, rtol=0, atol=2e-5)


def test_shrinking_is_antialiased():
    stripes = torch.tensor([0, 255], dtype=torch.uint8).repeat(1, 3, 598, 299)  # alternate columns, 598 px
    assert resize(stripes)[..., 2:-2].abs().max() < 0.1


@pytest.mark.parametrize(("block", "width"), [(BlockA(192, 32), 192), (BlockC(128), 768), (BlockE(1280), 1280)])
def test_average_pooling_does_not_count_the_padding(block, width):
    """The pooled branch of a constant image is constant up to the border; with counted padding it would fade there."""
    pooled = pool_input(block.eval(), torch.ones(1, width, 6, 6))
    torch.testing.assert_close(pooled, torch.ones_like(pooled))


def test_the_last_block_pools_the_maximum():
    x = torch.rand(1, 2048, 6, 6, generator=torch.Generator().manual_seed(0))
    pooled = pool_input(FidInception().eval().Mixed_7c, x)
    torch.testing.assert_close(pooled, F.max_pool2d(x, 3, stride=1, padding=1))


def pool_input(block, x):
    """What the block's pooled branch is given."""
    seen = []
    block.branch_pool.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        block(x)
    return seen[0]


def test_batch_normalisation_has_tensorflow_s_epsilon(network):
    assert {module.bn.eps for module in network.modules() if isinstance(module, Conv)} == {0.001}


@pytest.mark.parametrize("counters", [True, False])
def test_a_file_is_read_back_exactly_with_or_without_batch_counters(network, tmp_path, counters):
    from safetensors.torch import save_file

    state = {k: v for k, v in network.state_dict().items() if counters or not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "inception.safetensors")
    torch.save(state, tmp_path / "inception.pth")
    for name in ("inception.safetensors", "inception.pth"):
        loaded = load_inception(tmp_path / name, allow_pickle=True)
        assert not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), network.parameters(), strict=True))
    with pytest.raises(InputError, match=r"--allow-pickle"):
        load_inception(tmp_path / "inception.pth")


def test_names_that_do_not_match_are_listed(network, tmp_path):
    state = dict(network.state_dict())
    state["AuxLogits.fc.weight"] = state.pop("fc.weight")
    torch.save(state, tmp_path / "inception.pth")
    with pytest.raises(InputError, match=r"2 weights do not match .*fc.weight is missing; AuxLogits.fc.weight is unex"):
        load_inception(tmp_path / "inception.pth", allow_pickle=True)
    with pytest.raises(InputError, match=r"nowhere.safetensors: no such file"):
        load_inception(tmp_path / "nowhere.safetensors")
