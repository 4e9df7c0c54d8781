"""Comparing two folders of images: textbook figures, honest warnings, one line for what cannot be compared."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from fastgen.files.png import png_bytes
from fastgen.scoring.pairs import compare

METADATA = {"seed": 1, "prompt": "a dragon", "engine": "ort", "scheduler": "ddim"}


def folder(path, images, **metadata):
    path.mkdir(parents=True)
    for name, pixels in images.items():
        (path / name).parent.mkdir(exist_ok=True)
        data = {**METADATA, "image_name": name, **metadata}
        (path / name).write_bytes(png_bytes(pixels, data))
    return path


def images(count=4, size=24, seed=0):
    rng = np.random.default_rng(seed)
    return {f"{i}.png": rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for i in range(count)}


def test_psnr_is_that_of_torchmetrics(tmp_path):
    torch = pytest.importorskip("torch")
    peak_signal_noise_ratio = pytest.importorskip("torchmetrics.functional.image").peak_signal_noise_ratio
    first, second = images(), images(seed=1)
    second["2.png"] = first["2.png"]
    found = compare(folder(tmp_path / "a", first), folder(tmp_path / "b", second), tmp_path / "out.png")
    expected = {
        name: float(
            peak_signal_noise_ratio(*(torch.tensor(x[name]).double() for x in (first, second)), data_range=255.0)
        )
        for name in ("0.png", "1.png", "3.png")
    }
    assert {p.name: p.psnr_db for p in found.pairs if p.psnr_db} == pytest.approx(expected)
    assert found.identical == 1
    assert found.mean_psnr_db == pytest.approx(np.mean(list(expected.values())))
    assert found.worst.name == min(expected, key=expected.get)
    for pair in found.pairs:
        assert pair.max_abs == np.abs(first[pair.name].astype(int) - second[pair.name]).max()
    assert found.warnings == ()
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["identical"] == 1
    assert written["worst"]["name"] == found.worst.name
    assert len(written["pairs"]) == 4


def test_the_picture_has_rows_of_a_b_and_their_difference(tmp_path):
    first = {f"{i}.png": np.full((96, 96, 3), 100, np.uint8) for i in range(2)}
    second = {name: pixels + np.uint8(5) for name, pixels in first.items()}
    compare(folder(tmp_path / "a", first), folder(tmp_path / "b", second), tmp_path / "out.png")
    picture = np.asarray(Image.open(tmp_path / "out.png"))
    column = picture[:, 6 + 48]
    middles = [6 + 15 + 48 + row * (15 + 96 + 6) for row in range(3)]
    assert [tuple(column[y]) for y in middles] == [(100,) * 3, (105,) * 3, (255,) * 3]


def test_names_are_compared_in_their_order_and_only_where_both_have_them(tmp_path):
    a = folder(tmp_path / "a", {f"{i}.png": x for i, x in enumerate(images(12).values())})
    b = folder(tmp_path / "b", {**images(11), "sub/x.png": images()["0.png"]})
    for name in ("contact_sheet.png", "grid.png", "strips.png"):
        (a / name).write_bytes(b"no picture of a request")
    found = compare(a, b, tmp_path / "out.png")
    assert [pair.name for pair in found.pairs] == [f"{i}.png" for i in range(11)]
    assert found.identical == 11
    assert [w.partition(",")[0] for w in found.warnings] == [f"1 images only in {a}", f"1 images only in {b}"]
    assert len(compare(a, b, tmp_path / "out.png", limit=3).pairs) == 3


@pytest.mark.parametrize(("field", "value"), [("seed", 2), ("prompt", "a slime")])
def test_other_seeds_or_prompts_are_a_warning(field, value, tmp_path):
    a, b = folder(tmp_path / "a", images()), folder(tmp_path / "b", images(), **{field: value})
    (warning,) = compare(a, b, tmp_path / "out.png").warnings
    assert warning.startswith(f"4 of 4 images have another {field} in A than in B, such as 0.png")


def test_another_sampler_is_no_warning_but_named(tmp_path):
    a, b = folder(tmp_path / "a", images()), folder(tmp_path / "b", images(), scheduler="unipc", normalize="min-max")
    found = compare(a, b, tmp_path / "out.png")
    assert found.warnings == ()
    assert found.differs == {"scheduler": (["ddim"], ["unipc"]), "normalize": ([None], ["min-max"])}
    assert "scheduler: A ddim, B unipc" in found.lines()


def test_images_without_metadata_are_compared_with_a_warning(tmp_path):
    a, b = folder(tmp_path / "a", images()), folder(tmp_path / "b", images())
    Image.fromarray(images()["1.png"]).save(b / "1.png")
    (warning,) = compare(a, b, tmp_path / "out.png").warnings
    assert "1 images do not say how they were made, such as 1.png" in warning


@pytest.mark.parametrize(
    "case", ["missing", "nothing in common", "sizes", "damaged", "metadata", "suffix", "overwrite"]
)
def test_what_cannot_be_compared_is_one_line(case, fastgen, tmp_path):
    a, b, out = folder(tmp_path / "a", images()), tmp_path / "b", tmp_path / "out.png"
    if case != "missing":
        folder(b, images(size=32 if case == "sizes" else 24))
    if case == "nothing in common":
        for i, file in enumerate(sorted(b.iterdir())):
            file.rename(b / f"other-{i}.png")
    if case == "damaged":
        (b / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    if case == "metadata":
        (b / "1.png").write_bytes(png_bytes(images()["1.png"], [1]))
    out = {"suffix": tmp_path / "out.jpg", "overwrite": b / "0.png"}.get(case, out)
    before = sorted(tmp_path.rglob("*"))
    code, printed, err = fastgen("compare", a, b, "--out", out)
    assert (code, printed, err.count("\n")) == (2, "", 1)
    word = {"missing": "no such folder", "nothing in common": "in common", "sizes": "24 x 24 px and 32 x 32 px"}
    word["suffix"] = "expected the name of a new PNG file"
    assert word.get(case, ".png") in err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_command_compares_two_samplers(fastgen, label_model, requests_files, tmp_path):
    for name in ("ddim", "dpmpp-2m"):
        options = ["--model", label_model, "--num-inference-steps", 3, "--scheduler", name, "--out", tmp_path / name]
        assert fastgen("generate", requests_files["labels"], *options)[0] == 0
    code, out, err = fastgen(
        "compare", tmp_path / "ddim", tmp_path / "dpmpp-2m", "--out", tmp_path / "c.png", "--limit", 3
    )
    assert (code, err) == (0, "")
    assert "3 images" in out
    assert "scheduler: A ddim, B dpmpp-2m" in out
    assert (tmp_path / "c.png").is_file()
