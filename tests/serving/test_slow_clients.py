"""Clients that are slow or never end do not keep others waiting, and are cut off."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import pytest
from serving_client import running_server, wait_for

from fastgen.serving.http import BODY_S, HEADER_S, MAX_CONNECTIONS, SEND_BUFFER, WRITE_S

PATH = "/v1/images/generations"
HEAD = b"POST %b HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n" % PATH.encode()
BODY = {"prompt": "x", "num_inference_steps": 8}
SLACK = 1.5  # seconds, for a busy machine


def connect(stack: ExitStack, port: int, first: bytes, buffer: int | None = None) -> socket.socket:
    peer = stack.enter_context(socket.socket())
    if buffer is not None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    peer.settimeout(30)
    peer.connect(("127.0.0.1", port))
    peer.sendall(first)
    return peer


def p95(server, requests: int = 20) -> float:
    """Seconds of a good request, on a connection of its own."""
    seconds = []
    for _ in range(requests):
        start = time.perf_counter()
        assert httpx.post(f"http://127.0.0.1:{server.port}{PATH}", json=BODY, trust_env=False).status_code == 200
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[int(0.95 * requests) - 1]


def whole(peer: socket.socket) -> bytes:
    """An answer of the route /health/live."""
    answer = b""
    while not answer.endswith(b"}"):
        answer += peer.recv(2000)
    return answer


def ended(peer: socket.socket) -> bool:
    """Whether the server has closed the connection; waits until it does."""
    try:
        while peer.recv(65_536):
            pass
    except ConnectionError:
        pass
    return True


@pytest.mark.slow
def test_five_hundred_half_headers_keep_nobody_waiting_and_are_closed_in_time():
    with running_server("--row-s", "0.01") as server, ExitStack() as stack:
        before = p95(server)
        start = time.monotonic()
        peers = [connect(stack, server.port, b"GET / HTTP/1.1\r\nhost: loc") for _ in range(500)]
        beside = p95(server)
        assert all(map(ended, peers))
        assert HEADER_S - 1 < time.monotonic() - start < HEADER_S + 3 * SLACK
        assert beside < 2 * max(before, p95(server)) + 0.1  # as others use this machine too


@pytest.mark.slow
def test_headers_that_come_letter_by_letter_have_no_more_time():
    with running_server() as server, ExitStack() as stack:
        peer = connect(stack, server.port, b"GET / HT")
        start = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - start < HEADER_S + 10:
                peer.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - start < HEADER_S + SLACK


def test_more_connections_than_there_are_places_end_the_oldest_that_only_waits():
    with running_server("--row-s", "0.3") as server, ExitStack() as stack:
        body = json.dumps(BODY).encode()
        busy = connect(
            stack, server.port, HEAD + b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(body), body)
        )
        time.sleep(0.2)
        peers = [connect(stack, server.port, b"GET / HTTP/1.1\r\n") for _ in range(MAX_CONNECTIONS + 50)]
        assert httpx.get(f"http://127.0.0.1:{server.port}/health/live", trust_env=False).status_code == 200
        assert all(map(ended, peers[:50]))
        peers[-1].sendall(b"host: localhost\r\n\r\n")
        assert peers[-1].recv(100).startswith(b"HTTP/1.1 200 ")
        assert busy.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
def test_slow_bodies_are_answered_with_408_and_keep_nobody_waiting():
    with running_server("--row-s", "0.01") as server, ExitStack() as stack:
        before = p95(server)
        start = time.monotonic()
        peers = [connect(stack, server.port, HEAD + b"content-length: 100\r\n\r\n{") for _ in range(100)]
        beside = p95(server)
        answers = [peer.recv(65_536) for peer in peers]
        assert {answer.split(b" ")[1] for answer in answers} == {b"408"}
        assert BODY_S - 3 < time.monotonic() - start < BODY_S + 3 * SLACK
        assert all(map(ended, peers))
        assert beside < 2 * max(before, p95(server)) + 0.1


@pytest.mark.slow
def test_a_body_that_nobody_asked_for_has_a_deadline_too():
    with running_server() as server, ExitStack() as stack:
        peer = connect(
            stack, server.port, b"GET /health/live HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99\r\n\r\n"
        )
        assert peer.recv(100).startswith(b"HTTP/1.1 200 ")
        start = time.monotonic()
        assert ended(peer)
        assert time.monotonic() - start < BODY_S + SLACK


def test_an_idle_connection_is_kept_for_a_moment_and_then_closed():
    with running_server() as server, ExitStack() as stack:
        peer = connect(stack, server.port, b"GET /health/live HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert whole(peer).startswith(b"HTTP/1.1 200 ")
        time.sleep(HEADER_S - 1)
        peer.sendall(b"GET /health/live HTTP/1.1\r\nhost: ")
        time.sleep(2)  # the second request has its own time
        peer.sendall(b"localhost\r\n\r\n")
        assert whole(peer).startswith(b"HTTP/1.1 200 ")
        start = time.monotonic()
        assert ended(peer)
        assert time.monotonic() - start < HEADER_S + SLACK


@pytest.mark.slow
def test_readers_that_do_not_read_are_cut_off_with_their_jobs_and_hold_little_memory():
    fields = BODY | {"stream": True, "previews": 50, "num_inference_steps": 200, "n": 5}
    body = json.dumps(fields).encode()
    with running_server("--row-s", "0.05", "--padding", "100000") as server, ExitStack() as stack:
        first, before, sockets = p95(server), server.rss(), server.sockets()
        request = HEAD + b"content-length: %d\r\n\r\n%b" % (len(body), body)
        peers = [connect(stack, server.port, request, 8192) for _ in range(100)]
        time.sleep(3)  # until their buffers are full
        with ThreadPoolExecutor(1) as pool:
            good = pool.submit(p95, server)
            highest = 0
            while not good.done():
                highest = max(highest, server.rss())
                time.sleep(0.1)
        wait_for(lambda: server.sockets() <= sockets, 3 * WRITE_S + 30)
        assert good.result() < 2 * max(first, p95(server)) + 0.2
        assert highest - before < len(peers) * (2 * SEND_BUFFER + 400_000)
