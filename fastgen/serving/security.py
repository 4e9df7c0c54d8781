"""Who may ask: the ASGI layer around the application. It checks Host, Origin and API key, sets the headers that protect
browsers, turns what fails into an answer in OpenAI's shape, and writes one line per request."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import json
import re
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fastgen.errors import InputError, Say
from fastgen.files.jsonfiles import brief
from fastgen.serving.answers import dump
from fastgen.serving.errors import AUTHENTICATION, PERMISSION, SERVER, ApiError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
OPEN_PATHS = ("/", "/favicon.ico", "/health", "/health/live", "/health/ready", "/v1/health/live", "/v1/health/ready")
OPEN_IMAGES = re.compile(r"/v1/images/jobs/[^/]+/images/[^/]+")  # <img> sends no key; a job's id cannot be guessed
CORS_METHODS = "GET, POST, DELETE"
CORS_EXPOSED = "x-fastgen-job, retry-after"
PREFLIGHT_S = "600"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9, _-]{1,2000}")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_INLINE = re.compile(r"<(script|style)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)
_KEY = re.compile(r"[!-~]{8,200}")
NOTHING = "default-src 'none'; frame-ancestors 'none'"  # what an answer that is no page may load
CLIENT_LEFT = 499  # in the log: the client did not wait for its answer


@dataclass(frozen=True)
class Policy:
    """`keys`: API keys, any of which opens the API; none: it is open. `hosts`: the names in the header Host; None: any.
    `origins`: other websites that may use the API. `page_policy`: see `content_policy`."""

    keys: Sequence[str] = ()
    hosts: Sequence[str] | None = LOOPBACK_NAMES
    origins: Sequence[str] = ()
    page_policy: str = NOTHING


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server at this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def hosts_of(host: str) -> Sequence[str] | None:
    """The names that the header Host may have for a server at `host`. A server for this machine alone has its names alone: a
    website whose name leads here is refused. Any other has a key, which a website lacks."""
    if not is_loopback(host):
        return None
    name = f"[{host.strip('[]')}]" if ":" in host else host
    return tuple(dict.fromkeys((*LOOPBACK_NAMES, name)))


def check_key(key: str, place: str) -> str:
    """The API key, if it is 8 to 200 visible ASCII characters; else InputError that does not repeat it."""
    if not _KEY.fullmatch(key):
        raise InputError(
            f"{place}: found a key of {len(key)} characters, expected 8 to 200 ASCII letters, digits or signs"
        )
    return key


def check_origin(origin: str) -> str:
    """The origin as browsers write it, if it is one, such as https://example.com; else InputError."""
    try:
        parts = urlsplit(origin)
        right = f"{parts.scheme}://{_authority(parts.netloc, parts.scheme)}"
        sound = parts.scheme in ("http", "https") and _AUTHORITY.fullmatch(parts.netloc) and origin.lower() == right
    except ValueError:
        sound = False
    if not sound:
        raise InputError(f"--cors: found {brief(origin)}, expected an origin such as https://example.com")
    return right


def content_policy(page: bytes) -> str:
    """The Content-Security-Policy of a page: its own inline scripts and styles run, by their hashes, and nothing else does."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in _INLINE.findall(page.decode()):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        hashes[kind.lower()].append(f"'sha256-{digest}'")
    script, style = (" ".join(hashes[kind]) or "'none'" for kind in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Guard:
    """ASGI: `app` behind a Policy. `say` gets the line of each request; None: no lines."""

    def __init__(self, app: App, policy: Policy, say: Say | None = None) -> None:
        self._app, self._policy, self._say = app, policy, say
        self._digests = [_digest(key) for key in policy.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # start and end of the application; it has no websockets
            await self._app(scope, receive, send)
            return
        answer = _Answer(send, self._protection(scope))
        headers, start = _headers(scope), time.perf_counter()
        try:
            try:
                if (origin := self._check(scope, headers)) is not None:
                    answer.add(_cors(origin))
                if origin is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                    await answer.empty(_preflight(headers))
                else:
                    await self._app(scope, receive, answer)
            except ApiError as error:
                await answer.error(error)
            except Exception:
                print(escaped(traceback.format_exc()), file=sys.stderr)  # an error of the server itself
                await answer.error(ApiError(500, "the server made an error", kind=SERVER, code="internal_error"))
        finally:
            if self._say is not None:
                self._say(log_line(scope, answer.status, time.perf_counter() - start, answer.job))

    def _check(self, scope: Scope, headers: dict[str, str]) -> str | None:
        """The website that asks, where one does and may. Raises ApiError."""
        policy, host = self._policy, headers.get("host", "")
        if not _AUTHORITY.fullmatch(host):
            raise ApiError(400, "the header Host is missing or malformed", code="bad_host")
        if policy.hosts is not None and _AUTHORITY.fullmatch(host)[1].lower() not in policy.hosts:  # type: ignore[index]
            text = f"the header Host is {host[:100]!r}; this server is called {', '.join(policy.hosts)}"
            raise ApiError(403, text, kind=PERMISSION, code="host_not_allowed")
        client = scope.get("client")
        if policy.hosts is not None and client and not is_loopback(client[0]):
            text = f"this server has no API key, so it answers this machine alone, not {str(client[0])[:100]}"
            raise ApiError(403, text, kind=PERMISSION, code="host_not_allowed")
        origin = headers.get("origin")
        foreign = origin is not None and origin.lower() not in (
            f"{s}://{_authority(host, s)}" for s in ("http", "https")
        )
        if origin is not None and foreign and origin.lower() not in policy.origins:
            text = f"the origin {origin[:100]!r} may not use this server; `fastgen serve --cors` lists those that may"
            raise ApiError(403, text, kind=PERMISSION, code="origin_not_allowed")
        preflight = scope["method"] == "OPTIONS"  # browsers send it without a key
        if self._digests and not preflight and not is_open(scope["method"], scope["path"]):
            scope["fastgen.key"] = self._authenticate(headers)
        return origin if foreign else None

    def _authenticate(self, headers: dict[str, str]) -> str:
        """The name of the client's key in its fair share. Every key is compared, each in constant time."""
        scheme, _, token = headers.get("authorization", "").partition(" ")
        digest = _digest(token.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != "bearer" or not any(matches):
            text = "give an API key of this server: `Authorization: Bearer KEY`"
            raise ApiError(401, text, kind=AUTHENTICATION, code="invalid_api_key")
        return f"key {digest.hex()[:16]}"

    def _protection(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        page = scope["path"] == "/"
        csp = self._policy.page_policy if page else NOTHING
        sharing = b"cross-origin" if self._policy.origins else b"same-origin"
        return [
            (b"content-security-policy", csp.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-resource-policy", sharing),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cache-control", b"no-store"),
        ]


class _Answer:
    """The `send` of a request: adds headers, and knows the status and the job."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._send, self._headers = send, headers
        self.status: int | None = None
        self.job = ""

    def add(self, headers: list[tuple[bytes, bytes]]) -> None:
        self._headers = [*self._headers, *headers]

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, own = message["status"], list(message.get("headers", ()))
            self.job = next((value.decode("latin-1") for name, value in own if name == b"x-fastgen-job"), "")
            message = {**message, "headers": [*own, *self._headers]}
        await self._send(message)

    async def empty(self, headers: list[tuple[bytes, bytes]]) -> None:
        await self({"type": "http.response.start", "status": 204, "headers": headers})
        await self({"type": "http.response.body", "body": b""})

    async def error(self, error: ApiError) -> None:
        """An error as the answer, unless another one has begun."""
        if self.status is not None:
            return
        body = dump(error.body())
        headers = [*error_headers(error), ("content-type", "application/json"), ("content-length", str(len(body)))]
        raw = [(name.encode(), value.encode()) for name, value in headers]
        await self({"type": "http.response.start", "status": error.status, "headers": raw})
        await self({"type": "http.response.body", "body": body})


def is_open(method: str, path: str) -> bool:
    """Whether a request needs no API key."""
    return method in ("GET", "HEAD") and (path in OPEN_PATHS or OPEN_IMAGES.fullmatch(path) is not None)


def error_headers(error: ApiError) -> list[tuple[str, str]]:
    """Headers of an error: when to try again, or that it helps nothing."""
    headers = []
    if error.retry_after is not None:
        headers.append(("retry-after", str(error.retry_after)))
    elif error.status >= 500:
        headers.append(("x-should-retry", "false"))  # OpenAI's clients obey it
    if error.status == 401:
        headers.append(("www-authenticate", "Bearer"))
    return headers


def escaped(text: str) -> str:
    """Lines of a text whose other control characters, and all that is not ASCII, cannot move a terminal's cursor."""
    return re.sub(r"[^\n -~]", lambda match: ascii(match[0])[1:-1], text)


def log_line(scope: Scope, status: int | None, seconds: float, job: str = "") -> str:
    """A request on one line: everything that the client chose is escaped."""
    client = (scope.get("client") or ("-",))[0]
    path = json.dumps(str(scope["path"])[:200])
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    words = [when, client, scope["method"][:20], path, str(status or CLIENT_LEFT), f"{1000 * seconds:.1f} ms"]
    return " ".join([*words, *([f"job {job}"] if job else [])])


def _headers(scope: Scope) -> dict[str, str]:
    """The headers; one that is given twice has a value that no check passes."""
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        headers[key] = f"{headers[key]}, {value.decode('latin-1')}" if key in headers else value.decode("latin-1")
    return headers


def _cors(origin: str) -> list[tuple[bytes, bytes]]:
    return [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-expose-headers", CORS_EXPOSED.encode()),
        (b"vary", b"origin"),
    ]


def _preflight(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    asked = headers.get("access-control-request-headers", "")
    allowed = asked if _HEADER_NAMES.fullmatch(asked) else "authorization, content-type"
    return [
        (b"access-control-allow-methods", CORS_METHODS.encode()),
        (b"access-control-allow-headers", allowed.encode()),
        (b"access-control-max-age", PREFLIGHT_S.encode()),
    ]


def _authority(host: str, scheme: str) -> str:
    """Host and port without the scheme's own port, in lower case."""
    return host.lower().removesuffix({"http": ":80", "https": ":443"}.get(scheme, "\0"))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
