"""Bodies that nobody should send: an answer in OpenAI's shape that is never 500, at once, and one line in the log."""

from __future__ import annotations

import gzip
import json
import re
import socket
import statistics
import time

import pytest
from fake_service import FakeService
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving_client import Client, running_server, wait_for

from fastgen.serving.wire import FIELDS, MAX_BODY

PATH = "/v1/images/generations"
JSON = {"content-type": "application/json"}
SECRETS = re.compile(r"Traceback|File \"|/[a-z]+/[a-z]+\.py")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=30)
    | st.sampled_from(
        [
            "../../etc/passwd",
            "file:///etc/passwd",
            "http://169.254.169.254",
            "<script>",
            "\x1b[31m",
            "\r\nx: y",
            "\u202e",
        ]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
FIELD_NAMES = st.sampled_from(FIELDS) | st.text(max_size=12)
OBJECTS = st.dictionaries(FIELD_NAMES, VALUES, max_size=6).map(lambda value: json.dumps(value).encode())
NEAR = st.tuples(FIELD_NAMES, VALUES).map(
    lambda item: json.dumps({"prompt": "x", "num_inference_steps": 2, item[0]: item[1]}).encode()
)
CUT = st.tuples(OBJECTS, st.integers(0, 60)).map(lambda item: item[0][: -item[1] or None])
BODIES = OBJECTS | NEAR | CUT | st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode())
SEND = {
    "text": ({"content-type": "text/plain"}, b'{"prompt": "x"}', 415),
    "form": ({"content-type": "application/x-www-form-urlencoded"}, b"prompt=x", 415),
    "no type": ({}, b'{"prompt": "x"}', 415),
    "type in a parameter": ({"content-type": "text/plain; x=application/json"}, b'{"prompt": "x"}', 415),
    "gzip bomb": (JSON | {"content-encoding": "gzip"}, gzip.compress(bytes(10**7)), 415),
    "10 MB prompt": (JSON, json.dumps({"prompt": "x" * 10**7}).encode(), 413),
    "one byte too many": (JSON, b" " * (MAX_BODY - 14) + b'{"prompt": "x"}', 413),
    "deep": (JSON, b"[" * 60_000, 400),
    "1e400": (JSON, b'{"guidance_scale": 1e400}', 400),
    "key twice": (JSON, b'{"prompt": "x", "prompt": "y"}', 400),
    "bad UTF-8": (JSON, b'{"prompt": "\xff\xfe"}', 400),
    "BOM": (JSON, b'\xef\xbb\xbf{"prompt": "x"}', 400),
    "NaN": (JSON, b'{"guidance_scale": NaN}', 400),
    "long key": (JSON, json.dumps({"k" * 60_000: 1}).encode(), 400),
    "many keys": (JSON, json.dumps({f"k{i}": 1 for i in range(5000)}).encode(), 400),
}


@pytest.fixture(scope="module")
def client():
    with Client(FakeService("monsters-64", "iclevr-64")) as client:
        yield client


def refusal(answer):
    """The error of an answer, which is checked to have OpenAI's shape and to tell nothing of the server's inside."""
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" or answer.status_code == 404
    assert not SECRETS.search(answer.text)
    assert all(ord(character) < 128 for character in answer.text)  # so that no control character reaches a terminal
    return error


@pytest.mark.parametrize("name", SEND)
def test_what_is_no_request_is_refused(client, name):
    headers, body, status = SEND[name]
    answer = client.post(PATH, content=body, headers=headers)
    assert answer.status_code == status
    assert refusal(answer)["param"] is None or name in ("long key", "many keys")


@pytest.mark.slow
def test_two_thousand_bodies_never_make_an_error_of_the_server(client):
    seconds, statuses, lines = [], set(), len(client.lines)

    @settings(max_examples=2000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(BODIES)
    def send(body):
        start = time.perf_counter()
        answer = client.post(PATH, content=body, headers=JSON)
        statuses.add(answer.status_code)
        if answer.status_code not in (200, 202):
            seconds.append(time.perf_counter() - start)
            error = refusal(answer)
            if answer.status_code == 400 and error["code"] not in ("invalid_json", "bad_host"):
                assert error["param"] is not None

    send()
    assert {400} < statuses
    assert statuses <= {200, 202, 400, 404}
    assert statistics.median(seconds) < 0.05
    wait_for(lambda: len(client.lines) - lines >= 2000)  # a line is written after its answer is sent
    assert all("\n" not in line and line.isascii() and line.isprintable() for line in client.lines)


def test_the_largest_body_is_read(client):
    body = b'{"prompt": "x"}'
    assert client.post(PATH, content=b" " * (MAX_BODY - len(body)) + body, headers=JSON).status_code == 200


def test_an_endless_body_is_not_read_beyond_its_limit():
    with running_server() as server:
        before, sent, answer = server.rss(), 0, b""
        with socket.create_connection(("127.0.0.1", server.port)) as peer:
            peer.settimeout(5)
            peer.sendall(b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % PATH.encode())
            peer.sendall(b"transfer-encoding: chunked\r\n\r\n")
            chunk = b"10000\r\n" + b" " * 65_536 + b"\r\n"
            try:
                while sent < 2**30:
                    peer.sendall(chunk)
                    sent += len(chunk)
            except OSError:  # the server has closed the connection
                pass
            answer = peer.recv(65_536)
        assert sent < 20 * 2**20  # most of which lies in buffers of the system
        assert b" 413 " in answer.splitlines()[0]
        assert server.rss() - before < 5 * 2**20


@pytest.mark.parametrize("length", ["99999999999999999999999", "1073741824", "65537"])
def test_a_body_that_is_announced_as_too_large_is_not_awaited(client, length):
    with socket.create_connection(("127.0.0.1", client.port)) as peer:
        peer.settimeout(5)
        head = f"POST {PATH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        peer.sendall(head.encode())
        assert peer.recv(65_536).startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 400 "))


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nhost: evil\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\nx",
        b"GET / HTTP/9.9\r\nhost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50) + b"\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\nx: " + b"y" * 70_000,
        b"BREW /coffee HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
    ],
    ids=range(9),
)
def test_what_is_no_http_is_refused_and_the_server_goes_on(client, head, capfd):
    with socket.create_connection(("127.0.0.1", client.port)) as peer:
        peer.settimeout(5)
        peer.sendall(head)
        answer = b""
        while b"}}" not in answer:
            answer += peer.recv(65_536)
    assert re.match(rb"HTTP/1\.1 4\d\d ", answer)
    assert b'{"error":{' in answer
    assert client.get("/health/live").status_code == 200
    assert capfd.readouterr().err == ""
