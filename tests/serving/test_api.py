"""The HTTP API in front of a service without models: what each route answers."""

from __future__ import annotations

import base64
import json

import pytest
from fake_service import FakeService, picture
from serving_client import Client

from fastgen.serving.errors import ApiError
from fastgen.serving.security import Policy


@pytest.fixture
def service():
    return FakeService()


@pytest.fixture
def client(service):
    with Client(service) as client:
        yield client


def post(client, **fields):
    return client.post("/v1/images/generations", json={"model": "monsters-64", "prompt": "a dragon", **fields})


def events(text: str) -> list[tuple[str, dict]]:
    """(event, data) of a stream of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def test_images_come_as_base64_with_their_seeds_and_manifest_lines(client, service):
    answer = post(client, n=3, seed=40)
    assert answer.status_code == 200
    found = answer.json()
    task = service.submitted[0].task
    assert [base64.b64decode(image["b64_json"]) for image in found["data"]] == [picture(task, 40 + i) for i in range(3)]
    assert [image["fastgen"]["seed"] for image in found["data"]] == [40, 41, 42]
    assert {image["revised_prompt"] for image in found["data"]} == {None}
    assert all(image["fastgen"]["exact"] and image["fastgen"]["run_s"] >= 0 for image in found["data"])
    assert {name: found[name] for name in ("background", "output_format", "quality", "size")} == {
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
        "size": "64x48",
    }
    assert found["usage"]["output_tokens"] == 24  # 3 images of 8 rows
    assert answer.headers["x-fastgen-job"] in service.jobs


def test_images_by_url_are_the_same_files_and_need_no_key(service):
    with Client(service, Policy(keys=("a-secret-key",))) as client:
        headers = {"authorization": "Bearer a-secret-key"}
        body = {"model": "monsters-64", "prompt": "a dragon", "seed": 7, "response_format": "url"}
        (image,) = client.post("/v1/images/generations", json=body, headers=headers).json()["data"]
        answer = client.get(image["url"])
        assert answer.content == picture(service.submitted[0].task, 7)
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["content-disposition"] == 'inline; filename="a-dragon-7.png"'
        assert client.get("/v1/models").status_code == 401


def test_a_stream_has_previews_and_then_the_image(client, service):
    answer = post(client, stream=True, partial_images=3, seed=1)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *partial, (name, last) = events(answer.text)
    assert {name for name, _ in partial} == {"image_generation.partial_image"}
    assert [data["partial_image_index"] for _, data in partial] == sorted(
        {d["partial_image_index"] for _, d in partial}
    )
    assert name == last["type"] == "image_generation.completed"
    assert base64.b64decode(last["b64_json"]) == picture(service.submitted[0].task, 1)
    assert last["usage"]["output_tokens"] == 8


def test_an_error_in_a_stream_is_its_last_event(client, service):
    service.failing[6] = ApiError(500, "not finite", kind="server_error", code="not_finite")
    found = events(post(client, stream=True, n=2, seed=5).text)
    assert [name for name, _ in found] == ["image_generation.completed", "error"]
    assert found[1][1]["error"]["code"] == "not_finite"
