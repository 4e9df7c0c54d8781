"""An index is what the model's own networks say of the training set, and images start from what it finds."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from fastgen.engines.batches import Batch
from fastgen.errors import InputError
from fastgen.files.png import read_metadata
from fastgen.files.records import builtins
from fastgen.generate.conditions import pooled_states
from fastgen.generate.job import estimate_job, run_job
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request, read_requests
from fastgen.generate.run import Run
from fastgen.generate.shards import Shard
from fastgen.generate.start import late_start
from fastgen.models.bundle_record import sealed
from fastgen.retrieval.index import Index, open_index
from fastgen.retrieval.indexing import IndexOptions, build_index, default_folder, trained_mode

pytest.importorskip("torch")

KINDS = ["red dragon with wings", "small blue slime", "green robot with a sword", "purple insect with many legs"]
ACTIONS = {"main": "", "die1": "The monster is dying."}
FRAMES = 2


@pytest.fixture(scope="session")
def monsters_data(tmp_path_factory):
    """Four monsters, two animations of two frames each: in the monsters task's schema, 40 x 32 px."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    (root / "train").mkdir()
    info = {}
    for number, kind in enumerate(KINDS):
        for action, words in ACTIONS.items():
            key = f"{number}_{action}"
            texts = [f"A {kind}.", f"{kind.capitalize()}, drawn."]
            info[key] = {"given_description": texts, "action_description": words, "num_frames": FRAMES}
            for frame in range(FRAMES):
                small = rng.integers(0, 255, (4, 5, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC)
                image.save(root / "train" / f"{key}_{frame}.png")
    (root / "train_info.json").write_text(json.dumps(info))
    return root


@pytest.fixture(scope="session")
def eager(text_model):
    return load(text_model, "eager")


@pytest.fixture(scope="session")
def ort(text_bundle):
    return load(text_bundle, "ort")


@pytest.fixture(scope="session")
def index(monsters_data, ort, tmp_path_factory) -> Index:
    return build_index(monsters_data, ort, tmp_path_factory.mktemp("index") / "index")[0]


@pytest.fixture
def requests(tmp_path):
    content = {
        f"{i}_{action}": {
            "image_name": f"{i}_{action}.png",
            "given_description": f"A {kind}.",
            "action_description": words,
            "text_prompt": f"A {kind}. {words}".strip(),
        }
        for i, kind in enumerate(KINDS)
        for action, words in ACTIONS.items()
    }
    (tmp_path / "test.json").write_text(json.dumps(content))
    return read_requests(tmp_path / "test.json")


def manifest(out):
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pictures(out):
    return {f.name: f.read_bytes() for f in sorted(out.glob("*.png"))}


def run(pipeline, requests, out, index, *, seed=0, batch_size=3, shard=None, **settings):
    return run_job(run_of(pipeline, requests, index, seed=seed, **settings), out, batch_size=batch_size, shard=shard)


def run_of(pipeline, requests, index, *, noise_steps=None, strength=None, rag_top_k=None, **settings):
    """The requests' run, from the index's images where there is one."""
    late = {"noise_steps": noise_steps, "strength": strength, "rag_top_k": rag_top_k}
    return Run(pipeline, requests, *late_start(index, pipeline, requests, pipeline.settings(**settings), **late))


def all_rows(index):
    return [(i.id, i.group) for i in index.images]


# --- what an index holds


def test_embeddings_are_the_normalised_pooled_states_of_transformers(index, text_model):
    import torch
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(text_model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(text_model / "text_encoder").eval()
    texts = [
        f"{text} {words}".strip()
        for kind in KINDS
        for words in ACTIONS.values()
        for text in (f"A {kind}.", f"{kind.capitalize()}, drawn.")
    ]
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = encoder(ids).pooler_output
    expected = torch.nn.functional.normalize(pooled).numpy()
    assert index.embeddings.shape == (16, 32)
    np.testing.assert_allclose(index.embeddings, expected, atol=2e-5)


@pytest.mark.parametrize("mode", ["stretch", "pad", "crop"])
def test_latents_are_the_scaled_mean_of_diffusers_vae(monsters_data, eager, text_model, tmp_path, mode):
    import torch
    from diffusers import AutoencoderKL

    from fastgen.data.images import load_image

    index, _ = build_index(monsters_data, eager, tmp_path / "index", IndexOptions(image_mode=mode))
    vae = AutoencoderKL.from_pretrained(text_model / "vae").eval()
    images = np.stack([np.asarray(load_image(monsters_data / i.id, 32, mode=mode)) for i in index.images])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(x).latent_dist.mean.numpy() * 0.7
    assert index.latents.dtype == np.float16
    np.testing.assert_allclose(index.latents.astype(np.float32), expected, atol=2e-3, rtol=2e-3)


def test_an_index_holds_every_frame_or_the_first_and_each_distinct_text_once(monsters_data, index, ort, tmp_path):
    first, _ = build_index(monsters_data, ort, tmp_path / "first", IndexOptions(frames="first"))
    assert (len(index), len(first)) == (16, 8)
    assert all_rows(first) == [row for row in all_rows(index) if row[0].endswith("_0.png")]
    assert len(index.embeddings) == len(first.embeddings) == 16
    alone, _ = build_index(monsters_data, ort, tmp_path / "alone", IndexOptions(text="description"))
    assert len(alone.embeddings) == 8


@pytest.mark.parametrize("text", ["caption", "description"])
def test_a_text_finds_the_first_image_that_it_describes(monsters_data, ort, tmp_path, text):
    index, _ = build_index(monsters_data, ort, tmp_path / "index", IndexOptions(text=text))
    words = "Green robot with a sword, drawn."
    queries = pooled_states(ort.engine, ort.tokenizers, [words, f"{words} The monster is dying."])
    rows, similarities = index.nearest(queries, 1)
    found = [index.images[row].group for row in rows[:, 0]]
    assert found == (["2_main", "2_die1"] if text == "caption" else ["2_main", "2_main"])
    assert similarities[0, 0] == pytest.approx(1, abs=1e-6)


def test_the_k_nearest_images_are_those_of_brute_force_and_distinct(index):
    rng = np.random.default_rng(0)
    queries = rng.standard_normal((20, 32)).astype(np.float32)
    rows, similarities = index.nearest(queries, 7)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ index.embeddings.T  # (Q, T)
    per_image = np.full((20, 16), -2.0)
    for text, image in index.pairs:
        per_image[:, image] = np.maximum(per_image[:, image], cosines[:, text])
    np.testing.assert_allclose(similarities, -np.sort(-per_image, axis=1)[:, :7], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(per_image, rows, axis=1), similarities, atol=1e-6)
    assert all(len(set(row)) == 7 for row in rows.tolist())
    assert index.nearest(queries, 99)[0].shape == (20, 16)


def test_a_model_folder_and_its_bundle_accept_each_other_s_index(monsters_data, index, eager, ort, tmp_path):
    other, fresh = build_index(monsters_data, eager, tmp_path / "other")
    assert fresh
    np.testing.assert_allclose(other.embeddings, index.embeddings, atol=2e-5)
    np.testing.assert_allclose(other.latents.astype(np.float32), index.latents.astype(np.float32), atol=5e-3)
    other.check(ort.spec)
    index.check(eager.spec)


def test_an_index_survives_another_unet_but_no_other_encoder(index, text_model, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(text_model, tmp_path / "model")

    def change(name):
        file = next((folder / name).glob("*.safetensors"))
        values = load_file(file)
        key = next(k for k, v in values.items() if v.dtype == np.float32)
        save_file({**values, key: values[key] * np.float32(1.5)}, file, metadata={"format": "pt"})
        return load(folder, "eager").spec

    index.check(change("unet"))
    changed = change("text_encoder")
    held = index.info.component_sha256["text_encoder"][:12]
    with pytest.raises(InputError, match="another text encoder") as caught:
        index.check(changed)
    assert held in str(caught.value)
    assert changed.component_sha256["text_encoder"][:12] in str(caught.value)
    assert "`fastgen index DATA --model MODEL --out INDEX`" in str(caught.value)
    shutil.copytree(text_model / "text_encoder", folder / "text_encoder", dirs_exist_ok=True)
    with pytest.raises(InputError, match="another VAE"):
        index.check(change("vae"))


def test_a_bundle_that_does_not_record_its_networks_is_known_by_the_whole_model(
    index, text_bundle, tmp_path, label_bundle
):
    old = shutil.copytree(text_bundle, tmp_path / "old")
    content = json.loads((old / "bundle.json").read_text())
    assert set(content.pop("component_sha256")) == {"text_encoder", "vae"}
    (old / "bundle.json").write_text(json.dumps(sealed(content)))
    index.check(load(old, "ort").spec)
    (old / "bundle.json").write_text(json.dumps(sealed({**content, "source_sha256": "0" * 64})))
    with pytest.raises(InputError, match="another model"):
        index.check(load(old, "ort").spec)


# --- starting from it


@pytest.mark.parametrize("name", ["ddpm", "ddim", "pndm"])
@pytest.mark.parametrize(("steps", "noise_steps"), [(20, 17), (20, 1), (70, 60)])
def test_start_latents_are_diffusers_add_noise_at_the_first_timestep(eager, index, requests, name, steps, noise_steps):
    import torch

    from fastgen.sampling.noise import normal
    from fastgen.sampling.schedulers import make_scheduler

    late = run_of(eager, requests, index, scheduler=name, num_inference_steps=steps, noise_steps=noise_steps)
    _, x = next(late.steps(Batch(0, len(requests), len(requests))))

    scheduler = make_scheduler(name, eager.spec.scheduler_config)
    scheduler.set_timesteps(steps)
    first = np.unique(scheduler.timesteps.numpy())[::-1][steps - noise_steps]
    noise = torch.from_numpy(normal(seeds_of(requests), 0, (4, 8, 8)))
    clean = torch.from_numpy(index.latents[[late.start.nearest[r][0] for r in requests]].astype(np.float32))
    expected = scheduler.add_noise(clean, noise, torch.full((len(requests),), int(first)))
    torch.testing.assert_close(x, expected, atol=2e-5, rtol=0)


def seeds_of(requests):
    from fastgen.generate.requests import resolve_seed

    return [resolve_seed(r, 0) for r in requests]


def test_a_bundle_stores_the_late_tables_that_the_default_needs(ort):
    assert ort.settings().late().solver == "ddim:5:4"
    assert {"ddim:5:4", "ddim:5:1", "ddim:5:5"} <= set(ort.source.solver_keys())
    assert ort.settings(num_inference_steps=70).late().noise_steps == 60
    assert ort.settings(num_inference_steps=20).late(strength=0.5).noise_steps == 10
    assert ort.settings().noise_steps is None


def test_eager_and_a_bundle_retrieve_the_same_and_give_the_same_images(eager, ort, index, requests, tmp_path):
    for pipeline in (eager, ort):
        run(pipeline, requests, tmp_path / pipeline.engine.name, index, noise_steps=3)
    lines = {name: manifest(tmp_path / name) for name in ("eager", "ort")}
    found = [line["retrieved"] for line in lines["ort"]]
    assert found == [f"train/{r.id}_0.png" for r in requests]
    assert found == [line["retrieved"] for line in lines["eager"]]
    for request in requests:
        a, b = (np.asarray(Image.open(tmp_path / name / request.image_name)).astype(int) for name in ("eager", "ort"))
        assert np.abs(a - b).max() <= 2


def test_the_record_says_how_an_image_started_and_others_say_nothing(ort, index, requests, tmp_path):
    run(ort, requests, tmp_path / "rag", index, noise_steps=3)
    for line in manifest(tmp_path / "rag"):
        assert (line["rag_sha256"], line["noise_steps"], line["rag_top_k"]) == (index.sha256, 3, 1)
        assert line["similarity"] == pytest.approx(1, abs=1e-5)
        assert read_metadata(tmp_path / "rag" / line["image_name"]) == line
    run(ort, requests, tmp_path / "plain", None)
    assert not {"rag_sha256", "noise_steps", "retrieved"} & set(manifest(tmp_path / "plain")[0])


def test_less_noise_stays_nearer_to_the_training_image(ort, index, requests):
    start = index.latents[[2 * i for i in range(len(requests))]].astype(np.float32)
    distances = []
    for noise_steps in (1, 3, 5):
        late = run_of(ort, requests, index, noise_steps=noise_steps, guidance_scale=1.0)
        x = late.latents(Batch(0, len(requests), len(requests)))
        distances.append(float(np.sqrt(np.mean((x - start) ** 2))))
    assert distances == sorted(distances)


@pytest.mark.parametrize("top_k", [1, 3])
def test_a_resumed_job_writes_the_same_bytes_and_batch_size_changes_no_choice(ort, index, requests, tmp_path, top_k):
    options = {"noise_steps": 3, "rag_top_k": top_k, "scheduler": "ddpm"}
    run(ort, requests, tmp_path / "a", index, **options)
    before, lines = pictures(tmp_path / "a"), manifest(tmp_path / "a")
    (tmp_path / "a" / requests[4].image_name).unlink()
    report = run(ort, requests, tmp_path / "a", index, **options)
    assert 0 < report.generated < len(requests)
    assert pictures(tmp_path / "a") == before
    assert manifest(tmp_path / "a") == lines
    run(ort, requests, tmp_path / "b", index, batch_size=8, **options)
    assert [line["retrieved"] for line in manifest(tmp_path / "b")] == [line["retrieved"] for line in lines]


def test_the_seed_chooses_among_the_k_nearest(ort, index):
    same = [Request(str(i), f"{i}.png", prompt="A small blue slime.", seed=i) for i in range(60)]
    start = index.start(ort, same, seed=0, top_k=3)
    counts = np.bincount([start.nearest[r][0] for r in same], minlength=16)
    rows, _ = index.nearest(pooled_states(ort.engine, ort.tokenizers, ["A small blue slime."]), 3)
    assert set(np.flatnonzero(counts)) == set(rows[0].tolist())
    assert counts.max() < 40
    again = index.start(ort, same[::-1], seed=0, top_k=3)
    assert {r: row for r, (row, _) in again.nearest.items()} == {r: row for r, (row, _) in start.nearest.items()}


def test_an_index_of_descriptions_is_asked_by_the_description(monsters_data, ort, tmp_path, requests):
    index, _ = build_index(monsters_data, ort, tmp_path / "index", IndexOptions(text="description"))
    start = index.start(ort, requests, seed=0)
    assert all(similarity == pytest.approx(1, abs=1e-6) for _, similarity in start.nearest.values())
    bare = [Request(r.id, r.image_name, prompt=r.prompt) for r in requests]
    nearest = index.start(ort, bare, seed=0).nearest
    similarities = {r.image_name: similarity for r, (_, similarity) in nearest.items()}
    assert similarities["0_die1.png"] < 0.9999
    assert similarities["0_main.png"] == pytest.approx(1, abs=1e-6)


def test_shards_give_the_files_of_the_whole_job(ort, index, requests, tmp_path):
    run(ort, requests, tmp_path / "whole", index, noise_steps=3)
    for part in (1, 2):
        run(ort, requests, tmp_path / "parts", index, noise_steps=3, shard=Shard(part, 2))
    assert manifest(tmp_path / "parts") == manifest(tmp_path / "whole")
    assert pictures(tmp_path / "parts") == pictures(tmp_path / "whole")


def test_an_estimate_counts_the_late_steps_alone(ort, index, requests):
    estimate = estimate_job(run_of(ort, requests, index, noise_steps=2))
    assert estimate.evaluations == 2


def test_the_python_api_takes_an_index_or_its_folder_and_gives_the_job_s_pixels(ort, index, requests, tmp_path):
    run(ort, requests, tmp_path / "out", index, noise_steps=3)
    seeds, prompts = seeds_of(requests), [r.prompt for r in requests]
    for rag in (index, str(index.folder)):
        images = ort.generate(prompts=prompts, seeds=seeds, rag=rag, noise_steps=3, batch_size=3)
        for request, image in zip(requests, images, strict=True):
            held = np.asarray(Image.open(tmp_path / "out" / request.image_name))
            np.testing.assert_array_equal(held, np.asarray(image))


def test_another_question_of_the_index_is_another_job(monsters_data, ort, requests, tmp_path):
    index, _ = build_index(monsters_data, ort, tmp_path / "index", IndexOptions(text="description"))
    run(ort, requests, tmp_path / "out", index)
    bare = [Request(r.id, r.image_name, prompt=r.prompt) for r in requests]
    with pytest.raises(InputError, match="holds another job: queries_sha256 is"):
        run(ort, bare, tmp_path / "out", index)


@pytest.mark.parametrize("change", ["noise_steps", "rag_top_k", "rag_sha256", "plain"])
def test_another_start_is_another_job(monsters_data, ort, index, requests, tmp_path, change):
    run(ort, requests, tmp_path / "out", index, noise_steps=3)
    other, options = index, {"noise_steps": 3}
    if change == "plain":
        other, options, change = None, {}, "rag_sha256"
    elif change == "rag_sha256":
        other, _ = build_index(monsters_data, ort, tmp_path / "other", IndexOptions(frames="first"))
    else:
        options[change] = 2
    with pytest.raises(InputError, match=f"holds another job: {change} is"):
        run(ort, requests, tmp_path / "out", other, **options)


# --- the command, and bad input


def test_the_commands_build_find_and_say_when_nothing_is_to_do(fastgen, monsters_data, text_bundle, tmp_path):
    out, data = tmp_path / "index", shutil.copytree(monsters_data, tmp_path / "data")
    for number in range(12):
        (data / "train" / f"stray{number}.png").write_bytes(b"")
    (data / "train" / "0_main_1.png").unlink()
    command = ["index", data, "--model", text_bundle, "--engine", "ort", "--out", out]
    code, said, notes = fastgen(*command)
    assert (code, said) == (0, f"{out}: 15 images (32 px, stretch), 16 distinct texts; written\n")
    assert notes.splitlines()[:2] == [
        "note: 1 frames listed in train_info.json but missing in train/: 0_main_1.png",
        "note: 12 files in train/ that match no key of train_info.json: "
        + ", ".join(f"stray{i}.png" for i in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7))
        + ", ...",
    ]
    assert "training made images square is not recorded; they are stretched" in notes
    before = {f.name: f.stat().st_mtime_ns for f in out.iterdir()}
    code, said, _ = fastgen(*command)
    assert (code, said.endswith("; up to date\n")) == (0, True)
    assert {f.name: f.stat().st_mtime_ns for f in out.iterdir()} == before
    assert not list(tmp_path.glob(".index*"))
    code, _, err = fastgen(*command, "--frames", "first")
    assert code == 2
    assert f"{out}: holds another index: frames is 'all' there and 'first' now" in err


def test_generate_from_an_index_by_command(fastgen_process, index, text_bundle, requests_files, tmp_path):
    command = ["generate", requests_files["text"], "--model", text_bundle, "--engine", "ort", "--rag", index.folder]
    training = ["torch", "diffusers", "transformers"]
    done = fastgen_process(*command, "--strength", "0.4", "--out", tmp_path / "out", blocked=training)
    assert (done.returncode, done.stderr) == (0, "")
    assert {line["noise_steps"] for line in manifest(tmp_path / "out")} == {2}
    done = fastgen_process(*command, "--dry-run", "--out", tmp_path / "dry", blocked=training)
    assert "4 evaluations each" in done.stdout
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--noise-steps", "3"], "give --rag INDEX too"),
        (["--strength", "0.5"], "give --rag INDEX too"),
        (["--rag-top-k", "2"], "give --rag INDEX too"),
        (["--rag", "INDEX", "--noise-steps", "6"], "noise_steps is 6, expected 1 to 5, the number of inference steps"),
        (["--rag", "INDEX", "--noise-steps", "3", "--strength", "0.5"], "give one of them"),
        (["--rag", "INDEX", "--strength", "0"], "--strength: found '0', expected a number above 0"),
        (["--rag", "INDEX", "--strength", "1.5"], "--strength: found '1.5', expected a number above 0"),
        (["--rag", "NOWHERE"], "is no index (index.json is missing); make one: `fastgen index"),
    ],
)
def test_options_that_make_no_sense_are_one_line(fastgen, index, text_bundle, requests_files, tmp_path, options, words):
    options = [{"INDEX": index.folder, "NOWHERE": tmp_path / "no"}.get(o, o) for o in options]
    command = ["generate", requests_files["text"], "--model", text_bundle, "--engine", "ort", "--out", tmp_path / "out"]
    code, out, err = fastgen(*command, *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert not (tmp_path / "out").exists()


def test_a_label_model_has_no_use_for_an_index(fastgen, index, monsters_data, label_bundle, requests_files, tmp_path):
    rag = ["--model", label_bundle, "--engine", "ort", "--out", tmp_path / "out"]
    for command in (
        ["generate", requests_files["labels"], "--rag", index.folder, *rag],
        ["index", monsters_data, *rag],
    ):
        code, out, err = fastgen(*command)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "this model takes labels" in err
    assert not (tmp_path / "out").exists()


def test_data_without_texts_or_without_descriptions_are_one_line(fastgen, text_bundle, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["index", tmp_path, "--model", text_bundle, "--engine", "ort", "--out", tmp_path / "out"]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    code, _, err = fastgen(*command, "--text", "description")
    assert (code, err.count("\n")) == (2, 1)
    assert "has captions only" in err
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "labels": ["a"]}\n')
    code, _, err = fastgen(*command)
    assert (code, err.count("\n")) == (2, 1)
    assert "holds labels; an index needs captions" in err
    code, _, err = fastgen(*command, "--frames", "some")
    assert (code, "unknown frames 'some'" in err) == (2, True)


def test_what_is_no_index_is_not_overwritten(fastgen, monsters_data, text_bundle, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    code, _, err = fastgen("index", monsters_data, "--model", text_bundle, "--engine", "ort", "--out", tmp_path / "out")
    assert (code, "exists and is no index; choose another --out" in err) == (2, True)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_any_file_name_and_text_survives(ort, tmp_path):
    names = ["a\u2028b.png", "é.png", '"quoted".png']
    for name in names:
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    rows = [{"file_name": name, "text": f"text {name}"} for name in names]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index, _ = build_index(tmp_path, ort, tmp_path / "index")
    assert [image.id for image in index.images] == names


def test_a_bad_image_is_named_and_leaves_nothing(monsters_data, ort, tmp_path):
    data = shutil.copytree(monsters_data, tmp_path / "data")
    (data / "train" / "2_die1_1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"2_die1_1\.png"):
        build_index(data, ort, tmp_path / "index")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["data"]


@pytest.mark.parametrize("name", ["embeddings.npy", "latents.npy", "thumbnails.npy", "pairs.npy", "images.jsonl"])
def test_a_damaged_index_is_named(index, tmp_path, name):
    folder = shutil.copytree(index.folder, tmp_path / "index")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-7])
    with pytest.raises(InputError, match=rf"{name}: \d+ bytes, index.json says \d+"):
        open_index(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: No such file"):
        open_index(folder)
    if name in ("embeddings.npy", "pairs.npy", "images.jsonl"):
        (folder / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(InputError, match=f"{name}: sha256 differs"):
            open_index(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format_version": 99}, "format_version is 99, this fastgen reads 1"),
        ({"counts": {}}, "counts.images is missing"),
        ({"files": None}, "files: found None, expected an object"),
        ({"text": "words"}, "text: found 'words', expected caption, description"),
        ({"latent_shape": [4, 9, 9]}, r"latents.npy: float16 \(16, 4, 8, 8\), expected float16 \(16, 4, 9, 9\)"),
    ],
)
def test_a_foreign_or_malformed_index_json_is_one_line(index, tmp_path, change, words):
    folder = shutil.copytree(index.folder, tmp_path / "index")
    (folder / "index.json").write_text(json.dumps({**builtins(index.info), **change}))
    with pytest.raises(InputError, match=words):
        open_index(folder)


def test_images_are_made_square_as_in_training(text_model, text_bundle, tmp_path):
    from export import contents
    from fastgen.models.bundle import read_bundle
    from fastgen.models.folder import load_model

    assert trained_mode(load_model(text_model).spec) is trained_mode(read_bundle(text_bundle).spec) is None
    model = shutil.copytree(text_model, tmp_path / "model")
    settings = json.loads((model / "fastgen.json").read_text())
    (model / "fastgen.json").write_text(json.dumps({**settings, "training": {"image_mode": "figure"}}))
    assert trained_mode(load_model(model).spec) == "figure"
    bundle = shutil.copytree(text_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "bundle.json").read_text())
    manifest["image_mode"] = contents.manifest(load_model(model).spec)["image_mode"]
    (bundle / "bundle.json").write_text(json.dumps(sealed(manifest)))
    assert trained_mode(read_bundle(bundle).spec) == "figure"


def test_an_index_goes_into_a_model_folder_or_beside_a_bundle(text_bundle, tmp_path):
    assert default_folder(tmp_path) == tmp_path / "index"
    assert default_folder(text_bundle) == text_bundle.parent / "index"
