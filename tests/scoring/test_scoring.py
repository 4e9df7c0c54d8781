"""`score` against the official protocol run by hand in torch on the same files, and its errors."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from fastgen.errors import FastgenError, InputError  # noqa: E402
from fastgen.files.installing import hint  # noqa: E402
from fastgen.files.names import ICLEVR_OBJECTS  # noqa: E402
from fastgen.files.png import METADATA_KEY, png_bytes  # noqa: E402
from fastgen.models import evaluator as evaluators  # noqa: E402
from fastgen.scoring import score  # noqa: E402
from fastgen.scoring.networks import to_input  # noqa: E402

DATA = Path(__file__).parents[3] / "shared" / "data" / "iclevr"
REQUESTS = [
    ["gray cube"],
    ["red cube"],
    ["gray cube", "blue cube"],
    ["red cube", "gray cube", "yellow cylinder"],
    ["yellow cylinder", "red sphere"],
]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return evaluators.ResNet18().eval()


@pytest.fixture(scope="module")
def judge(network, tmp_path_factory):
    """An evaluator folder with random weights."""
    folder = tmp_path_factory.mktemp("judge")
    evaluators.save(network, folder, ICLEVR_OBJECTS, {})
    return folder


@pytest.fixture(scope="module")
def by_index(tmp_path_factory):
    """An evaluator folder that ranks object 0 first, then 1, and so on, whatever it sees."""
    folder = tmp_path_factory.mktemp("by_index")
    network = evaluators.ResNet18()
    state = network.state_dict()
    state["fc.0.weight"].zero_()
    state["fc.0.bias"].copy_(torch.linspace(2, -2, 24))
    evaluators.save(network, folder, ICLEVR_OBJECTS, {})
    return folder


@pytest.fixture
def requests(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps(REQUESTS))
    return tmp_path / "test.json"


def make_images(folder, seed=0, size=(64, 64), count=5):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def official(network, folder, requests=REQUESTS):
    """The task's own procedure: ToTensor, Normalize(0.5, 0.5), the network, topk per image, hits over the whole set."""
    pixels = [np.asarray(Image.open(folder / f"{i}.png").convert("RGB")) for i in range(len(requests))]
    images = (torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        out = network(images)
    found = [
        len({ICLEVR_OBJECTS[o] for o in labels} & set(row.topk(len(labels)).indices.tolist()))
        for labels, row in zip(requests, out, strict=True)
    ]
    return sum(found) / sum(len(labels) for labels in requests)


def test_the_score_of_five_images_worked_out_by_hand(by_index, requests, tmp_path):
    result = score(make_images(tmp_path / "out"), requests, evaluator=by_index)
    # the outputs 0 .. k - 1 rank first: 1 of 1, 0 of 1, 1 of 2 (0; not 2), 2 of 3 (1, 0; not 23), 0 of 2
    assert result.accuracy == pytest.approx(4 / 9)
    assert {k: (s.hits, s.total) for k, s in result.by_count.items()} == {1: (1, 2), 2: (1, 4), 3: (2, 3)}
    assert {name: (s.hits, s.total) for name, s in result.by_object.items()} == {
        "gray cube": (3, 3),
        "red cube": (1, 2),
        "blue cube": (0, 1),
        "red sphere": (0, 1),
        "yellow cylinder": (0, 2),
    }
    hits, k = np.array([1, 0, 1, 2, 0]), np.array([1, 1, 2, 3, 2])
    assert result.standard_error == pytest.approx(math.sqrt(5 / 4 * np.sum((hits - 4 / 9 * k) ** 2)) / 9)
    assert result.error_over == "images"


@pytest.mark.parametrize("batch_size", [4, 64])
def test_seeds_are_scored_by_the_official_protocol_each_and_averaged(network, judge, tmp_path, batch_size):
    from scipy.stats import sem

    wanted = [[name] for name in list(ICLEVR_OBJECTS)[::2]] + [list(ICLEVR_OBJECTS)[i : i + 8] for i in (0, 8, 16)]
    (tmp_path / "requests.json").write_text(json.dumps(wanted))
    folders = [make_images(tmp_path / f"seed{seed}", seed, count=len(wanted)) for seed in range(3)]
    result = score(folders, tmp_path / "requests.json", evaluator=judge, batch_size=batch_size)
    values = [official(network, folder, wanted) for folder in folders]
    assert min(values) > 0
    assert result.folders == pytest.approx({str(f): v for f, v in zip(folders, values, strict=True)})
    assert result.accuracy == pytest.approx(np.mean(values))
    assert result.standard_error == pytest.approx(float(sem(values)))
    assert result.error_over == "seeds"
    assert sum(s.hits for s in result.by_count.values()) == round(sum(values) * 36)
    assert sum(s.total for s in result.by_object.values()) == 3 * 36


def test_a_checkpoint_without_objects_takes_them_from_the_file_beside_the_requests(network, requests, tmp_path):
    torch.save({"model": network.state_dict()}, tmp_path / "checkpoint.pth")
    images = make_images(tmp_path / "out")
    plain = score(images, requests, evaluator=tmp_path / "checkpoint.pth", allow_pickle=True)
    assert plain.accuracy == pytest.approx(official(network, images))
    backwards = {name: 23 - index for name, index in ICLEVR_OBJECTS.items()}
    (tmp_path / "objects.json").write_text(json.dumps(backwards))
    beside = score(images, requests, evaluator=tmp_path / "checkpoint.pth", allow_pickle=True)
    given = score(images, requests, evaluator=tmp_path / "checkpoint.pth", allow_pickle=True, objects=backwards)
    assert beside == given
    assert beside.by_object != plain.by_object
    explicit = score(images, requests, evaluator=tmp_path / "checkpoint.pth", allow_pickle=True, objects=ICLEVR_OBJECTS)
    assert explicit == plain
    with pytest.raises(InputError, match="--allow-pickle"):
        score(images, requests, evaluator=tmp_path / "checkpoint.pth")


def test_the_order_in_which_objects_are_listed_does_not_matter(by_index, requests, tmp_path):
    images = make_images(tmp_path / "out")
    listed = dict(sorted(ICLEVR_OBJECTS.items()))
    assert list(listed) != list(ICLEVR_OBJECTS)
    result = score(images, requests, evaluator=by_index / "model.safetensors", objects=listed)
    assert result.by_object == score(images, requests, evaluator=by_index).by_object


def test_images_reach_the_evaluator_as_the_task_normalises_them():
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    wanted = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - 0.5) / 0.5
    found = to_input(Image.fromarray(pixels))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted.numpy(), atol=2e-7)


def test_a_larger_image_is_antialiased_not_sampled():
    stripes = np.tile(np.array([0, 255], np.uint8)[None, :, None], (256, 128, 3))  # alternate columns, 256 x 256
    assert np.abs(to_input(Image.fromarray(stripes))[:, :, 2:-2]).max() < 0.02


def test_images_of_another_size_are_stretched_and_counted(judge, requests, tmp_path):
    images = make_images(tmp_path / "out", size=(96, 80))
    result = score(images, requests, evaluator=judge)
    assert result.resized["evaluator"].images == 5
    assert "evaluator: 5 images resized to 64 x 64 px (bilinear, antialiased)" in result.table()


def test_resizing_is_pillows_bilinear():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8))
    np.testing.assert_array_equal(to_input(image), to_input(image.resize((64, 64), Image.Resampling.BILINEAR)))


def test_transparent_and_grey_images_are_read_as_rgb(judge, requests, tmp_path):
    images = make_images(tmp_path / "out")
    for mode in ("RGBA", "L"):
        folder = tmp_path / mode
        folder.mkdir()
        for file in images.iterdir():
            Image.open(file).convert(mode).save(folder / file.name)
    assert score(tmp_path / "RGBA", requests, evaluator=judge).by_object == (
        score(images, requests, evaluator=judge).by_object
    )
    score(tmp_path / "L", requests, evaluator=judge)


def test_json_and_table_say_the_same(by_index, requests, tmp_path):
    folders = [make_images(tmp_path / "a"), make_images(tmp_path / "b", 1)]
    result = score(folders, requests, evaluator=by_index)
    value = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert value["accuracy"] == result.accuracy
    assert value["standard_error_over"] == "seeds"
    assert value["by_count"]["3"] == {"accuracy": pytest.approx(2 / 3), "hits": 4, "labels": 6}
    assert value["by_object"]["red cube"] == {"accuracy": 0.5, "hits": 2, "labels": 4}
    lines = [" ".join(line.split()) for line in result.table().splitlines()]
    assert lines[:4] == [
        "metric value standard error",
        "label accuracy 0.4444 0.0000 over seeds (sample standard deviation)",
        "",
        "2 seeds of 5 images with 9 labels",
    ]
    for line in (f"{tmp_path / 'b'} 0.4444", "3 0.6667 (4 of 6)", "red cube 0.5000 (2 of 4)"):
        assert line in lines


def test_one_image_has_no_standard_error(by_index, tmp_path):
    (tmp_path / "one.json").write_text('[["gray cube"]]')
    result = score(make_images(tmp_path / "out", count=1), tmp_path / "one.json", evaluator=by_index)
    assert result.to_json()["standard_error"] is None
    assert "undefined" in result.table()


def test_missing_images_are_counted_and_the_first_ten_named(judge, tmp_path):
    (tmp_path / "test.json").write_text(json.dumps([["red cube"]] * 15))
    images = make_images(tmp_path / "out", count=3)
    with pytest.raises(InputError) as caught:
        score(images, tmp_path / "test.json", evaluator=judge)
    names = ", ".join(f"{i}.png" for i in range(3, 13))
    assert str(caught.value) == f"{images}: 12 of 15 images are missing: {names}, ..."


@pytest.mark.parametrize("content", [b"", b"not an image", b"truncated"])
def test_an_unreadable_image_is_named(judge, requests, tmp_path, content):
    images = make_images(tmp_path / "out")
    whole = (images / "3.png").read_bytes()
    (images / "3.png").write_bytes(whole[: len(whole) // 2] if content == b"truncated" else content)
    with pytest.raises(InputError, match=r"3\.png: cannot be read as a PNG image"):
        score(images, requests, evaluator=judge)


def test_an_image_too_large_to_be_true_is_refused(judge, requests, tmp_path, monkeypatch):
    images = make_images(tmp_path / "out")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 - 1)
    with pytest.raises(InputError, match=r"0\.png: cannot be read as a PNG image: .*exceeds limit"):
        score(images, requests, evaluator=judge)


def test_a_sixteen_bit_image_is_refused(judge, requests, tmp_path):
    images = make_images(tmp_path / "out")
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(images / "2.png")
    with pytest.raises(InputError, match=r"2\.png: mode I;16, expected an image with 8 bits"):
        score(images, requests, evaluator=judge)


def test_images_generated_for_other_requests_of_the_same_names_are_refused(by_index, requests, tmp_path):
    images = make_images(tmp_path / "out")
    pixels = np.zeros((64, 64, 3), np.uint8)
    (images / "2.png").write_bytes(png_bytes(pixels, {"labels": ["blue cube", "gray cube"]}))  # another order
    assert score(images, requests, evaluator=by_index).accuracy == pytest.approx(4 / 9)
    (images / "2.png").write_bytes(png_bytes(pixels, {"labels": ["cyan cube"]}))
    with pytest.raises(
        InputError, match=r"2\.png: was generated for \['cyan cube'\], the requests say \['blue cube', 'gray cube'\]"
    ):
        score(images, requests, evaluator=by_index)


@pytest.mark.parametrize("chunk", ["{", "[1]", "[" * 100_000, '{"labels": 3}', '{"labels": [["gray cube"]]}'])
def test_metadata_that_nobody_could_have_written_is_one_line(by_index, requests, tmp_path, chunk):
    images = make_images(tmp_path / "out")
    info = PngImagePlugin.PngInfo()
    info.add_itxt(METADATA_KEY, chunk)
    Image.new("RGB", (64, 64)).save(images / "0.png", pnginfo=info)
    with pytest.raises(
        InputError, match=r"0\.png: .*the JSON of a generated image|0\.png: was generated for"
    ) as caught:
        score(images, requests, evaluator=by_index)
    assert "\n" not in str(caught.value)


def test_requests_that_are_prompts_have_no_label_accuracy(judge, tmp_path):
    (tmp_path / "test.json").write_text('[{"prompt": "a red cube"}]')
    with pytest.raises(InputError, match="holds prompts; label accuracy needs requests with labels"):
        score(make_images(tmp_path / "out"), tmp_path / "test.json", evaluator=judge)


def test_an_object_that_the_evaluator_does_not_know_is_named_with_the_nearest(judge, tmp_path):
    (tmp_path / "test.json").write_text('[["gray cube"], ["reed cube"]]')
    with pytest.raises(InputError, match=r"test\.json.*'reed cube'; did you mean 'red cube'"):
        score(make_images(tmp_path / "out"), tmp_path / "test.json", evaluator=judge)


def test_a_list_of_objects_that_does_not_fit_the_evaluator_is_refused(network, judge, requests, tmp_path):
    images = make_images(tmp_path / "out")
    (tmp_path / "two.json").write_text('{"gray cube": 1, "red cube": 0}')
    with pytest.raises(InputError, match="they differ from those in the evaluator's folder"):
        score(images, requests, evaluator=judge, objects=tmp_path / "two.json")
    torch.save({"model": network.state_dict()}, tmp_path / "checkpoint.pth")
    with pytest.raises(InputError, match="has 24 outputs, the list of objects 2"):
        score(images, requests, evaluator=tmp_path / "checkpoint.pth", allow_pickle=True, objects=tmp_path / "two.json")


def test_folders_that_are_none_or_given_twice_are_refused(judge, requests, tmp_path):
    images = make_images(tmp_path / "out")
    with pytest.raises(InputError, match="no such folder"):
        score(tmp_path / "nowhere", requests, evaluator=judge)
    with pytest.raises(InputError, match="given twice"):
        score([images, tmp_path / "." / "out"], requests, evaluator=judge)
    with pytest.raises(InputError, match="no folder of images was given"):
        score([], requests, evaluator=judge)
    with pytest.raises(InputError, match="batch_size = 0"):
        score(images, requests, evaluator=judge, batch_size=0)


def test_without_torch_the_error_says_what_to_install(judge, requests, tmp_path, monkeypatch):
    images = make_images(tmp_path / "out")
    for name in [
        n
        for n in sys.modules
        if n.startswith("fastgen.scoring.") or n in ("fastgen.models.evaluator", "fastgen.models.weights")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(FastgenError, match=f"scoring needs torch.*{re.escape(hint('score'))}"):
        score(images, requests, evaluator=judge)


@pytest.mark.skipif(not DATA.is_dir(), reason="the task's own JSON files are not beside the repository")
@pytest.mark.parametrize(("name", "labels"), [("test.json", 72), ("new_test.json", 84)])
def test_the_tasks_own_test_files_are_scored(network, judge, tmp_path, name, labels):
    wanted = json.loads((DATA / name).read_text())
    images = make_images(tmp_path / "out", count=len(wanted))
    result = score(images, DATA / name, evaluator=judge)
    assert sum(share.total for share in result.by_count.values()) == labels
    assert result.accuracy == pytest.approx(official(network, images, wanted))
