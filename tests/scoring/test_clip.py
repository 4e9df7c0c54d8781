"""CLIP-T and CLIP-I against transformers' own forward pass and torch's cosine, and what a CLIP folder must hold."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scoring_helpers import PROMPTS, make_clip, make_images

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

from fastgen.errors import InputError  # noqa: E402
from fastgen.scoring import score  # noqa: E402
from fastgen.scoring.clip import cosines, load_clip  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def load(folder, **options):
    return load_clip(str(folder), download=False, allow_pickle=False, device=CPU, **options)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pictures(count, size=(40, 50)):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (40, 50), (300, 200), (20, 90)])
@pytest.mark.parametrize("values", [{}, {"size": {"shortest_edge": 40}, "resample": 2, "image_mean": [0.5, 0.4, 0.3]}])
def test_images_are_prepared_as_transformers_does(copy, size, values):
    module = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    values = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **values}
    (copy / "preprocessor_config.json").write_text(json.dumps(values))
    (image,) = pictures(1, size)
    wanted = module.CLIPImageProcessorPil(**values)(image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(load(copy).process.apply(image), wanted, atol=2e-6)


def test_without_a_preprocessor_file_openai_s_values_are_taken_and_said(folder):
    process = load(folder).process
    assert (process.size, process.shortest_edge, process.resample) == (32, 32, Image.Resampling.BICUBIC)
    assert "CLIP's defaults" in str(process)


def test_values_inside_processor_config_are_found(copy):
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": {"crop_size": 32, "size": 36}}))
    assert load(copy).process.shortest_edge == 36


def test_embeddings_and_cosines_are_those_of_the_model_s_own_forward_pass(folder):
    clip, images = load(folder), pictures(4)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
    pixels = torch.from_numpy(np.stack([clip.process.apply(image) for image in images]))
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    wanted = torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
    np.testing.assert_allclose(cosines(clip.features(images), clip.text_features(PROMPTS)), wanted, atol=1e-6)


def test_clip_t_is_the_mean_cosine_and_its_error_scipy_s(folder, tmp_path):
    stats = pytest.importorskip("scipy.stats")
    requests = tmp_path / "test.json"
    requests.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    images = make_images(tmp_path / "out", count=4)
    result = score(images, requests, clip=folder)
    clip = load(folder)
    embedded = torch.from_numpy(clip.features([Image.open(images / f"{i}.png") for i in range(4)]))
    values = torch.nn.functional.cosine_similarity(embedded, torch.from_numpy(clip.text_features(PROMPTS)))
    assert set(result.metrics) == {"clip_t"}
    figure = result.metrics["clip_t"]
    assert figure.value == pytest.approx(values.mean().item(), abs=1e-6)
    assert figure.standard_error == pytest.approx(float(stats.sem(values.numpy())), rel=1e-4)
    assert (figure.over, figure.better) == ("images", "higher")
    assert figure.label == f"clip-t ({folder}: patch 8, 32 px, widths 16 and 16, 8-d)"


def test_clip_i_compares_images_of_the_same_name(folder, tmp_path):
    images, reference = make_images(tmp_path / "out", 0), make_images(tmp_path / "reference", 1, count=7)
    result = score(images, clip=folder, reference=reference)
    clip = load(folder)
    a, b = (
        torch.from_numpy(clip.features([Image.open(where / f"{i}.png") for i in range(5)]))
        for where in (images, reference)
    )
    wanted = torch.nn.functional.cosine_similarity(a, b).mean().item()
    assert result.metrics["clip_i"].value == pytest.approx(wanted, abs=1e-6)
    itself = score(images, clip=folder, reference=shutil.copytree(images, tmp_path / "same"))
    assert itself.metrics["clip_i"].value == pytest.approx(1)


def test_names_that_match_only_in_part_leave_clip_i_out_and_say_so(folder, tmp_path):
    requests = tmp_path / "test.json"
    requests.write_text(json.dumps([{"prompt": prompt} for prompt in PROMPTS]))
    reference = make_images(tmp_path / "reference", count=3)
    result = score(make_images(tmp_path / "out"), requests, clip=folder, reference=reference)
    assert set(result.metrics) == {"clip_t"}
    assert result.warnings == ("CLIP-I left out: the reference has an image of the same name for 3 of 4 images",)


def test_long_prompts_are_cut_and_counted(folder, tmp_path):
    requests = tmp_path / "test.json"
    requests.write_text(json.dumps([{"prompt": PROMPTS[0] * 20}, {"prompt": PROMPTS[1]}]))
    result = score(make_images(tmp_path / "out"), requests, clip=folder)
    assert result.warnings == ("CLIP-T: 1 of 2 prompts were cut to 32 tokens",)


def test_the_context_length_is_counted_with_start_and_end(folder):
    clip = load(folder)
    length = len(clip.tokenizer(PROMPTS[0]).input_ids)
    assert length < 32
    words = "a " * (32 - 2)
    assert len(clip.tokenizer(words, truncation=False).input_ids) == 32
    assert clip.count_truncated([words, words + "a"]) == 1


def test_label_requests_have_no_clip_t(folder, tmp_path):
    requests = tmp_path / "test.json"
    requests.write_text('[["red cube"]]')
    with pytest.raises(
        InputError, match="CLIP has nothing to compare the images with: CLIP-T needs --requests with pr"
    ):
        score(make_images(tmp_path / "out"), requests, clip=folder)


def test_a_hub_id_is_never_fetched_unasked(tmp_path, monkeypatch):
    import socket

    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(InputError, match=r"nobody/no-such-clip: no such folder, and not in the .* cache; .*--download"):
        load("nobody/no-such-clip")


def test_a_hub_id_in_the_local_cache_is_read_without_a_connection(folder, tmp_path, monkeypatch):
    import socket

    import huggingface_hub

    repository = tmp_path / "models--somebody--tiny-clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket.socket, "connect", None)
    assert load("somebody/tiny-clip").title == "somebody/tiny-clip: patch 8, 32 px, widths 16 and 16, 8-d"


def test_a_path_that_is_nothing_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no such folder, and no hub id"):
        load(tmp_path / "nowhere")


def test_folders_that_are_no_clip_say_what_is_missing(copy):
    edit(copy / "config.json", model_type="bert")
    with pytest.raises(InputError, match="model_type = 'bert', expected 'clip'"):
        load(copy)
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"no CLIP folder \(config.json is missing\)"):
        load(copy)


def test_a_clip_without_weights_or_tokenizer_is_refused(copy):
    for name in ("tokenizer.json", "vocab.json"):
        (copy / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="its tokenizer is missing"):
        load(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(
        InputError, match=r"holds no .safetensors weights; a pickle \(.bin\) is read with --allow-pickle"
    ):
        load(copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable safetensors file"):
        load(copy)


def test_weights_that_are_missing_are_named_not_drawn_at_random(copy):
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    (name,) = [name for name in state if name.endswith("visual_projection.weight")]
    del state[name]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights do not match CLIPModel, the first visual_projection.weight"):
        load(copy)


def test_a_tokenizer_that_does_not_fit_the_text_tower_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    edit(copy / "config.json", text_config={**config["text_config"], "eos_token_id": 3})
    with pytest.raises(InputError, match=r"the tokenizer ends a text with 5\d\d, the text tower looks for 3"):
        load(copy)


def test_a_preprocessor_for_another_image_size_is_refused(copy):
    (copy / "preprocessor_config.json").write_text(json.dumps({"size": 224, "crop_size": 224}))
    with pytest.raises(InputError, match="crop_size 224, expected images of 32 px for this CLIP"):
        load(copy)
