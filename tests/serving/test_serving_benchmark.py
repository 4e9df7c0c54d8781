"""The benchmark's client tells what a server answered, and its pictures without a server are those of `fastgen generate`."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from click.testing import CliRunner
from fake_service import FakeService
from serving_client import Client

from benchmarks import serving, serving_faults
from benchmarks.serving_client import Reply, closed_loop, digest, generate, open_loop
from benchmarks.serving_local import Local
from benchmarks.serving_simulation import Arrival, static
from fastgen.serving.errors import SERVER, ApiError


def bodies(count):
    return [{"prompt": f"a dragon {i}", "seed": i, "model": "monsters-64"} for i in range(count)]


def test_a_reply_holds_the_status_the_time_and_the_pictures_digests():
    with Client(FakeService("monsters-64")) as client:
        body = {"prompt": "a dragon", "seed": 3, "n": 2}
        reply = asyncio.run(generate(client.port, body))
        data = client.post("/v1/images/generations", json=body | {"response_format": "url"}).json()["data"]
        assert reply.status == 200
        assert reply.digests == tuple(digest(client.get(one["url"]).content) for one in data)
        assert 0 < reply.latency_s < 10


def test_a_refusal_is_told_with_its_code_and_when_to_come_back():
    service = FakeService("monsters-64")
    service.room = 0
    with Client(service) as client:
        reply = asyncio.run(generate(client.port, bodies(1)[0]))
    assert (reply.status, reply.digests) == (429, ())
    assert int(reply.headers["retry-after"]) >= 1


def test_an_error_of_one_seed_is_told_for_that_request_alone():
    service = FakeService("monsters-64")
    service.failing[1] = ApiError(500, "broken", kind=SERVER, code="not_finite")
    with Client(service) as client:
        replies = asyncio.run(open_loop(client.port, [(0.0, body) for body in bodies(3)]))
    assert [reply.status for reply in replies] == [200, 500, 200]
    assert replies[1].error == "not_finite"


def test_who_is_not_there_is_a_reply_without_an_answer():
    reply = asyncio.run(generate(1, bodies(1)[0]))
    assert reply.status == 0
    assert "Connect" in str(reply.error)


def test_clients_that_leave_are_told_apart_and_their_jobs_are_cancelled():
    service = FakeService("monsters-64", row_s=0.1)
    with Client(service) as client:
        replies = asyncio.run(open_loop(client.port, [(0.0, b) for b in bodies(4)], leave_after_s=(0.1, None)))
        time.sleep(0.5)
        assert [reply.status for reply in replies] == [-1, 200, -1, 200]
        assert len(service.cancelled) == 2


def test_an_open_loop_does_not_wait_for_answers_and_a_closed_one_does():
    service = FakeService("monsters-64", row_s=0.05)  # 8 rows: 0.4 s
    with Client(service) as client:
        start = time.monotonic()
        asyncio.run(open_loop(client.port, [(0.02 * i, body) for i, body in enumerate(bodies(6))]))
        together_s = time.monotonic() - start
        replies = asyncio.run(closed_loop(client.port, bodies(6), clients=2))
    ends = sorted(reply.ended for reply in replies)
    assert together_s < 2 * 0.4 < ends[-1] - ends[0] + 0.4
    assert {reply.status for reply in replies} == {200}


@pytest.mark.parametrize("kind", ["text", "labels"])
def test_pictures_without_a_server_are_the_files_of_generate_alone_and_in_a_batch(
    kind, exports, fastgen, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    bundle = exports(kind)[0]
    local = Local(bundle, "ort", threads=1)
    bodies = [local.body(seed, 10, guidance_scale=2.0) for seed in (2, 3, 70)]
    assert [(digest(picture),) for picture in local.pictures(bodies)] == [local.expected(body) for body in bodies]

    monkeypatch.chdir(tmp_path)
    asked = ("--prompt" if kind == "text" else "--labels", bodies[0]["prompt"])
    options = ("--num-inference-steps", 10, "--guidance-scale", 2, "--engine", "ort", "--threads", 1)
    code, _, error = fastgen("generate", *asked, "--seed", 2, "--model", bundle, *options)
    assert code == 0, error
    (file,) = (tmp_path / "generated").iterdir()
    assert local.expected(bodies[0]) == (digest(file.read_bytes()),)
    assert local.expected({**bodies[0], "seed": 1, "n": 2})[1:] == local.expected(bodies[0])


def test_a_picture_with_other_bytes_is_counted(text_bundle):
    pytest.importorskip("onnxruntime")
    local = Local(text_bundle, "ort", threads=1)
    body = local.body(1, 10)
    right = Reply(body, 200, 0.1, 0.0, local.expected(body))
    wrong = Reply(body, 200, 0.1, 0.0, ("0" * 64,))
    refused = Reply(body, 429, 0.1, 0.0)
    assert local.wrong([right, wrong, refused]) == (2, 1)


def test_static_batches_run_in_real_time_with_the_bytes_of_generate(text_bundle):
    pytest.importorskip("onnxruntime")
    local = Local(text_bundle, "ort", threads=1)
    replies: list[Reply] = []
    arrivals = [Arrival(0.01 * i, 10, "", i) for i in range(5)]
    outcome = static(arrivals, local.executor(replies), largest=4)
    assert local.wrong(replies) == (5, 0)
    assert [served.latency for served in outcome.served] == pytest.approx([r.latency_s for r in replies], abs=1e-3)
    assert min(outcome.latencies()) >= 0.01  # the window, or the wait for a full batch


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_section_measures_a_server_of_a_tiny_model_and_finds_no_wrong_byte(text_bundle, tmp_path, monkeypatch):
    for package in ("onnxruntime", "starlette", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setattr(serving, "QUICK", serving.Size(2, 4, (0.5, 0.9), 6, 6, 2, (1, 2)))
    monkeypatch.setattr(serving_faults, "KILL_S", 2.0)
    monkeypatch.setattr(serving_faults, "LEAST_KILLS", 1)
    monkeypatch.setattr(serving_faults, "OVERLOAD", 1)
    out = tmp_path / "result.json"
    result = CliRunner().invoke(serving.main, ["--quick", "--model", str(text_bundle), "--engine", "ort", str(out)])
    assert result.exit_code == 0, result.output
    value = json.loads(out.read_text())
    rows = {row["measure"]: row for row in value["rows"]}
    assert [name for name, row in rows.items() if row["wrong_bytes"]] == []
    assert rows["parity: answers to mixed requests"]["pictures"] == 6
    assert sum(row["pictures"] > 0 for row in value["rows"]) >= 8
    assert {(line["load"], line["server"]) for line in value["latency"]} == {
        (load, name) for load in (0.5, 0.9) for name in ("step-level", "static", "one by one")
    }
    assert sum(line["wrong_bytes"] for line in value["latency"]) == 0
    assert rows["worker killed 1 times: requests without an answer"]["value"] == 0
    assert (
        rows["worker killed 1 times: not ready after, s"]["value"]
        < rows["worker killed 1 times: ready again after, s"]["value"]
    )
    assert (tmp_path / "result-latency.png").stat().st_size > 10_000
    assert value["environment"]["commit"]
    assert value["settings"]["dtype"] == "fp32"
