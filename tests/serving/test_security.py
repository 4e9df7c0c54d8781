"""Who may use the server, and what a hostile request cannot do."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import re
import sys
import threading

import pytest
from fake_service import FakeService
from serving_client import Client, wait_for

from fastgen.errors import InputError
from fastgen.serving import security
from fastgen.serving.app import create_app
from fastgen.serving.security import Policy, check_key, check_origin, content_policy, hosts_of, is_loopback, log_line

PATH = "/v1/images/generations"
BODY = {"prompt": "x", "model": "monsters-64"}
KEYS = ("first-key-0123", "second-key-4567")
PAGE = b"<!doctype html><style>p { color: red }</style><script>\nlet a = 1;\n</script><p>x</p>"


@pytest.fixture
def service():
    return FakeService()


def serve(service, **policy):
    return Client(service, Policy(**policy), PAGE)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer wrong-key-0123"}, 401),
        ({"authorization": f"Bearer {KEYS[0]}x"}, 401),
        ({"authorization": f"Bearer {KEYS[0][:-1]}"}, 401),
        ({"authorization": f"Basic {KEYS[0]}"}, 401),
        ({"authorization": KEYS[0]}, 401),
        ({"authorization": f"Bearer {KEYS[0]}"}, 200),
        ({"authorization": f"bearer {KEYS[1]}"}, 200),
    ],
)
def test_a_key_opens_the_api_and_nothing_else_does(service, headers, status):
    with serve(service, keys=KEYS) as client:
        assert client.post(PATH, json=BODY, headers=headers).status_code == status
        for path in ("/v1/models", "/metrics", "/v1/images/jobs/x"):
            assert (client.get(path, headers=headers).status_code == 401) == (status == 401)
        for path in ("/", "/health/live", "/health/ready", "/v1/health/ready"):
            assert client.get(path).status_code == 200
    assert len(service.submitted) == (status == 200)


def test_clients_of_two_keys_have_shares_of_their_own(service):
    with serve(service, keys=KEYS) as client:
        for key in KEYS:
            client.post(PATH, json=BODY | {"user": "me"}, headers={"authorization": f"Bearer {key}"})
    assert len({request.key for request in service.submitted}) == 2
    assert not any(key in request.key for request in service.submitted for key in KEYS)


def test_every_key_is_compared_in_constant_time(service, monkeypatch):
    compared = []
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or a == b)
    with serve(service, keys=KEYS) as client:
        for key in (KEYS[0], KEYS[1], "x", "y" * 5000):
            client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    assert compared == [(32, 32)] * 8


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LocalHost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost@evil", 400),
        ("", 400),
        ("localhost, evil", 400),
    ],
)
def test_a_name_that_leads_here_is_no_name_of_the_server(service, host, status):
    with serve(service) as client:
        assert client.post(PATH, json=BODY, headers={"host": host}).status_code == status
    assert len(service.submitted) == (status == 200)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("null", 403),
        ("https://evil.example", 403),
        ("http://localhost:3000", 403),
        ("http://localhost", 403),
        ("file://", 403),
        ("", 403),
        ("http://127.0.0.1:{port}", 200),
        ("HTTP://127.0.0.1:{port}", 200),
        ("https://app.example", 200),
        ("https://app.example.evil", 403),
        ("http://app.example", 403),
    ],
)
def test_websites_may_ask_only_where_they_are_listed(service, origin, status):
    with serve(service, origins=("https://app.example",)) as client:
        headers = {"origin": origin.format(port=client.port)}
        answer = client.post(PATH, json=BODY, headers=headers)
        assert answer.status_code == status
        foreign = origin == "https://app.example"
        assert answer.headers.get("access-control-allow-origin") == (origin if foreign else None)
    assert len(service.submitted) == (status == 200)


def test_a_listed_website_s_preflight_needs_no_key_and_others_get_nothing(service):
    with serve(service, keys=KEYS, origins=("https://app.example",)) as client:
        asked = {
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization,x-stainless-os",
        }
        answer = client.options(PATH, headers=asked | {"origin": "https://app.example"})
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-headers"] == "authorization,x-stainless-os"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "access-control-allow-origin" not in client.options(PATH, headers=asked | {"origin": "null"}).headers
        assert client.options(PATH).status_code == 405


def test_a_body_that_a_form_could_send_is_refused(service):
    with serve(service) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
            assert client.post(PATH, content=b'{"prompt": "x"}', headers={"content-type": kind}).status_code == 415
    assert service.submitted == []


def test_every_answer_protects_browsers_and_the_page_runs_its_own_scripts_alone(service):
    with serve(service, page_policy=content_policy(PAGE)) as client:
        for path in ("/", "/v1/models", "/nope", "/v1/images/jobs/x"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["x-frame-options"] == "DENY"
            assert "default-src 'none'" in headers["content-security-policy"]
        policy = client.get("/").headers["content-security-policy"]
    hashes = {
        kind: base64.b64encode(hashlib.sha256(text).digest()).decode()
        for kind, text in [("script", b"\nlet a = 1;\n"), ("style", b"p { color: red }")]
    }
    assert f"script-src 'sha256-{hashes['script']}';" in policy
    assert f"style-src 'sha256-{hashes['style']}';" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    "path",
    [
        "/%1b[31mred",
        "/a%0d%0aset-cookie:%20x=1",
        "/%e2%80%ae",
        "/%22%20200",
        "/<script>",
        "/" + "x" * 5000,
        "/%ff%fe",
        "/v1/images/jobs/%0a%0a",
    ],
)
def test_a_request_is_one_escaped_line_and_sets_no_header(service, path):
    with serve(service) as client:
        answer = client.get(path)
        assert answer.status_code == 404
        assert "set-cookie" not in answer.headers
        assert answer.text.isascii()
        assert answer.text.isprintable()
        wait_for(lambda: client.lines)
        (line,) = client.lines
    assert re.fullmatch(r'\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ 127\.0\.0\.1 GET "/[^\n]*" 404 \d+\.\d ms', line)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 1300


def test_the_words_of_a_prompt_are_in_no_log_line_and_no_header(service):
    with serve(service) as client:
        words = "<script>alert(1)</script>\x1b[31m\r\nx-evil: 1\u202e"
        answer = client.post(PATH, json=BODY | {"prompt": words, "user": words})
        assert answer.status_code == 200
        assert answer.text.isascii()
        image = client.get(f"/v1/images/jobs/{answer.headers['x-fastgen-job']}/images/0.png")
        assert image.status_code == 200
        for headers in (answer.headers, image.headers):
            assert "x-evil" not in headers
            assert not any(sign in value for value in headers.values() for sign in ("<", "\x1b", "\u202e"))
        wait_for(lambda: len(client.lines) == 2)
        assert not any("alert" in line for line in client.lines)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page/index.html",
        "/static/app.js",
        "//etc/passwd",
        "/index.html",
    ],
)
def test_no_path_is_a_file(service, path):
    with serve(service) as client:
        assert client.get(path).status_code in (404, 400)


def test_no_field_is_ever_a_path_or_an_address(service):
    """Nothing is opened and nothing is connected to while the server's thread answers."""
    seen, watching = [], []

    def audit(event, arguments):
        if watching and threading.get_ident() == watching[0]:
            if event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.listdir", "os.system"):
                seen.append((event, arguments))
            if event == "open" and ".py" not in str(arguments[0]):  # an import on first use
                seen.append((event, arguments))

    sys.addaudithook(audit)
    hostile = [
        "../../etc/passwd",
        "file:///etc/passwd",
        "http://169.254.169.254/latest",
        "/etc/passwd",
        "\\\\host\\share",
    ]
    with serve(service) as client:
        client.post(PATH, json=BODY)
        watching.append(client._thread.ident)
        try:
            for value in hostile:
                for field in (
                    "prompt",
                    "model",
                    "size",
                    "scheduler",
                    "labels",
                    "rag",
                    "user",
                    "output_format",
                    "image",
                ):
                    status = client.post(PATH, json=BODY | {field: value}).status_code
                    assert status == (200 if field in ("prompt", "user") else 404 if field == "model" else 400)
        finally:
            watching.clear()
    assert seen == []


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.7", False),
        ("example.com", False),
        ("localhost.example.com", False),
    ],
)
def test_only_loopback_is_loopback(host, loopback):
    assert is_loopback(host) is loopback
    assert (hosts_of(host) is None) is not loopback


@pytest.mark.parametrize("origin", ["https://a.example", "http://localhost:3000", "http://[::1]:5"])
def test_origins_are_taken_as_browsers_write_them(origin):
    assert check_origin(origin) == origin


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "a.example",
        "https://a.example/",
        "https://a.example/x",
        "ftp://a",
        "https://u@a",
        "https://",
        "http://[",
        "https://a b",
    ],
)
def test_what_is_no_origin_is_refused(origin):
    with pytest.raises(InputError, match="--cors: found"):
        check_origin(origin)


@pytest.mark.parametrize("key", ["", "short", "with space", "ünïcödé-key", "k" * 201, "line\nbreak-key"])
def test_a_weak_key_is_refused_without_being_shown(key):
    with pytest.raises(InputError, match="expected 8 to 200") as caught:
        check_key(key, "--api-key")
    assert not key or key not in str(caught.value)


def test_a_client_that_left_has_a_status_of_its_own_in_the_log():
    scope = {"client": None, "method": "GET", "path": "/"}
    assert log_line(scope, None, 0.5).endswith(f'- GET "/" {security.CLIENT_LEFT} 500.0 ms')


def test_an_error_of_the_server_moves_no_terminal():
    assert security.escaped("a\x1b[31m\r\u202eb\nc\xff") == "a\\x1b[31m\\r\\u202eb\nc\\xff"


def test_a_server_without_a_key_answers_this_machine_alone(service):
    """Behind another server's socket, such as Ray Serve's, whatever name the client gives in Host."""

    def status(client, **policy):
        sent = []

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "GET", "path": "/health/live", "query_string": b"", "client": client}
        scope["headers"] = [(b"host", b"localhost")]
        asyncio.run(create_app(service, Policy(**policy))(scope, None, send))
        return sent[0]["status"]

    assert [status((address, 1)) for address in ("127.0.0.1", "::1", "192.0.2.7", "no address")] == [200, 200, 403, 403]
    assert status(("192.0.2.7", 1), keys=("a-key-of-the-test",), hosts=None) == 200
    assert status(None) == 200  # a socket file of this machine
