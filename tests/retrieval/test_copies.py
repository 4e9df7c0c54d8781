"""The copy check: known copies are found, fresh images are not, and distances are what they say."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastgen.errors import InputError
from fastgen.generate.pipeline import load
from fastgen.retrieval.copies import calibrate, check_copies, nearest_images, subjects, thumbnails
from fastgen.retrieval.indexing import build_index

pytest.importorskip("torch")

SUBJECTS, FRAMES = 40, 3


def picture(rng, near=None):
    """A 32 px picture of smooth blobs; `near` another one of the same subject."""
    small = rng.integers(0, 255, (5, 5, 3)).astype(np.float32) if near is None else near
    small = np.clip(small + rng.normal(0, 4, small.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC), small.astype(np.float32)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Forty subjects of three similar pictures each, in Hugging Face's imagefolder format."""
    root, rng, rows = tmp_path_factory.mktemp("data"), np.random.default_rng(0), []
    for subject in range(SUBJECTS):
        small = None
        for frame in range(FRAMES):
            image, small = picture(rng, small)
            image.save(root / f"{subject:02}_{frame}.png")
            rows.append({"file_name": f"{subject:02}_{frame}.png", "text": f"subject number {subject}"})
    (root / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def index(data, text_bundle, tmp_path_factory):
    return build_index(data, load(text_bundle, "ort"), tmp_path_factory.mktemp("index") / "index")[0]


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def noisy(image, sigma):
    noise = np.random.default_rng(1).normal(0, sigma, (32, 32, 3))
    return Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8))


DAMAGE = {
    "same": lambda image: image,
    "noisy": lambda image: noisy(image, 12),
    "jpeg": lambda image: jpeg(image, 40),
    "mirrored": ImageOps.mirror,
    "blurred": lambda image: image.resize((16, 16), Image.Resampling.BOX).resize((32, 32)),
    "enlarged": lambda image: image.resize((77, 77), Image.Resampling.BICUBIC),
    "mirrored and noisy": lambda image: noisy(ImageOps.mirror(image), 12),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_training_image_is_a_near_copy_of_itself_even_damaged(data, index, tmp_path, name):
    files = sorted(data.glob("*.png"))[::7]
    for file in files:
        DAMAGE[name](Image.open(file)).save(tmp_path / file.name)
    (matches,) = check_copies([tmp_path], index).folders.values()
    assert [m.copy for m in matches] == [True] * len(files)
    assert {m.image[:2] == m.nearest[:2] for m in matches} == {True}
    assert {m.mirrored for m in matches} == {"mirrored" in name}
    if name in ("same", "mirrored"):
        assert [m.nearest for m in matches] == [f.name for f in files]
        assert max(m.distance for m in matches) < 1e-3


def test_fresh_images_are_no_copies_but_for_the_stated_few(index, tmp_path):
    rng = np.random.default_rng(99)
    for i in range(60):
        picture(rng)[0].save(tmp_path / f"{i}.png")
    report = check_copies([tmp_path], index)
    (matches,) = report.folders.values()
    assert sum(bool(m.copy) for m in matches) <= 6  # 3 expected at 5%
    assert "about 5% of fresh pictures" in report.table()


def test_flat_images_that_are_near_to_everything_are_no_copies(index, tmp_path):
    for value in (100, 128, 255):
        Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / f"{value}.png")
    (matches,) = check_copies([tmp_path], index).folders.values()
    assert not any(m.copy for m in matches)


def test_nearest_distances_and_ratios_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    small = rng.integers(0, 255, (90, 4, 4, 3), dtype=np.uint8)
    owners = rng.permutation(np.arange(90) % 30)
    queries = rng.integers(0, 255, (70, 4, 4, 3), dtype=np.uint8)
    exclude = rng.integers(0, 30, 70)
    for excluded in (None, exclude):
        found = nearest_images(queries, small, owners, excluded)
        for i, query in enumerate(queries):
            sides = [query / 255, query[:, ::-1] / 255]
            rms = np.array([[np.sqrt(np.mean((side - x / 255) ** 2)) for x in small] for side in sides])
            if excluded is not None:
                rms[:, owners == excluded[i]] = np.inf
            assert found.rows[i] == rms.min(0).argmin()
            assert found.distances[i] == pytest.approx(rms.min(), abs=1e-5)
            assert found.mirrored[i] == (rms.argmin() >= 90)
            nearest = sorted(rms.min(0)[owners == s].min() for s in range(30) if excluded is None or s != excluded[i])
            assert found.ratios[i] == pytest.approx(nearest[0] / np.mean(nearest[1:51]), abs=1e-4)


def test_thumbnails_are_the_means_of_boxes():
    images = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    expected = images.reshape(3, 8, 4, 8, 4, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(thumbnails(images, 8), expected, atol=1)  # Pillow rounds after each direction


def test_subjects_are_images_that_share_texts_directly_or_through_others():
    assert subjects([("a", "b"), ("c",), ("b", "d"), ("e",), ("d",), ("c", "f")]).tolist() == [0, 1, 0, 2, 0, 1]


def test_too_few_subjects_are_said_and_nothing_is_counted():
    small = np.random.default_rng(0).integers(0, 255, (6, 4, 4, 3), dtype=np.uint8)
    assert calibrate(small, np.array([0, 0, 0, 1, 1, 1])) is None
    assert calibrate(small, np.array([0, 0, 1, 1, 2, 2]))["subjects"] == 3


def test_the_command_writes_the_report_and_a_sheet_of_pairs(fastgen, data, index, tmp_path):
    for number, folder in enumerate(("first", "second")):
        (tmp_path / folder).mkdir()
        Image.open(data / f"0{number}_0.png").save(tmp_path / folder / "a.png")
    picture(np.random.default_rng(5))[0].save(tmp_path / "second" / "fresh.png")
    (tmp_path / "first" / "manifest.jsonl").write_text(
        '{"image_name": "a.png", "retrieved": "00_0.png"}\n{"image_name": "b.png", "error": "flat"}\n'
    )
    sheet = tmp_path / "sheet.png"
    folders = [tmp_path / "first", tmp_path / "second"]
    code, out, err = fastgen("copies", *folders, "--index", index.folder, "--sheet", sheet, "--data", data)
    assert (code, err) == (0, "")
    assert [line.split() for line in out.splitlines()[1:3]] == [
        ["1", "100.0%", "0.0000", "0.0000", "100.0%", str(folders[0])],
        ["2", "50.0%", *out.splitlines()[2].split()[2:4], "-", str(folders[1])],
    ]
    report = json.loads((tmp_path / "first" / "copies.json").read_text())
    assert report["index_sha256"] == index.sha256
    assert report["folders"][str(folders[1])]["near_copy_share"] == 0.5
    copy = report["images"][str(folders[0])][0]
    assert (copy["nearest"], copy["retrieved"], copy["copy"]) == ("00_0.png", "00_0.png", True)
    with Image.open(sheet) as image:
        assert image.width > 3 * 128
        assert image.height > 2 * 128


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["NOWHERE", "--index", "INDEX"], "is no folder of images"),
        (["EMPTY", "--index", "INDEX"], "holds no images"),
        (["DATA", "--index", "EMPTY"], "is no index (index.json is missing)"),
        (["DATA", "--index", "INDEX", "--sheet", "x.png"], "give both --sheet and --data"),
        (["DATA", "--index", "INDEX", "--sheet", "x.png", "--data", "EMPTY"], "is --data the folder that was indexed?"),
    ],
)
def test_bad_input_is_one_line(fastgen, data, index, tmp_path, options, words):
    (tmp_path / "empty").mkdir()
    places = {"NOWHERE": tmp_path / "no", "EMPTY": tmp_path / "empty", "DATA": data, "INDEX": index.folder}
    code, out, err = fastgen("copies", *[places.get(o, o) for o in options])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (data / "copies.json").exists()


def test_names_of_a_manifest_never_leave_the_folder(index, tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"image_name": "../a.png"}\n')
    with pytest.raises(InputError, match="image_name"):
        check_copies([tmp_path], index)
