"""The ResNet-18 evaluator against transformers' ResNet and torchvision's weight names; the three formats it loads."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from safetensors.torch import save_file  # noqa: E402

from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.files.names import ICLEVR_OBJECTS  # noqa: E402
from fastgen.models.evaluator import Evaluator, ResNet18, load, save  # noqa: E402

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(scope="module")
def module():
    """An evaluator whose statistics and affine parameters are far from their initial values."""
    torch.manual_seed(0)
    net = ResNet18()
    generator = torch.Generator().manual_seed(1)
    for layer in net.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor in (layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.5)
    return net.eval()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(-1, 1, (5, 3, 64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def expected(module, images):
    with torch.no_grad():
        return module(torch.from_numpy(images)).numpy()


def torchvision_shapes(num_labels, w):
    """Key -> shape of torchvision's resnet18 with the evaluator's head and w channels for its 64."""
    shapes = {"conv1.weight": (w, 3, 7, 7), "fc.0.weight": (num_labels, 8 * w), "fc.0.bias": (num_labels,)}
    norms = {"bn1": w}
    for stage, (before, width) in enumerate([(w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)], start=1):
        shapes |= {
            f"layer{stage}.0.conv1.weight": (width, before, 3, 3),
            f"layer{stage}.0.conv2.weight": (width, width, 3, 3),
            f"layer{stage}.1.conv1.weight": (width, width, 3, 3),
            f"layer{stage}.1.conv2.weight": (width, width, 3, 3),
        }
        norms |= {f"layer{stage}.{block}.bn{i}": width for block in (0, 1) for i in (1, 2)}
        if stage > 1:
            shapes[f"layer{stage}.0.downsample.0.weight"] = (width, before, 1, 1)
            norms[f"layer{stage}.0.downsample.1"] = width
    return shapes | {f"{n}.{k}": () if k == NORM[-1] else (w,) for n, w in norms.items() for k in NORM}


@pytest.mark.parametrize(("num_labels", "options", "width"), [(24, {}, 64), (7, {}, 64), (45, {"width": 24}, 24)])
def test_weight_names_and_shapes_are_torchvisions(num_labels, options, width):
    found = {key: tuple(value.shape) for key, value in ResNet18(num_labels, **options).state_dict().items()}
    assert len(found) == 122
    assert found == torchvision_shapes(num_labels, width)


def test_parameter_count_is_that_of_torchvisions_resnet18_with_this_head():
    published, imagenet_head = 11_689_512, 512 * 1000 + 1000  # torchvision.models.ResNet18_Weights.meta["num_params"]
    assert published - imagenet_head == 11_176_512
    assert sum(p.numel() for p in ResNet18(24).parameters()) == 11_176_512 + 512 * 24 + 24


def test_output_equals_that_of_transformers_resnet_with_the_same_weights(module, images):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic", num_labels=24
    )
    reference = transformers.ResNetForImageClassification(config).eval()
    renamed = {}
    for key, value in module.state_dict().items():
        if key.startswith("fc.0."):
            renamed[key.replace("fc.0.", "classifier.1.")] = value
            continue
        if key.startswith("layer"):
            layer, block, part, rest = key.split(".", 3)
            if part == "downsample":
                part = "shortcut"
            else:
                part, rest = f"layer.{int(part[-1]) - 1}", f"{part}.{rest}"
            prefix = f"resnet.encoder.stages.{int(layer[5]) - 1}.layers.{block}.{part}."
        else:
            prefix, rest = "resnet.embedder.embedder.", key
        kind = "convolution" if rest.startswith(("conv", "0.")) else "normalization"
        renamed[f"{prefix}{kind}.{rest.split('.', 1)[1]}"] = value
    reference.load_state_dict(renamed)
    with torch.no_grad():
        wanted = torch.sigmoid(reference(torch.from_numpy(images)).logits).numpy()
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(Evaluator(module, None).predict(images), wanted, rtol=0, atol=1e-5)


def test_predict_gives_the_modules_scores_whatever_the_batch_size(module, images, expected):
    judge = Evaluator(module, None)
    for batch_size in (1, 2, 5, 64):
        np.testing.assert_allclose(judge.predict(images, batch_size), expected, rtol=0, atol=1e-5)
    assert judge.predict(images).dtype == np.float32


def test_features_are_what_the_head_sees(module, images, expected):
    features = Evaluator(module, None).features(images, 2)
    assert features.shape == (5, 512)
    head = module.state_dict()
    logits = features @ head["fc.0.weight"].numpy().T + head["fc.0.bias"].numpy()
    np.testing.assert_allclose(1 / (1 + np.exp(-logits)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 1, 64, 64), (2, 3, 32, 64), (0, 3, 64, 64)])
def test_images_of_another_shape_are_refused(module, shape):
    with pytest.raises(InputError, match=r"expected \(N, 3, 64, 64\) float32"):
        Evaluator(module, None).predict(np.zeros(shape, np.float32))


def test_images_of_another_dtype_are_refused(module):
    with pytest.raises(InputError, match="uint8"):
        Evaluator(module, None).predict(np.zeros((1, 3, 64, 64), np.uint8))


def test_scores_that_are_not_finite_are_an_error(module, images):
    broken = images.copy()
    broken[3, 0, 5, 5] = np.nan
    with pytest.raises(FastgenError, match="NaN or infinity for 1 of 5 images"):
        Evaluator(module, None).predict(broken)


def test_a_saved_folder_gives_the_same_scores_objects_and_record(module, images, expected, tmp_path):
    save(module, tmp_path / "a" / "judge", ICLEVR_OBJECTS, {"steps": 3})
    judge = load(tmp_path / "a" / "judge")
    np.testing.assert_array_equal(judge.predict(images), expected)
    assert judge.objects == ICLEVR_OBJECTS
    assert not judge.module.training
    config = json.loads((tmp_path / "a" / "judge" / "config.json").read_text())
    assert config["training"] == {"steps": 3}
    assert config["num_labels"] == 24


def test_a_safetensors_file_gives_the_same_scores(module, images, expected, tmp_path):
    save_file(module.state_dict(), tmp_path / "judge.safetensors")
    judge = load(tmp_path / "judge.safetensors")
    np.testing.assert_array_equal(judge.predict(images), expected)
    assert judge.objects is None


@pytest.mark.parametrize("as_folder", [True, False])
def test_a_narrow_network_is_known_by_its_weights(images, tmp_path, as_folder):
    narrow = ResNet18(24, width=8).eval()
    with torch.no_grad():
        wanted = narrow(torch.from_numpy(images)).numpy()
    save(narrow, tmp_path / "judge", ICLEVR_OBJECTS, {})
    judge = load(tmp_path / "judge" if as_folder else tmp_path / "judge" / "model.safetensors")
    np.testing.assert_array_equal(judge.predict(images), wanted)
    assert judge.features(images).shape == (5, 64)
    assert json.loads((tmp_path / "judge" / "config.json").read_text())["width"] == 8


def test_a_width_that_no_file_can_mean_is_not_built(module, tmp_path):
    save_file({**module.state_dict(), "conv1.weight": torch.zeros(5000, 3, 7, 7)}, tmp_path / "judge.safetensors")
    with pytest.raises(InputError, match=r"conv1.weight is \(5000, 3, 7, 7\), expected \(64, 3, 7, 7\)"):
        load(tmp_path / "judge.safetensors")


def test_the_tasks_checkpoint_gives_the_same_scores_when_pickles_are_allowed(module, images, expected, tmp_path):
    torch.save({"model": module.state_dict(), "epoch": 9}, tmp_path / "checkpoint.pth")
    judge = load(tmp_path / "checkpoint.pth", allow_pickle=True)
    np.testing.assert_array_equal(judge.predict(images), expected)
    with pytest.raises(InputError, match="--allow-pickle"):
        load(tmp_path / "checkpoint.pth")


def test_half_precision_weights_are_loaded_in_float32(module, images, expected, tmp_path):
    half = {k: v.half() if v.is_floating_point() else v for k, v in module.state_dict().items()}
    save_file(half, tmp_path / "judge.safetensors")
    judge = load(tmp_path / "judge.safetensors")
    assert {p.dtype for p in judge.module.parameters()} == {torch.float32}
    np.testing.assert_allclose(judge.predict(images), expected, rtol=0, atol=2e-2)


class _Exploit:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


@pytest.mark.parametrize("through_torch", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path, through_torch):
    path, target = tmp_path / "checkpoint.pth", tmp_path / "owned"
    if through_torch:
        torch.save({"model": _Exploit(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": _Exploit(target)}))
    target.unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"checkpoint\.pth: refused"):
        load(path, allow_pickle=True)
    assert not target.exists()


def test_every_weight_that_does_not_fit_is_named(module, tmp_path):
    state = dict(module.state_dict())
    del state["layer1.0.conv1.weight"]
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    state["bn1.bias"] = torch.full((64,), torch.nan)
    state["head.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "judge.safetensors")
    with pytest.raises(InputError) as caught:
        load(tmp_path / "judge.safetensors")
    assert str(caught.value) == (
        f"{tmp_path / 'judge.safetensors'}: 4 weights do not match ResNet-18 with 24 outputs: "
        "conv1.weight is (64, 1, 7, 7), expected (64, 3, 7, 7); bn1.bias holds NaN or infinity; "
        "layer1.0.conv1.weight is missing; head.weight is unexpected"
    )


def test_of_many_weights_that_do_not_fit_the_first_ten_are_named(module, tmp_path):
    state = {f"module.{key}": value for key, value in module.state_dict().items()}
    torch.save({"model": state}, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=r"244 weights do not match .* \(the first 10 listed\)") as caught:
        load(tmp_path / "checkpoint.pth", allow_pickle=True)
    assert str(caught.value).count("is missing") == 10
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], r'holds a list, expected \{"model": state_dict\}'),
        ({"model": 3}, r"holds a int, expected"),
        ({"model": {"conv1.weight": 1}}, "conv1.weight is a int, expected a tensor"),
    ],
)
def test_a_checkpoint_of_something_else_is_named(tmp_path, content, message):
    torch.save(content, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "checkpoint.pth", allow_pickle=True)


@pytest.mark.parametrize("name", ["judge.safetensors", "checkpoint.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights at all, but long enough to look at", b"PK\x03\x04 cut off"])
def test_a_damaged_file_is_one_line_that_names_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name) as caught:
        load(tmp_path / name, allow_pickle=True)
    assert "\n" not in str(caught.value)


def test_what_is_no_evaluator_is_said(module, tmp_path):
    with pytest.raises(InputError, match="not found, expected an evaluator"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"not an evaluator folder \(config.json is missing\)"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(InputError, match=r"expected an evaluator folder, a \.safetensors file"):
        load(tmp_path / "a.txt")


def test_a_folder_of_another_architecture_or_with_other_objects_is_refused(module, tmp_path):
    save(module, tmp_path, ICLEVR_OBJECTS, {})
    (tmp_path / "labels.json").write_text(json.dumps({"red cube": 0, "blue cube": 1}))
    with pytest.raises(InputError, match=r"labels\.json: found 2 objects, expected one for each of the 24 outputs"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vgg"}))
    with pytest.raises(InputError, match="architecture = 'vgg'"):
        load(tmp_path)


def test_saving_with_objects_that_do_not_name_every_output_writes_nothing(module, tmp_path):
    with pytest.raises(InputError, match="found 1 objects"):
        save(module, tmp_path / "judge", {"red cube": 0}, {})
    assert not (tmp_path / "judge").exists()


def test_gradient_descent_on_a_fresh_network_tells_two_patterns_apart():
    torch.manual_seed(0)
    net = ResNet18(2)
    images = torch.stack([torch.zeros(3, 32, 32), torch.ones(3, 32, 32)]).repeat(2, 1, 1, 1)
    images, targets = images + 0.1 * torch.randn(images.shape), torch.eye(2).repeat(2, 1)
    losses = []
    for _ in range(6):
        loss = torch.nn.functional.binary_cross_entropy(net(images), targets)
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(net.parameters(), gradients, strict=True):
                assert gradient.abs().sum() > 0
                parameter.sub_(0.02 * gradient)
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
