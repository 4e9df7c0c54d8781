"""A key of a request is honoured, refused by name, or listed as ignored: what has no effect is never passed over in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastgen.errors import InputError
from fastgen.generate.request_fields import (
    DESCRIPTIONS,
    FIELDS,
    OPTIONS,
    RENAMED,
    UNSUPPORTED,
    check_fields,
)
from fastgen.generate.requests import parse_requests, read_requests

REAL = Path(__file__).parents[3] / "shared" / "data"
SETTINGS = sorted({*OPTIONS, *UNSUPPORTED, *RENAMED})
values = st.none() | st.integers(2, 9) | st.floats(2, 9) | st.text(max_size=3) | st.lists(st.integers(), max_size=2)


def write(folder: Path, content: Any) -> Path:
    (folder / "test.json").write_text(json.dumps(content))
    return folder / "test.json"


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        parse_requests(path)
    return str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"negative_prompt": "ugly"}, "'negative_prompt': fastgen takes no negative prompts; take the key out"),
        (
            {"num_inference_steps": 20},
            "'num_inference_steps': fastgen has one setting for the whole job; give --num-inference-steps 20 to the command, "
            "and take the key out",
        ),
        ({"steps": 20}, "give --num-inference-steps 20 to"),
        ({"guidance": 7.5}, "give --guidance-scale 7.5 to"),
        ({"guidance_scale": 1}, "give --guidance-scale 1 to"),  # 1 turns guidance off, where a model may guide by default
        ({"cfgScale": 3}, "'cfgScale': fastgen has one setting for the whole job; give --guidance-scale 3 to"),
        ({"CFG scale": 3}, "'CFG scale': fastgen has one"),
        ({"sampler": "Euler a"}, "give --scheduler 'Euler a' to"),
        ({"steps": 4, "scheduler": "ddim"}, "'steps', 'scheduler': fastgen has one setting for the whole job; give "),
        ({"strength": 0.5}, "give --strength 0.5 to"),
        ({"model": {"name": "x"}}, "give --model to"),
        ({"width": 512, "height": 512}, "'width', 'height': fastgen has one setting for the whole job; give "
         "--width 512 --height 512 to"),
        ({"size": "512x512"}, "'size': every image of a job has the size that --height and --width say"),
        ({"init_image": "a.png"}, "'init_image': an image starts from noise, or with --rag"),
        ({"image": "a.png"}, "'image': an image starts from noise"),
        ({"lora": "x.safetensors"}, "'lora': fastgen has one setting for the whole job; give --lora x.safetensors to"),
        ({"loras": [{"path": "x"}]}, "'loras': a job runs one model as it is"),
        ({"num_images": 4}, "'num_images': a request is one image; repeat it with another image_name and seed"),
        ({"clip_skip": 2}, "'clip_skip': fastgen has no such setting"),
        ({"Seed": 3}, "'Seed': call it 'seed'"),
        ({"noise_seed": 3}, "'noise_seed': call it 'seed'"),
        ({"imageName": "a.png"}, "'imageName': call it 'image_name'"),
        ({"file_name": "a.png"}, "'file_name': call it 'image_name'"),
        ({"params": {"steps": 20}}, "'params.steps': fastgen has one"),
    ],
)  # fmt: skip
def test_what_will_not_be_done_is_refused_with_the_place_and_what_helps(tmp_path, fields, message):
    path = write(tmp_path, {"0_main": {"prompt": "a"}, "1_main": {"prompt": "b"} | fields})
    told = refusal(path)
    assert told.startswith(f"{path}: key '1_main': '")
    assert message in told


@pytest.mark.parametrize(
    "fields",
    [
        dict.fromkeys(SETTINGS),
        dict.fromkeys(SETTINGS, ""),
        {key: [] for key in SETTINGS},
        {"negative_prompt": " ", "num_images": 1, "strength": 1.0, "eta": 0.0, "batch_size": 1, "normalize": "clamp"},
        {"size": "small", "given_description": "x", "action_description": "", "num_frames": 8, "original_name": "x"},
        {"params": {"steps": None}} | {"extra": {}},
    ],
)
def test_a_value_that_asks_for_nothing_and_the_tasks_own_keys_are_neither_refused_nor_noted(tmp_path, fields):
    read = parse_requests(write(tmp_path, [{"prompt": "a"} | fields]))
    assert (read.requests[0].prompt, read.notes) == ("a", ())


def test_other_keys_are_ignored_and_one_note_names_them(tmp_path):
    rows = [
        {"prompt": "a", "id": 3, "tags": ["x"], "meta": {"by": "me"}},
        {"prompt": "b", "id": 4},
        {"prompt": "c", "id": 5},
    ]
    path = write(tmp_path, rows)
    words = "'id', 'tags' (1 of 3 requests), 'meta.by' (1 of 3 requests)"
    assert parse_requests(path).notes == (f"{path}: ignored, as no part of a request: {words}",)
    many = write(tmp_path, [{"prompt": "a"} | {f"key{i}": i for i in range(30)}])
    assert parse_requests(many).notes[0].endswith("'key9', ... (30 keys)")


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(SETTINGS) | st.text(max_size=8), values, max_size=5))
def test_every_key_is_known_empty_refused_or_noted(fields):
    entry = {"prompt": "a"} | fields
    asked = {
        key
        for key, value in fields.items()
        if key not in (*FIELDS, *DESCRIPTIONS) and value not in (None, []) and str(value).strip()
    }
    try:
        named = set(check_fields(entry))
    except InputError as error:
        named = {key for key in asked if repr(key) in str(error)} or {"none of them"}
    else:
        assert named >= asked - {"size"}
    assert named <= asked


@pytest.mark.parametrize("name", ["a.jpg", "b/a.JPEG", "a.webp"])
def test_a_name_of_another_format_is_told_its_png_name(tmp_path, name):
    path = write(tmp_path, [{"prompt": "a", "image_name": name}])
    right = str(Path(name).with_suffix(".png"))
    assert refusal(path) == (
        f"{path}: entry [0]: image_name: found {name!r}, and images are PNG files; call it {right!r}"
    )


def test_where_the_images_are_there_already_settings_do_no_harm(tmp_path):
    path = write(tmp_path, [{"prompt": "a", "num_inference_steps": 20, "engine": "ort"}])
    assert read_requests(path, generated=True)[0].prompt == "a"


@pytest.mark.skipif(not REAL.is_dir(), reason="the tasks' own files are not here")
@pytest.mark.parametrize("name", ["iclevr/test.json", "iclevr/new_test.json", "monsters/test.json"])
def test_the_tasks_own_files_are_read_without_a_note(name):
    read = parse_requests(REAL / name)
    assert read.notes == ()
    assert len(read.requests) in (32, 1063)


def test_the_command_notes_once_and_refuses_before_it_writes(fastgen, label_bundle, tmp_path):
    rows = [{"labels": ["red cube"], "category": "x"}, {"labels": ["gray cube"], "category": "y"}]
    command = ("generate", write(tmp_path, rows), "--model", label_bundle, "--engine", "ort", "--out", tmp_path / "out")
    code, _, err = fastgen(*command, "--num-inference-steps", 2)
    assert (code, err) == (0, f"{tmp_path / 'test.json'}: ignored, as no part of a request: 'category'\n")
    write(tmp_path, [rows[0] | {"negative_prompt": "ugly"}])
    code, out, err = fastgen(*command[:-1], tmp_path / "other")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "test.json: entry [0]: 'negative_prompt': fastgen takes no negative prompts" in err
    assert not (tmp_path / "other").exists()


def test_a_text_or_caption_is_the_prompt_where_there_is_no_other(tmp_path):
    file = tmp_path / "r.json"
    file.write_text(json.dumps([{"text": "a"}, {"caption": "b"}, {"prompt": "c", "text": "noted"}]))
    requests = parse_requests(file)
    assert [r.prompt for r in requests.requests] == ["a", "b", "c"]
    assert requests.notes == (f"{file}: ignored, as no part of a request: 'text' (1 of 3 requests)",)
