"""The page's file itself: it needs nothing from elsewhere, runs no text as code, and every control has a name."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILE = ROOT / "fastgen" / "serving" / "page" / "index.html"
TEXT = FILE.read_text()
SCRIPT = re.search(r"<script>(.*)</script>", TEXT, re.DOTALL)[1]  # type: ignore[index]
STYLE = re.search(r"<style>(.*)</style>", TEXT, re.DOTALL)[1]  # type: ignore[index]
VOID = {"meta", "link", "input", "br", "img", "rect", "path"}
CONTROLS = {"input", "select", "textarea"}


class Elements(HTMLParser):
    """`found`: (tag, attributes, tags around it, texts inside) of every element."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag, attrs):
        words: list[str] = []
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        self.found.append((tag, dict(attrs), [name for name, _ in self._open], words))
        if tag not in VOID:
            self._open.append((tag, words))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        if tag not in VOID:
            opened = self._open.pop()[0]
            assert opened == tag, f"<{opened}> is closed by </{tag}>"

    def handle_data(self, data):
        for _, words in self._open:
            words.append(data)


@pytest.fixture(scope="module")
def elements():
    parser = Elements()
    parser.feed(TEXT)
    parser.close()
    assert parser._open == []
    return parser.found


def test_the_page_refers_to_nothing_outside(elements):
    assert "://" not in TEXT
    assert not re.search(r"@import|@font-face|url\(", STYLE)
    assert not re.search(r"^\s*import\b|\bimport\(|importScripts|WebSocket|sendBeacon", SCRIPT, re.MULTILINE)
    places = [(name, value) for _, attributes, _, _ in elements for name, value in attributes.items()]
    assert [(n, v) for n, v in places if n in ("src", "srcset", "action", "formaction", "poster", "data")] == []
    assert {v for n, v in places if n == "href"} == {"data:,", "#results"}


def test_one_script_and_one_style_which_a_policy_of_hashes_admits(elements):
    assert [tag for tag, *_ in elements].count("script") == 1
    assert [tag for tag, *_ in elements].count("style") == 1
    names = {name for _, attributes, _, _ in elements for name in attributes}
    assert not {name for name in names if name.startswith("on")}
    assert "style" not in names


def test_no_text_becomes_code_or_markup():
    writers = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|DOMParser|srcdoc|setHTML|"
        r"\beval\b|new Function|javascript:|setTimeout\(\s*[\"'`]|setAttribute\(\s*[\"'`](on|style)"
    )
    assert re.findall(writers, SCRIPT) == []


def test_ids_are_unique_and_every_reference_to_one_holds(elements):
    ids = [attributes["id"] for _, attributes, _, _ in elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    made = set(re.findall(r'\bid: "([\w-]+)"', SCRIPT))
    used = set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    assert used <= set(ids) | made
    for _, attributes, _, _ in elements:
        for name in ("for", "aria-labelledby", "aria-describedby"):
            for one in (attributes.get(name) or "").split():
                assert one in ids, f"{name}={one}"


def test_every_control_has_a_name(elements):
    targets = {attributes.get("for") for tag, attributes, _, _ in elements if tag == "label"}
    for tag, attributes, around, words in elements:
        named = "aria-label" in attributes or "aria-labelledby" in attributes
        if tag in CONTROLS:
            assert named or attributes.get("id") in targets or "label" in around, attributes
        if tag in ("button", "a"):
            assert named or "".join(words).strip(), attributes
            assert tag != "button" or "type" in attributes, attributes
        if tag == "fieldset":
            assert "".join(words).strip(), attributes
        if tag == "dialog":
            assert named, attributes


def test_the_page_says_its_language_and_fits_a_phone(elements):
    attributes = {tag: attributes for tag, attributes, _, _ in elements}
    assert attributes["html"]["lang"] == "en"
    viewport = next(a["content"] for t, a, _, _ in elements if t == "meta" and a.get("name") == "viewport")
    assert "width=device-width" in viewport
    assert "maximum-scale" not in viewport


def test_the_page_is_part_of_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fastgen"]
    assert any(fnmatch("serving/page/index.html", pattern) for pattern in patterns)
    assert FILE.stat().st_size < 150_000
