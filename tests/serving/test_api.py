"""The HTTP API in front of a service without models: what each route answers."""

from __future__ import annotations

import base64
import json
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from fake_service import FakeService, picture
from serving_client import Client, wait_for

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
    service.row_s = 0.02
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


def test_a_stream_whose_request_fails_at_once_has_the_error_s_own_status(client, service):
    service.failing[5] = ApiError(400, "scheduler: no", param="scheduler")
    answer = post(client, stream=True, seed=5)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "scheduler")


def test_a_failed_image_is_named_and_the_others_can_still_be_fetched(client, service):
    service.failing[6] = ApiError(500, "not finite", kind="server_error", code="not_finite")
    answer = post(client, n=2, seed=5)
    assert answer.status_code == 500
    assert answer.json()["error"] == {
        "message": "image 2 of 2, seed 6: not finite",
        "type": "server_error",
        "param": None,
        "code": "not_finite",
    }
    assert answer.headers["x-should-retry"] == "false"
    job = client.get(f"/v1/images/jobs/{answer.headers['x-fastgen-job']}").json()
    assert [image["status"] for image in job["images"]] == ["done", "failed"]
    assert client.get(job["images"][0]["url"]).content == picture(service.submitted[0].task, 5)
    assert job["images"][1]["error"]["code"] == "not_finite"


def test_a_detached_job_answers_at_once_and_its_request_can_be_sent_again(client, service):
    service.row_s = 0.04
    fields = {"seed": 3, "n": 2, "guidance_interval": [1, 4], "scheduler": "unipc", "previews": 4, "detached": True}
    answer = post(client, **fields)
    job = answer.json()
    assert answer.status_code == 202
    assert (job["object"], job["status"], job["images"][0]["url"]) == ("image.job", "waiting", None)
    found = events(client.get(f"/v1/images/jobs/{job['id']}/events").text)
    names = [name for name, _ in found]
    assert names[0] == "job"
    assert names[-1] == "done"
    assert names.count("image") == 2
    assert "preview" in names
    done = found[-1][1]
    assert done["status"] == "done"
    assert client.get(done["images"][1]["url"]).content == picture(service.submitted[0].task, 4)
    again = client.post("/v1/images/generations", json=done["request"])
    assert again.status_code == 202
    assert again.json()["request"] == done["request"]
    assert service.submitted[0] == service.submitted[1]


def test_the_request_of_a_streamed_job_can_be_sent_again(client, service):
    answer = post(client, stream=True, partial_images=2, output_format="webp", output_compression=40)
    request = client.get(f"/v1/images/jobs/{answer.headers['x-fastgen-job']}").json()["request"]
    assert client.post("/v1/images/generations", json=request).status_code == 200
    assert service.submitted[0] == service.submitted[1]


def test_a_client_that_comes_late_gets_the_present_state_first(client, service):
    service.row_s = 0.02
    job = post(client, num_inference_steps=20, previews=10, detached=True).json()
    while not client.get(f"/v1/images/jobs/{job['id']}").json()["images"][0]["previews"]:
        pass
    with client.stream("GET", f"/v1/images/jobs/{job['id']}/events") as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: job"
        assert json.loads(next(lines).removeprefix("data: "))["images"][0]["previews"] > 0
        assert [next(lines), next(lines)] == ["", "event: preview"]


def test_the_events_of_a_job_are_at_most_ten_a_second(client, service):
    service.row_s = 0.005
    job = post(client, num_inference_steps=100, detached=True).json()
    found = events(client.get(f"/v1/images/jobs/{job['id']}/events").text)
    assert len(found) < 20  # of 100 changes in half a second


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job(client, service, stream):
    service.row_s = 0.05
    with pytest.raises(httpx.TimeoutException):
        client.post(
            "/v1/images/generations",
            json={"prompt": "x", "model": "monsters-64", "num_inference_steps": 1000, "stream": stream},
            timeout=0.3,
        )
    (id,) = service.jobs
    wait_for(lambda: service.cancelled == [id])
    wait_for(lambda: service.jobs[id].ended)


def test_a_client_that_leaves_the_events_of_a_detached_job_cancels_nothing(client, service):
    service.row_s = 0.05
    job = post(client, num_inference_steps=40, detached=True).json()
    with client.stream("GET", f"/v1/images/jobs/{job['id']}/events") as answer:
        next(answer.iter_lines())
    time.sleep(0.3)
    assert service.cancelled == []
    assert not service.jobs[job["id"]].ended


def test_a_job_is_cancelled_by_delete_and_keeps_the_images_that_are_done(client, service):
    service.row_s = 0.02
    job = post(client, n=5, num_inference_steps=5, detached=True).json()
    path = f"/v1/images/jobs/{job['id']}"
    while client.get(path).json()["images"][0]["status"] != "done":
        pass
    answer = client.delete(path)
    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelled"
    assert client.get(answer.json()["images"][0]["url"]).status_code == 200


def test_a_request_whose_job_is_cancelled_by_another_is_not_tried_again(client, service):
    service.row_s = 0.02
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(post, client, num_inference_steps=500)
        wait_for(lambda: service.jobs)
        client.delete(f"/v1/images/jobs/{next(iter(service.jobs))}")
        answer = waiting.result(10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (410, "job_cancelled")


def test_models_tell_what_they_take(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    models = {model["id"]: model["fastgen"] for model in listed["data"]}
    assert list(models) == ["monsters-64", "iclevr-64", "digits", "seeds", "both"]
    assert models["iclevr-64"]["labels"][:2] == ["gray cube", "red cube"]
    assert models["digits"]["one"] is True
    assert models["monsters-64"]["size"] == [48, 64]
    assert client.get("/v1/models/digits").json() == next(m for m in listed["data"] if m["id"] == "digits")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/models/nope", 404, "model_not_found"),
        ("GET", "/v1/images/jobs/nope", 404, "job_not_found"),
        ("DELETE", "/v1/images/jobs/nope", 404, "job_not_found"),
        ("GET", "/v1/images/jobs/nope/events", 404, "job_not_found"),
        ("GET", "/v1/images/jobs/nope/images/0.png", 404, "job_not_found"),
        ("GET", "/v1/images/edits", 404, "not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/", 404, "not_found"),
    ],
)
def test_paths_that_there_are_not_answer_in_openai_s_shape(client, method, path, status, code):
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_an_image_is_found_by_its_index_and_its_own_format_alone(client, service):
    job = post(client, output_format="jpeg", detached=True).json()
    wait_for(lambda: service.jobs[job["id"]].ended)
    path = f"/v1/images/jobs/{job['id']}/images"
    assert client.get(f"{path}/0.jpeg").headers["content-type"] == "image/jpeg"
    for name in ("1.jpeg", "0.png", "-1.jpeg", "0", "0.jpeg.png", "99999999999999999999.jpeg", "x.jpeg"):
        assert client.get(f"{path}/{name}").status_code == 404, name


def test_readiness_follows_the_models_and_liveness_does_not(client, service):
    model = service.models["digits"]
    for state, status in [("ready", 200), ("starting", 503), ("restarting", 503), ("stalled", 503), ("failed", 200)]:
        model.state = state
        for path in ("/health", "/health/ready", "/v1/health/ready"):
            answer = client.get(path)
            assert answer.status_code == status, state
            assert answer.json()["models"]["digits"] == state
            assert ("retry-after" in answer.headers) == (status == 503)
        assert client.get("/health/live").status_code == client.get("/v1/health/live").status_code == 200
    for other in service.models.values():
        other.state = "failed"
    assert client.get("/health/ready").status_code == 503


def test_a_model_that_was_never_ready_is_listed_and_asks_to_try_again(client, service):
    service.models["monsters-64"].state = "starting"
    assert client.get("/v1/models/monsters-64").json()["fastgen"]["size"] is None
    answer = post(client)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_server_that_ends_refuses_new_requests_and_still_answers_the_others(client, service):
    service.row_s = 0.05
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(post, client, seed=1)
        wait_for(lambda: service.jobs)
        service.draining = True
        refused = post(client)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert client.get("/health/ready").json()["status"] == "draining"
        assert running.result(10).status_code == 200


def test_an_error_of_the_server_itself_shows_its_client_nothing_of_it(client, service, capsys):
    service.broken = lambda: RuntimeError("a secret path")
    answer = post(client)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    wait_for(lambda: client.lines)
    assert "RuntimeError: a secret path" in capsys.readouterr().err
    service.broken = None
    assert post(client).status_code == 200


def test_metrics_are_plain_text(client):
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert "fastgen_images_total" in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_two_hundred_clients_that_leave_at_any_moment_leave_nothing_running(client, service, stream):
    service.row_s = 0.002
    fields = {"model": "monsters-64", "prompt": "x", "num_inference_steps": 1000, "stream": stream, "seed": 1}
    body = json.dumps(fields).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    moments = random.Random(0)
    for _ in range(10):
        with ExitStack() as peers:
            for _ in range(20):
                peer = peers.enter_context(socket.create_connection(("127.0.0.1", client.port)))
                peer.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + body)
                time.sleep(0.004 * moments.random())
    wait_for(lambda: all(job.ended for job in service.jobs.values()))
    assert len(service.jobs) == len(service.cancelled) > 0
    assert post(client).status_code == 200
