"""A headless Chromium that looks at the server's page, and notes what a page must not do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from serving_client import Client

from fastgen.serving.security import Policy, content_policy

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser; skips the test where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no browser: neither chromium nor google-chrome is on PATH")
    sync_api.expect.set_options(timeout=20_000)
    arguments = ["--no-sandbox"] if os.getuid() == 0 else []  # Chromium's sandbox refuses root
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Visit:
    """`with Visit(browser, service, page) as visit`: the page of a server, open in `visit.tab`. At the end: no request has left
    the server, and no error was in the console but those that `allowed` names a part of."""

    def __init__(self, browser: Any, service: Any, html: bytes, *, keys: tuple[str, ...] = (), **context: Any) -> None:
        self.client = Client(service, Policy(keys=keys, page_policy=content_policy(html)), html)
        self.base = f"http://127.0.0.1:{self.client.port}"
        self.allowed: tuple[str, ...] = ()
        self.problems: list[str] = []
        self._browser, self._options = browser, {"viewport": {"width": 1280, "height": 900}, **context}

    def __enter__(self) -> Visit:
        self.client.__enter__()
        self.context = self._browser.new_context(**self._options)
        self.tab = self.open()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        self.context.close()
        self.client.__exit__(kind, *error)
        if kind is None:
            assert [p for p in self.problems if not any(part in p for part in self.allowed)] == []

    def open(self, path: str = "/") -> Any:
        """A new tab."""
        tab = self.context.new_page()
        tab.on("console", lambda m: m.type in ("error", "warning") and self.problems.append(f"console: {m.text}"))
        tab.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        tab.on("dialog", lambda dialog: self.problems.append(f"dialog: {dialog.message}"))
        tab.on("request", self._note)
        tab.goto(self.base + path)
        return tab

    def _note(self, request: Any) -> None:
        if not request.url.startswith((f"{self.base}/", "blob:", "data:")):
            self.problems.append(f"request: {request.url}")

    def pictures(self, count: int, tab: Any = None) -> Any:
        """The finished pictures of the gallery, once there are `count`."""
        from playwright.sync_api import expect

        tiles = (tab or self.tab).locator("#gallery .tile")
        expect(tiles).to_have_count(count)
        return tiles

    def jobs(self) -> list[str]:
        """The ids in the address."""
        return [id for run in self.tab.url.partition("#jobs=")[2].split(";") for id in run.split(",") if id]

    def bytes(self, job: str, index: int = 0) -> bytes:
        answer = self.client.get(f"/v1/images/jobs/{job}/images/{index}.png")
        assert answer.status_code == 200
        return answer.content
