"""The HTTP server: uvicorn, with deadlines for slow clients and bounds on what each may hold.

uvicorn itself waits for the headers of a connection for ever, and for a client that does not read.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastgen.serving.answers import dump
from fastgen.serving.errors import SERVER, ApiError
from fastgen.serving.security import App

HEADER_S, BODY_S, KEEP_ALIVE_S, WRITE_S = 5.0, 12.0, 5, 10.0
MAX_HEADERS = 16_384  # bytes
SEND_BUFFER = 262_144  # bytes that wait for a client, in the process and again in the system
MAX_CONNECTIONS = 512
LEAST_READ = 16_384  # bytes that a client reads in WRITE_S, or its connection ends
CHECK_TICKS = 5  # of uvicorn's 0.1 s
CLOSE_S = 2  # for open connections at the end


class Protocol(H11Protocol):
    """A connection. `incomplete` since `_since`: its headers, or the next request, have not come."""

    limit = MAX_CONNECTIONS

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._since, self._state = self.loop.time(), self.conn.their_state
        self._stuck: tuple[float, int] | None = None  # when the send buffer last shrank, and its size
        transport.set_write_buffer_limits(high=SEND_BUFFER)
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        if len(self.connections) > self.limit:
            self._make_room()

    @property
    def incomplete(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def data_received(self, data: bytes) -> None:
        if self.incomplete and self.cycle is not None and not self.conn.trailing_data[0]:
            self._since = self.loop.time()  # the first bytes of a later request
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._note()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP: an answer in the API's shape."""
        body = dump(ApiError(400, msg.removesuffix(".").lower(), code="invalid_http").body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            event = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            self.transport.write(b"".join(self.conn.send(part) or b"" for part in (event, h11.Data(data=body))))
        self.transport.close()

    def check(self, now: float) -> None:
        """End the connection where its client is too slow: to send a request, or to read the answer."""
        waited = now - self._since
        late = waited > HEADER_S if self.incomplete else self.conn.their_state is h11.SEND_BODY and waited > BODY_S
        if late or self._reads_nothing(now):
            self.transport.abort()

    def _note(self) -> None:
        """Start the clock anew where the connection has come to another part of its request."""
        if self.conn.their_state is not self._state:
            self._since, self._state = self.loop.time(), self.conn.their_state

    def _reads_nothing(self, now: float) -> bool:
        size = self.transport.get_write_buffer_size()
        if size == 0:
            self._stuck = None
        elif self._stuck is None or size > self._stuck[1] or size <= self._stuck[1] - LEAST_READ:
            self._stuck = now, size
        return self._stuck is not None and now - self._stuck[0] > WRITE_S

    def _make_room(self) -> None:
        """End the connection that has been incomplete for longest; where all are at work, this one."""
        others = [c for c in self.connections if c is not self and isinstance(c, Protocol) and c.incomplete]
        if others:
            oldest = min(others, key=lambda connection: connection._since)
            self.connections.discard(oldest)
            oldest.transport.abort()
            return
        body = dump(ApiError(503, "too many connections", kind=SERVER, code="too_many_connections").body())
        head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to the command and looks after slow clients."""

    async def on_tick(self, counter: int) -> bool:
        if counter % CHECK_TICKS == 0:
            for connection in list(self.server_state.connections):
                if isinstance(connection, Protocol):
                    connection.check(connection.loop.time())
        return await super().on_tick(counter)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_server(app: App) -> Server:
    """A server of the application, for `await server.serve(sockets=[listener])`; `server.should_exit = True` ends it."""
    Protocol.limit = _most_connections()
    config = uvicorn.Config(
        app,
        http=Protocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADERS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=CLOSE_S,
    )
    return Server(config)


def _most_connections() -> int:
    """Connections at a time: half of the files that the process may open, MAX_CONNECTIONS at most."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return MAX_CONNECTIONS
    return min(MAX_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)


def bind(host: str, port: int) -> socket.socket:
    """A socket at this address that does not listen yet; port 0: any free one. Raises OSError."""
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    listener = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # after a restart; elsewhere it would let two servers share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    listener.set_inheritable(False)
    return listener


def address_of(listener: socket.socket) -> str:
    """http://HOST:PORT of a bound socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
