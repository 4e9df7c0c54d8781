"""The fields of a request, one by one: what a model cannot do is refused with the field's name, and nothing is ignored."""

from __future__ import annotations

import json

import pytest
from fake_service import FakeService

from fastgen.serving.errors import ApiError
from fastgen.serving.messages import ImageTask
from fastgen.serving.wire import FIELDS, MAX_PROMPT, read_call

TEXT = {"model": "monsters-64", "prompt": "a dragon"}
LABELS = {"model": "iclevr-64", "labels": ["red cube"]}
LATE = "needs rag: true"
REFUSED = [
    (TEXT | {"prompt": 5}, "prompt", "found 5, expected text"),
    (TEXT | {"prompt": "x" * (MAX_PROMPT + 1)}, "prompt", "4000"),
    (TEXT | {"prompt": "  "}, "prompt", "is empty"),
    (TEXT | {"prompt": None}, "prompt", "is missing; this model takes a prompt"),
    (TEXT | {"prompt": "\ud800"}, "prompt", "lone surrogate"),
    (TEXT | {"labels": ["red cube"]}, "labels", "this model takes a prompt"),
    (TEXT | {"model": 3}, "model", "found 3"),
    (TEXT | {"model": ""}, "model", "found ''"),
    (TEXT | {"n": 0}, "n", "from 1"),
    (TEXT | {"n": 11}, "n", "10"),
    (TEXT | {"n": 10**9}, "n", "10"),
    (TEXT | {"n": True}, "n", "found True"),
    (TEXT | {"n": "3"}, "n", "found '3'"),
    (TEXT | {"n": 1.5}, "n", "found 1.5"),
    (TEXT | {"size": "1000000x1000000"}, "size", "this model makes 64x48"),
    (TEXT | {"size": "48x64"}, "size", "this model makes 64x48"),
    (TEXT | {"size": [64, 48]}, "size", "found"),
    (TEXT | {"response_format": "png"}, "response_format", "found 'png'"),
    (TEXT | {"quality": "hd"}, "quality", "found 'hd'"),
    (TEXT | {"style": "vivid"}, "style", "found 'vivid'"),
    (TEXT | {"background": "transparent"}, "background", "found 'transparent'"),
    (TEXT | {"moderation": "none"}, "moderation", "found 'none'"),
    (TEXT | {"output_format": "gif"}, "output_format", "found 'gif'"),
    (TEXT | {"output_compression": 50}, "output_compression", "jpeg and webp"),
    (TEXT | {"output_format": "webp", "output_compression": 101}, "output_compression", "100"),
    (TEXT | {"user": "u" * 201}, "user", "200"),
    (TEXT | {"safety_identifier": 1}, "safety_identifier", "found 1"),
    (TEXT | {"stream": 1}, "stream", "found 1"),
    (TEXT | {"partial_images": 2}, "partial_images", "needs stream: true"),
    (TEXT | {"stream": True, "partial_images": 4}, "partial_images", "3"),
    (TEXT | {"previews": 9}, "previews", "needs stream: true, or detached: true"),
    (TEXT | {"previews": 51, "stream": True}, "previews", "50"),
    (TEXT | {"previews": 9, "partial_images": 3, "stream": True}, "previews", "give one of them"),
    (TEXT | {"detached": True, "stream": True}, "detached", "no stream"),
    (TEXT | {"response_format": "url", "stream": True}, "response_format", "b64_json"),
    (TEXT | {"seed": -1}, "seed", "found -1"),
    (TEXT | {"seed": 2**63}, "seed", "found"),
    (TEXT | {"seed": 2**63 - 1, "n": 2}, "seed", "the last of 2 seeds"),
    (TEXT | {"num_inference_steps": 0}, "num_inference_steps", "found 0"),
    (TEXT | {"num_inference_steps": 10**9}, "num_inference_steps", "1000"),
    (TEXT | {"guidance_scale": -1}, "guidance_scale", "found -1"),
    (TEXT | {"guidance_scale": 1001}, "guidance_scale", "1000"),
    (TEXT | {"guidance_interval": [3]}, "guidance_interval", "found"),
    (TEXT | {"guidance_interval": [3, 3]}, "guidance_interval", "LO < HI"),
    (TEXT | {"scheduler": "ddimm"}, "scheduler", "did you mean 'ddim'?"),
    (TEXT | {"scheduler": "../ddim"}, "scheduler", "unknown scheduler"),
    (TEXT | {"normalize": "none"}, "normalize", "found 'none'"),
    (TEXT | {"deadline_s": 0}, "deadline_s", "found 0"),
    (TEXT | {"deadline_s": 3601}, "deadline_s", "3600"),
    (TEXT | {"rag": True}, "rag", "--rag INDEX"),
    (TEXT | {"rag": "http://169.254.169.254"}, "rag", "found"),
    (TEXT | {"noise_steps": 3}, "noise_steps", LATE),
    (TEXT | {"strength": 0.5}, "strength", LATE),
    (TEXT | {"rag_top_k": 3}, "rag_top_k", LATE),
    (TEXT | {"promt": "x"}, "promt", "did you mean 'prompt'?"),
    (TEXT | {"negative_prompt": "x"}, "negative_prompt", "unknown field"),
    (LABELS | {"labels": []}, "labels", "found []"),
    (LABELS | {"labels": ["red cube", "red cube"]}, "labels", "occurs twice"),
    (LABELS | {"labels": ["red cub"]}, "labels", "did you mean 'red cube'?"),
    (LABELS | {"labels": "red cube,"}, "labels", "is empty"),
    (LABELS | {"labels": [3]}, "labels", "found 3"),
    (LABELS | {"labels": None}, "labels", "is missing; this model takes labels"),
    (LABELS | {"prompt": "blue sphere"}, "prompt", "not in both"),
    ({"model": "iclevr-64", "prompt": "a dragon"}, "prompt", "unknown label 'a dragon'"),
    ({"model": "digits", "labels": ["1", "2"]}, "labels", "exactly one"),
    ({"model": "digits", "labels": ["one"]}, "labels", "unknown class"),
    ({"model": "seeds", "prompt": "x"}, "prompt", "nothing but a seed"),
    ({"model": "seeds", "guidance_scale": 2}, "guidance_scale", "cannot be guided"),
    ({"model": "both", "prompt": "x"}, "labels", "is missing"),
    ({"model": "both", "labels": ["red cube"]}, "prompt", "is missing"),
]


@pytest.fixture
def service():
    return FakeService()


def call(service, fields, key=""):
    return read_call(json.dumps(fields).encode(), service, key)


@pytest.mark.parametrize(("fields", "param", "word"), REFUSED, ids=lambda x: x if isinstance(x, str) else None)
def test_a_field_that_cannot_be_done_is_named(service, fields, param, word):
    with pytest.raises(ApiError) as caught:
        call(service, fields)
    error = caught.value
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert word in error.message
    assert "\n" not in error.message
    assert len(error.message) < 300


def test_every_field_is_refused_somewhere_in_the_table():
    assert set(FIELDS) - {param for _, param, _ in REFUSED} == set()


def test_an_unknown_model_is_404_with_the_nearest_name(service):
    with pytest.raises(ApiError, match=r"did you mean 'monsters-64'\?") as caught:
        call(service, {"model": "monster-64", "prompt": "x"})
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


def test_all_fields_reach_the_image(service):
    service.models["monsters-64"].rag = True
    task = {
        "seed": 5,
        "num_inference_steps": 9,
        "guidance_scale": 3,
        "guidance_interval": [2, 7],
        "scheduler": "unipc",
        "normalize": "min-max",
        "rag": True,
        "noise_steps": 4,
        "rag_top_k": 2,
        "previews": 7,
        "output_format": "jpeg",
        "output_compression": 80,
    }
    asked = TEXT | task | {"n": 4, "deadline_s": 20, "detached": True, "size": "64x48", "user": "somebody"}
    request = call(service, asked).request
    assert request.task == ImageTask(prompt="a dragon", **task | {"guidance_interval": (2, 7)})
    assert (request.model, request.n, request.deadline_s, request.detached) == ("monsters-64", 4, 20, True)
    assert request.key == "client somebody"


def test_what_is_left_out_or_null_is_the_model_s_default(service):
    asked = dict.fromkeys(FIELDS) | {"prompt": "x", "unheard_of": None}
    request = call(service, asked).request
    assert request.model == "monsters-64"  # the first
    assert request.task == ImageTask(prompt="x", seed=request.task.seed)
    assert 0 <= request.task.seed < 2**31


def test_requests_without_a_seed_get_seeds_of_their_own(service):
    assert len({call(service, TEXT).request.task.seed for _ in range(20)}) > 15


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": ["red cube", "blue sphere"]},
        {"labels": "red cube, blue sphere"},
        {"prompt": "red cube, blue sphere"},
        {"prompt": "red cube,blue sphere", "labels": None},
        {"prompt": "", "labels": ["red cube", "blue sphere"]},
    ],
)
def test_labels_come_as_a_list_or_a_text_or_the_prompt(service, fields):
    task = call(service, fields | {"model": "iclevr-64"}).request.task
    assert (task.labels, task.prompt) == (("red cube", "blue sphere"), None)


def test_a_model_of_nothing_takes_an_empty_prompt(service):
    assert call(service, {"model": "seeds", "prompt": "", "guidance_scale": 1}).request.task.prompt is None


def test_the_share_is_the_key_s_before_it_is_the_client_s(service):
    assert call(service, TEXT | {"user": "a", "safety_identifier": "b"}).request.key == "client b"
    assert call(service, TEXT | {"user": "a"}, "key 0123").request.key == "key 0123"
    assert call(service, TEXT).request.key == ""


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "is empty"),
        (b"prompt=x", "malformed JSON"),
        (b"[1]", "found [1], expected a JSON object"),
        (b'"x"', "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b"[" * 60_000, "nested too deeply"),
        (b'{"a":' * 10_000, "nested too deeply"),
        (b'{"guidance_scale": NaN}', "NaN, which is not JSON"),
        (b'{"guidance_scale": -Infinity}', "Infinity, which is not JSON"),
        (b'{"guidance_scale": 1e400}', "too large"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"n": 1, "n": 2}', "occurs twice"),
        (b'{"prompt": "a\xff"}', "not UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "a"}', "malformed JSON"),
        ('{"prompt": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"prompt": "a\\u0000b"}', "NUL"),
        (b'{"prompt": "a"} {}', "malformed JSON"),
        (b"\x1f\x8b\x08\x00", "not UTF-8"),
    ],
    ids=lambda x: x[:20].decode("latin-1") if isinstance(x, bytes) else None,
)
def test_what_is_no_json_object_is_refused(service, body, word):
    with pytest.raises(ApiError) as caught:
        read_call(body, service)
    assert (caught.value.status, caught.value.param) == (400, None)
    assert word in caught.value.message


def test_the_last_seed_may_be_the_largest(service):
    assert call(service, TEXT | {"seed": 2**63 - 3, "n": 3}).request.task.seed == 2**63 - 3
