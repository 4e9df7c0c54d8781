"""Everything in one pass: what is decoded, embedded and cached how often, what the result says, and its errors."""

from __future__ import annotations

import inspect
import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scoring_helpers import PROMPTS, make_clip, make_evaluator, make_images

torch = pytest.importorskip("torch")
pytest.importorskip("torchmetrics")
pytest.importorskip("transformers")
torch.set_num_threads(1)

from fastgen.errors import InputError  # noqa: E402
from fastgen.scoring import Scorer, networks, passes, score  # noqa: E402
from fastgen.scoring.distances import frechet_distance, kernel_distance  # noqa: E402
from fastgen.scoring.reference_set import Statistics, read_reference  # noqa: E402

LABELS = [["gray cube"], ["red cube"], ["gray cube", "blue cube"], ["red cube"], ["yellow cylinder", "red sphere"]]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return make_evaluator(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scoring"


@pytest.fixture
def requests(tmp_path):
    (tmp_path / "test.json").write_text(json.dumps(LABELS))
    return tmp_path / "test.json"


@pytest.fixture
def reference(tmp_path):
    return make_images(tmp_path / "reference", 9, count=12)


@pytest.fixture
def calls(monkeypatch):
    """Which images went through the evaluator, and which files were decoded."""
    seen = {"embedded": 0, "decoded": []}
    features, read = networks.EvaluatorNetwork.features, passes.read_image

    def count(self, images):
        seen["embedded"] += len(images)
        return features(self, images)

    monkeypatch.setattr(networks.EvaluatorNetwork, "features", count)
    monkeypatch.setattr(passes, "read_image", lambda path: seen["decoded"].append(path) or read(path))
    return seen


def embed(judge, folder, count):
    from fastgen.models import evaluator

    pixels = np.stack([np.asarray(Image.open(folder / f"{i}.png"), np.float32) for i in range(count)])
    return evaluator.load(judge).features((pixels.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32))


def test_every_metric_comes_from_one_pass_over_the_images(judge, clip, requests, reference, tmp_path, calls):
    images = make_images(tmp_path / "out")
    result = score(
        images, requests, evaluator=judge, reference=reference, features="evaluator", clip=clip, batch_size=2
    )
    assert list(result.metrics) == ["label_accuracy", "fid", "kid", "clip_i"]
    assert sorted(calls["decoded"]) == sorted(images / f"{i}.png" for i in range(5))
    assert calls["embedded"] == 5 + 12
    assert result.accuracy == score(images, requests, evaluator=judge).accuracy


def test_fid_and_kid_are_those_of_the_evaluator_s_features_and_say_so(judge, reference, tmp_path):
    images = make_images(tmp_path / "out")
    result = score(images, evaluator=judge, reference=reference, features="evaluator")
    x, y = embed(judge, images, 5), embed(judge, reference, 12)
    order = sorted(range(12), key=lambda i: f"{i}.png")
    assert result.metrics["fid"].value == pytest.approx(frechet_distance(x, Statistics.of(y)), rel=1e-4)
    assert result.metrics["kid"].value == pytest.approx(kernel_distance(x, y[order]), rel=1e-4)
    assert result.metrics["fid"].label == f"fid (evaluator features: {judge})"
    assert result.metrics["kid"].better == "lower"
    assert result.reference == {"path": str(reference), "images": 12, "sha256": read_reference(reference).fingerprint}


def test_the_reference_against_itself_has_distance_0(judge, reference):
    result = score(reference, evaluator=judge, reference=reference, features="evaluator")
    assert result.metrics["fid"].value == pytest.approx(0, abs=1e-3)


def test_seeds_give_the_mean_and_an_error_over_seeds(judge, reference, tmp_path):
    folders = [make_images(tmp_path / f"seed{seed}", seed) for seed in range(3)]
    scorer = Scorer(evaluator=judge, reference=reference, features="evaluator")
    each = [scorer.score(folder).metrics["fid"].value for folder in folders]
    figure = scorer.score(folders).metrics["fid"]
    assert figure.value == pytest.approx(np.mean(each))
    assert figure.standard_error == pytest.approx(np.std(each, ddof=1) / 3**0.5)
    assert figure.over == "seeds"
    assert list(figure.folders.values()) == pytest.approx(each)


def test_reference_features_are_computed_once_and_read_from_the_cache_later(judge, reference, tmp_path, calls, cache):
    images, options = make_images(tmp_path / "out"), {"evaluator": judge, "features": "evaluator"}
    first = score(images, reference=reference, **options)
    assert calls["embedded"] == 5 + 12
    assert score(images, reference=reference, **options) == first
    assert calls["embedded"] == 10 + 12
    moved = shutil.copytree(reference, tmp_path / "moved")  # the same content elsewhere
    score(images, reference=moved, **options)
    assert calls["embedded"] == 15 + 12
    Image.new("RGB", (64, 64)).save(moved / "3.png")
    score(images, reference=moved, **options)
    assert calls["embedded"] == 20 + 24
    score(images, evaluator=make_evaluator(tmp_path / "other", 1), reference=reference, features="evaluator")
    assert calls["embedded"] == 25 + 36
    assert len(list(cache.iterdir())) == 3


def test_a_scorer_reads_networks_and_reference_once(judge, clip, reference, tmp_path, monkeypatch):
    scorer = Scorer(evaluator=judge, reference=reference, features="evaluator", clip=clip)
    folders = [make_images(tmp_path / f"run{i}", i) for i in range(3)]
    first = scorer.score(folders[0])
    shutil.move(reference, tmp_path / "gone")
    for name in ("fastgen.scoring.scorer.load_clip", "fastgen.scoring.scorer.evaluator_network"):
        monkeypatch.setattr(name, None)
    others = [scorer.score(folder) for folder in folders[1:]]
    assert {key for one in others for key in one.metrics} == {"fid", "kid", "clip_i"}
    assert others[0].reference == first.reference
    assert others[0].metrics["fid"].value != first.metrics["fid"].value


def test_clip_features_of_the_reference_are_cached_too(clip, reference, tmp_path, cache):
    images = make_images(tmp_path / "out")
    first = score(images, clip=clip, reference=reference)
    (entry,) = cache.iterdir()
    assert np.load(entry / "features.npy").shape == (5, 8)
    before = (entry / "features.npy").stat().st_mtime_ns
    assert score(images, clip=clip, reference=reference) == first
    assert (entry / "features.npy").stat().st_mtime_ns == before


def test_fid_with_inception_from_a_file(reference, tmp_path):
    from fastgen.scoring.inception import FidInception, resize

    torch.manual_seed(0)
    module = FidInception().eval()
    torch.save(module.state_dict(), tmp_path / "inception.pth")
    images = make_images(tmp_path / "out", count=2)
    small = make_images(tmp_path / "small", 5, count=2)
    result = score(images, reference=small, features=tmp_path / "inception.pth", allow_pickle=True, batch_size=2)
    with torch.no_grad():
        x, y = (
            module(
                torch.cat([resize(torch.from_numpy(np.array(Image.open(f / n))).permute(2, 0, 1)[None]) for n in names])
            )
            .numpy()
            .astype(np.float64)
            for f, names in ((images, ("0.png", "1.png")), (small, ("0.png", "1.png")))
        )
    assert result.metrics["fid"].label == "fid (inception-2015-12-05)"
    shift, a, b = x.mean(0) - y.mean(0), (x[0] - x[1]) / 2**0.5, (y[0] - y[1]) / 2**0.5
    distance = shift @ shift + a @ a + b @ b - 2 * abs(a @ b)  # covariances of two images have rank one: a a^T, b b^T
    assert result.metrics["fid"].value == pytest.approx(distance, rel=1e-3, abs=1e-4)
    assert result.resized["inception"].to == "299 x 299 px (bilinear, antialiased where it shrinks)"
    assert (result.resized["inception"].images, result.resized["inception"].reference) == (2, 2)


def test_only_what_is_asked_for_is_loaded(judge, requests, tmp_path, monkeypatch):
    for name in ("load_clip", "inception_network", "read_reference"):
        monkeypatch.setattr(f"fastgen.scoring.scorer.{name}", None)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics", None)
    assert set(score(make_images(tmp_path / "out"), requests, evaluator=judge).metrics) == {"label_accuracy"}


def test_resizing_is_told_of_images_and_reference(judge, tmp_path):
    images, reference = make_images(tmp_path / "out", size=(32, 32)), make_images(tmp_path / "ref", 1, (80, 60), 7)
    result = score(images, evaluator=judge, reference=reference, features="evaluator")
    line = "evaluator: 5 images and 7 of the reference resized to 64 x 64 px (bilinear, antialiased)"
    assert line in result.table()
    assert result.to_json()["resized"] == {
        "evaluator": {"to": "64 x 64 px (bilinear, antialiased)", "images": 5, "reference": 7}
    }


def test_few_images_are_warned_of(judge, reference, tmp_path, requests):
    images = make_images(tmp_path / "out")
    result = score(images, evaluator=judge, reference=reference, features="evaluator")
    (warning,) = result.to_json()["warnings"]
    assert warning.startswith("FID and KID of 5 images against 12 of the reference: with fewer than 2,048")
    assert score(images, requests, evaluator=judge).warnings == ()


def test_a_dataset_folder_is_a_reference(judge, tmp_path):
    data = tmp_path / "data"
    make_images(data / "iclevr", 3, count=4)
    (data / "objects.json").write_text('{"gray cube": 0}')
    (data / "train.json").write_text(json.dumps({f"{i}.png": ["gray cube"] for i in (0, 1, 3)}))
    found = read_reference(data)
    assert [file.name for file in found.files] == ["0.png", "1.png", "3.png"]
    assert read_reference(data / "iclevr").files_by_name(["2.png", "x.png"]) == {"2.png": data / "iclevr" / "2.png"}
    result = score(make_images(tmp_path / "out"), evaluator=judge, reference=data, features="evaluator")
    assert result.reference["images"] == 3


def test_jpeg_references_are_read_and_contact_sheets_are_not(tmp_path):
    folder = make_images(tmp_path / "ref", count=1)
    Image.new("RGB", (64, 64)).save(folder / "a.jpg")
    Image.new("RGB", (64, 64)).save(folder / "contact_sheet.png")
    (folder / "notes.txt").write_text("no image")
    assert [file.name for file in read_reference(folder).files] == ["0.png", "a.jpg"]


def test_without_requests_every_png_but_the_contact_sheet_is_scored(judge, reference, tmp_path):
    images = make_images(tmp_path / "out")
    Image.new("RGB", (64, 64)).save(images / "contact_sheet.png")
    assert score(images, evaluator=judge, reference=reference, features="evaluator").num_images == 5
    fewer = make_images(tmp_path / "fewer", count=3)
    with pytest.raises(InputError, match=r"fewer: 2 of 5 images are missing: 3.png, 4.png"):
        score([images, fewer], evaluator=judge, reference=reference, features="evaluator")


def test_how_the_images_were_made_is_told_where_all_agree(judge, requests, tmp_path):
    from fastgen.files.png import png_bytes

    folder = tmp_path / "out"
    folder.mkdir()
    for i, labels in enumerate(LABELS):
        about = {"labels": labels, "engine": "ort", "scheduler": "ddim", "num_inference_steps": 20 + i % 2}
        about |= {"model_sha256": "5351c12c2e45f8222c", "checkpoint": "ema", "guidance_interval": None}
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        (folder / f"{i}.png").write_bytes(png_bytes(pixels, about))
    result = score(folder, requests, evaluator=judge)
    assert result.made_by == {
        "model_sha256": "5351c12c2e45f8222c",
        "checkpoint": "ema",
        "engine": "ort",
        "scheduler": "ddim",
        "num_inference_steps": "mixed",
    }
    line = "saving: clamp, model_sha256 5351c12c2e45, checkpoint ema, engine ort, scheduler ddim, num_inference_steps mixed"
    assert line in result.table()


@pytest.mark.parametrize(
    ("kinds", "saving"),
    [
        (({}, {}), "clamp"),
        (({"normalize": "clamp"}, {}), "clamp"),
        (({"normalize": "min-max"}, {"normalize": "min-max"}), "min-max"),
        (({"normalize": "min-max"}, {}), "mixed"),
        ((None, None), "unknown"),
        (({}, None), "mixed"),
    ],
)
def test_the_saving_of_the_images_is_told(judge, requests, tmp_path, kinds, saving):
    folders = [make_images(tmp_path / str(i), i, metadata=kind) for i, kind in enumerate(kinds)]
    result = score(folders, requests, evaluator=judge)
    assert result.saving == result.to_json()["saving"] == saving


def test_images_generated_for_another_prompt_are_refused(clip, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    images = make_images(tmp_path / "out", count=4, metadata={"prompt": PROMPTS[0]})
    with pytest.raises(InputError, match=r"1.png: was generated for 'a red dragon with wings', the requests say"):
        score(images, tmp_path / "prompts.json", clip=clip)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "nothing to measure: give --evaluator E"),
        ({"reference": "R"}, "add --features evaluator, or inception.pth"),
        ({"features": "evaluator"}, "which need --reference DIR"),
        ({"reference": "R", "features": "evaluator"}, "--features evaluator needs the evaluator"),
        ({"reference": "R", "evaluator": "E"}, "add --features evaluator, or inception.pth"),
        ({"evaluator": "E"}, "label accuracy needs the requests"),
        ({"evaluator": "E", "device": "cuda:99"}, "device cuda:99: PyTorch finds"),
        ({"evaluator": "E", "device": "quantum"}, "device: found 'quantum', expected cpu"),
        ({"reference": "R", "features": "weights.h5"}, "expected a .safetensors file or one of .pth"),
        ({"reference": "nowhere", "features": "evaluator", "evaluator": "E"}, "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_measured_says_what_is_lacking(judge, reference, tmp_path, options, words):
    stand_in = {"R": reference, "E": judge}
    with pytest.raises(InputError, match=words):
        score(make_images(tmp_path / "out"), **{key: stand_in.get(value, value) for key, value in options.items()})


def test_references_that_are_empty_damaged_or_too_small(judge, tmp_path):
    images, empty = make_images(tmp_path / "out"), tmp_path / "empty"
    empty.mkdir()
    options = {"evaluator": judge, "features": "evaluator"}
    with pytest.raises(InputError, match=r"empty: holds no images \(.png, "):
        score(images, reference=empty, **options)
    with pytest.raises(InputError, match="at least 2 images and 2 reference images, found 1"):
        score(images, reference=make_images(tmp_path / "one", count=1), **options)
    with pytest.raises(InputError, match="found 1"):
        score(make_images(tmp_path / "single", count=1), reference=images, **options)
    with pytest.raises(InputError, match="empty: holds no PNG images"):
        score(empty, reference=images, **options)
    (images / "2.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"2.png: is no image of a known format"):
        score(make_images(tmp_path / "other"), reference=images, **options)
    assert not list((tmp_path / "cache" / "scoring").iterdir())


def test_nan_in_a_network_is_an_error_not_a_figure(clip, reference, tmp_path):
    from safetensors.torch import load_file, save_file

    from fastgen.errors import FastgenError

    broken = shutil.copytree(clip, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    (name,) = [name for name in state if name.endswith("visual_projection.weight")]
    state[name].fill_(float("nan"))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FastgenError, match="1 weights hold NaN or infinity"):
        score(make_images(tmp_path / "out"), clip=broken, reference=reference)


def test_score_and_scorer_show_every_option_and_refuse_others():
    names = ["evaluator", "reference", "features", "clip", "objects", "attributes", "allow_pickle", "download"]
    names += ["batch_size", "device"]
    assert list(inspect.signature(score).parameters) == ["images", "requests", *names]
    assert list(inspect.signature(Scorer).parameters) == names
    with pytest.raises(TypeError, match="evaluators"):
        Scorer(evaluators="e")
