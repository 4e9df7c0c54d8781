"""Files of requests that lie, ask for what there is not, or name files that a job itself writes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from attacks import Attack, json_attacks, text_attacks

FILE = "requests.json"
COMMAND = ["generate", FILE, "--model", "model", "--engine", "eager", "--num-inference-steps", "1", "--out", "out"]
ONE = {"labels": ["red cube"]}
SURROGATE = '[{"labels": ["red cube"], "image_name": "\\ud800.png"}]'

CONTENTS: list[tuple[str, str | bytes, str]] = [
    (FILE, "", "is empty"),
    (FILE, " \n\t", "is empty"),
    (FILE, "[", "malformed JSON"),
    (FILE, "[]", "holds no requests"),
    (FILE, "{}", "holds no requests"),
    (FILE, "null", "found None"),
    (FILE, "3", "found 3"),
    (FILE, '"red cube"', "found 'red cube'"),
    (FILE, "[3]", "entry [0]: found 3"),
    (FILE, "[[]]", "labels: found []"),
    (FILE, "[[[]]]", "labels: found []"),
    (FILE, '[["red cube", "red cube"]]', "occurs twice"),
    (FILE, '[["red cub"]]', "did you mean 'red cube'"),
    (FILE, '[["red cube"], {"prompt": "a dragon"}]', "split the file"),
    (FILE, '{"a": ["red cube"]}', "found ['red cube']"),
    (FILE, '{"": {"labels": ["red cube"]}}', "is empty"),
    (FILE, '{"a": {"labels": ["red cube"]}, "a": {"labels": ["red cube"]}}', "occurs twice"),
    (FILE, '[{"labels": ["red cube"], "labels": ["red cube"]}]', "occurs twice"),
    (FILE, '[{"labels": ["red cube"], "seed": NaN}]', "found NaN"),
    (FILE, '[{"labels": ["red cube"], "seed": Infinity}]', "found Infinity"),
    (FILE, '[{"labels": ["red cube"], "seed": 1e400}]', "too large for a float"),
    (FILE, '[{"labels": ["red cube"], "seed": 1' + "0" * 50 + "}]", "51 digits"),
    (FILE, '[["red cube\\u0000"]]', "NUL"),
    (FILE, SURROGATE, "lone surrogate"),
    (FILE, '[["\\udfff"]]', "lone surrogate"),
    (FILE, '[["red cube"]]'.encode("utf-16"), "UTF-16"),
    (FILE, b'[["red cube \xff"]]', "byte 0xff"),
    (FILE, b"\x00" * 64, "malformed JSON"),
    (FILE, "[" * 100_000, "nested too deeply"),
    (FILE, '{"a":' * 100_000, "nested too deeply"),
    (FILE, '[["red cube"]]\n[["red cube"]]', "name it .jsonl"),
    (FILE, '[["red cube"],]', "malformed JSON"),
    (FILE, "{'a': 1}", "malformed JSON"),
    (FILE, "[" + '["red cube"],' * 250_000 + '["red cube"]]', "250,001 requests"),
    (FILE, json.dumps([["x" * 100_001]]), "100,001 characters"),
    (FILE, json.dumps([["x" * 99_000]]), "unknown label"),
]
NAMES = [
    *(
        "../x.png",
        "/x.png",
        "a/../b.png",
        "./x.png",
        "a//b.png",
        "x.png/",
        "a\\b.png",
        "C:x.png",
        "a\nb.png",
        "a\x7f.png",
    ),
    *("x.jpg", "x.JPEG", "x.webp", "x", "", " ", ".png", "a/.png", "x.png ", "x.PNG", "x.tiff", "png"),
    *("x" * 300 + ".png", "é" * 101 + ".png", "a/" * 600 + "x.png"),
    *("contact_sheet.png", "Contact_Sheet.png", "contact_\u017fheet.png", "contact_sheet.png/x.png"),
    *("grid.png", "GRID.png", "grid.png/x.png", "strips.png", "strips.png/x.png", "strips/0.png", "STRIPS/0.png"),
    *("\u017ftrips/0.png", "strips./0.png", "strips /0.png", "strips\u200b/0.png", "strips/a/b.png"),
    *("job.json/x.png", "JOB.JSON/x.png", "job.json./x.png", "job.j\u017fon/x.png", "job.json/a/b.png"),
    *("manifest.jsonl/x.png", "Manifest.jsonl/x.png", ".merge.lock/a.png", ".MERGE.lock/a.png"),
    *("shard-1-of-2.json/x.png", "Shard-10-of-12.JSON/x.png", "score.json/x.png", "copies.json/x.png"),
    *(".0.png.fastgen-01234567-1-1-01234567.tmp/x.png", "a/.x.fastgen-01234567-1-1-01234567.tmp/x.png"),
]
VALUES: list[tuple[str, Any, str]] = [
    *(("image_name", value, "image_name") for value in (*NAMES, 5, None, True, [], {}, 1.5)),
    *(("seed", value, "seed") for value in (-1, 2**63, 2**64, 10**39, 1.5, 1.0, "1", True, [1], {}, -(2**63))),
    *(("labels", value, "labels") for value in ([], "red cube", 5, {}, [5], [""], [" "], [None], [["red cube"]], True)),
    *(("class", value, "class") for value in ([], {}, True, [1])),
    *(("prompt", value, "prompt") for value in (5, [], "", " ", {}, True)),
    *(
        (key, 5, key)
        for key in ("steps", "guidance_scale", "Num-Inference-Steps", "negative_prompt", "width", "n", "lora")
    ),
    *((key, "x", key) for key in ("file_name", "random_seed", "Seed", "imageName", "init_image")),
    ("params", {"steps": 5}, "params.steps"),
]
PAIRS = [
    ("a.png", "a.png", "is taken by"),
    ("a.png", "A.png", "is taken by"),
    ("\u00e9.png", "e\u0301.png", "is taken by"),
    ("ss.png", "\u00df.png", "is taken by"),
    ("a.png", "a\u200b.png", "is taken by"),
    ("a/b.png", "A/b.png", "is taken by"),
    ("a.png", "a.png/b.png", "needs a folder"),
    ("A.png", "a.png/b/c.png", "needs a folder"),
    ("b.png/a.png", "b.png", "needs a folder"),
    ("a.png", "a.png./b.png", "needs a folder"),
    ("1.png", None, "is taken by"),
]


def entries(*rows: dict[str, Any]) -> list[Attack]:
    word = rows[-1].pop("word")
    return json_attacks("entry", COMMAND, [(FILE, "", list(rows), word)])


def pair(first: str, second: str | None, word: str) -> Attack:
    rows = [{**ONE, "image_name": first}, ONE if second is None else {**ONE, "image_name": second}]
    (attack,) = json_attacks("names", COMMAND, [(FILE, "", rows, word)])
    return Attack(f"names:{first!r} {second!r}", attack.argv, word, attack.edit)


def value_attack(field: str, value: Any, word: str) -> Attack:
    (attack,) = json_attacks("entry", COMMAND, [(FILE, "", [{**ONE, field: value}], word)])
    return Attack(f"entry:{field}={value!r:.60}", attack.argv, word, attack.edit)


def special(kind: str) -> Attack:
    def edit(workspace: Path) -> None:
        path = workspace / FILE
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(FILE)
        elif kind == "broken link":
            path.symlink_to("nowhere.json")
        elif kind == "sparse":
            with open(path, "wb") as file:
                file.truncate(200 * 2**20)

    words = {"fifo": "is a pipe", "folder": "is a folder", "loop": "symbolic links", "sparse": "200 MiB"}
    return Attack(f"requests is a {kind}", COMMAND, words.get(kind, "no such file"), edit)


LINES = ["generate", "r.jsonl", *COMMAND[2:]]
ATTACKS = [
    *text_attacks("content", COMMAND, CONTENTS),
    *(value_attack(*row) for row in VALUES),
    *(pair(*row) for row in PAIRS),
    *map(special, ("fifo", "folder", "loop", "broken link", "sparse", "missing file")),
    *text_attacks(
        "lines",
        LINES,
        [
            ("r.jsonl", '["red cube"]\n["red cube"', "line 2"),
            ("r.jsonl", '["red cube"]\n\n{"labels": ["red cube"], "seed": -1}', "line 3"),
            ("r.jsonl", "\n\n", "holds no requests"),
            ("r.jsonl", '["red cube"]\n' * 250_001, "250,001 requests"),
            ("r.jsonl", '{"labels": ["red cube"], "image_name": "job.json/x.png"}', "job.json"),
        ],
    ),
    Attack("device as requests", ["generate", "/dev/zero", *COMMAND[2:]], "is a pipe or a device"),
    Attack("long path", ["generate", "x" * 300 + ".json", *COMMAND[2:]], "name of 305 bytes"),
]


@pytest.mark.parametrize("attack", ATTACKS, ids=str)
def test_requests_that_lie_are_refused(attack, refused, label_model, tmp_path):
    refused(attack, model=label_model)


ACCEPTED: dict[str, Any] = {
    "largest seed": [{**ONE, "seed": 2**63 - 1}],
    "deep folders": [{**ONE, "image_name": "a/b/c/d.png"}],
    "dots": [{**ONE, "image_name": "a..b. c.png"}],
    "names that only resemble": [
        {**ONE, "image_name": name} for name in ("job.png", "a/job.json/x.png", "shard-1-of-2/x.png", "a/strips/0.png")
    ],
    "other letters": [{**ONE, "image_name": "竜🐉é.png"}],
    "longest name": [{**ONE, "image_name": "x" * 196 + ".png"}],
    "null fields": [{**ONE, "seed": None, "prompt": None, "steps": None}],
}


@pytest.mark.parametrize("content", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_honest_requests_are_accepted(content, fork_server, label_model, tmp_path):
    (tmp_path / FILE).write_bytes(b"\xef\xbb\xbf" + json.dumps(content).encode())
    command = [*COMMAND[:3], str(label_model), *COMMAND[4:]]
    outcome = fork_server.run(command, tmp_path, {"FASTGEN_CACHE": str(tmp_path / "cache")})
    assert outcome.code == 0, outcome
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == len(content)
