"""What fastgen.generate.requests promises about the user's request files, good and bad."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from fastgen.errors import FastgenError, InputError
from fastgen.files.jsonfiles import read_json, read_jsonl, write_bytes, write_json
from fastgen.files.names import ICLEVR_OBJECTS, check_image_name, safe_path
from fastgen.generate.requests import Request, multi_hot, read_requests, resolve_seed

REAL = Path(__file__).parents[3] / "shared" / "data"
real_files = pytest.mark.skipif(not REAL.is_dir(), reason="the tasks' own files are not here")
fuzz = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=[]))
names = st.sampled_from(["a.png", "A.PNG", "A.png", "b/a.png", "a.png/b.png", "../a.png", "/a.png", "", ".", "a\0.png"])
fields = st.sampled_from(
    ["prompt", "labels", "seed", "image_name", "text_prompt", "given_description", "action_description", "id"]
)
likely = scalars | names | st.lists(st.sampled_from([*ICLEVR_OBJECTS, "red cubes", ""]), max_size=3)
entries = st.dictionaries(fields, likely, max_size=5) | st.lists(likely, max_size=3) | likely
plausible = st.lists(
    st.fixed_dictionaries(
        {"prompt": st.sampled_from(["a", "b c", "é"]) | scalars},
        optional={"image_name": names | scalars, "seed": st.integers(0, 2**63 - 1) | scalars},
    )
    | st.lists(st.sampled_from([*ICLEVR_OBJECTS, "red cubes"]), min_size=1, max_size=2),
    max_size=3,
)
json_values = plausible | st.recursive(
    entries, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)
alphabet = st.sampled_from([*"./\\:~ ab\0\n\x7f\ud800é", "..", "/", ".png", "C:", "//"])
nasty_names = st.lists(alphabet, max_size=8).map("".join) | st.text().map(lambda text: text + ".png")


def write(folder: Path, content: Any, name: str = "requests.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def read_or_refuse(path: Path) -> list[Request] | None:
    try:
        return read_requests(path)
    except InputError as error:
        if path.name not in str(error) or len(str(error)) > 2500:
            pytest.fail(f"an error that does not help: {error}")
        return None


def error_of(path: Path, **kwargs: Any) -> str:
    with pytest.raises(InputError) as caught:
        read_requests(path, **kwargs)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert path.name in message
    assert "\n" not in message
    assert len(message) < 1000
    return message


def test_the_monsters_schema_gives_key_name_text_prompt_and_description_and_ignores_other_keys(tmp_path):
    content = {
        "0_main": {
            "image_name": "0_main.png",
            "given_description": "x",
            "action_description": "",
            "text_prompt": "A b.",
        },
        "0_die1": {"image_name": "0_die1.png", "given_description": "A c.", "action_description": "It dies.", "x": [1]},
        "0_jump": {"image_name": "sub/0.png", "given_description": "A d.", "action_description": "", "seed": 0},
    }
    assert read_requests(write(tmp_path, content)) == [
        Request("0_main", "0_main.png", prompt="A b.", description="x"),
        Request("0_die1", "0_die1.png", prompt="A c. It dies.", description="A c."),
        Request("0_jump", "sub/0.png", prompt="A d.", seed=0, description="A d."),
    ]


def test_lists_of_labels_are_named_by_their_position(tmp_path):
    requests = read_requests(write(tmp_path, [["gray cube"], ["red cube", "blue sphere"]]))
    assert requests == [
        Request("0", "0.png", labels=("gray cube",)),
        Request("1", "1.png", labels=("red cube", "blue sphere")),
    ]
    assert [request.kind for request in requests] == ["labels", "labels"]


def test_list_dict_and_jsonl_of_prompts_read_alike(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "image_name": "x/y.png", "seed": 2**63 - 1}, {"prompt": "é", "seed": None}]
    lines = "\ufeff" + "\r\n\n".join(json.dumps(row) for row in rows) + "\n"
    expected = [Request("0", "0.png", "a"), Request("1", "x/y.png", "b", seed=2**63 - 1), Request("2", "2.png", "é")]
    assert read_requests(write(tmp_path, rows)) == expected
    assert read_requests(write(tmp_path, lines, "requests.jsonl")) == expected
    keyed = read_requests(write(tmp_path, dict(zip("abc", rows, strict=True))))
    assert [dataclasses.replace(request, id=str(i)) for i, request in enumerate(keyed)] == expected
    assert [request.id for request in keyed] == ["a", "b", "c"]


def test_objects_come_from_the_argument_then_the_file_beside_then_iclevr(tmp_path):
    path = write(tmp_path, [["gold bar"]])
    assert "'gold bar'" in error_of(path)
    write(tmp_path, {"gold bar": 0}, "objects.json")
    assert len(read_requests(path)) == 1
    assert "did you mean" not in error_of(path, objects={"cat": 0})


@fuzz
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1),
            st.none() | st.integers(0, 2**63 - 1),
        ),
        min_size=1,
        max_size=5,
    ).filter(lambda rows: all(prompt.strip() for prompt, _ in rows))
)
def test_requests_written_as_json_read_back_equal(tmp_path, rows):
    requests = [Request(str(i), f"d/{i}.png", prompt, seed=seed) for i, (prompt, seed) in enumerate(rows)]
    write_json(tmp_path / "r.json", [dataclasses.asdict(request) for request in requests])
    assert read_requests(tmp_path / "r.json") == requests


@fuzz
@given(json_values, st.booleans())
def test_any_json_gives_requests_or_an_input_error(tmp_path, value, as_lines):
    lines = value if as_lines and isinstance(value, list) else [value]
    path = tmp_path / ("r.jsonl" if as_lines else "r.json")
    path.write_text("\n".join(map(json.dumps, lines)) if as_lines else json.dumps(value))
    requests = read_or_refuse(path)
    if requests is None:
        return
    assert requests
    assert all(isinstance(request, Request) for request in requests)
    assert len({request.kind for request in requests}) == 1
    assert len({request.image_name.casefold() for request in requests}) == len(requests)
    assert all(isinstance(resolve_seed(request, 0), int) for request in requests)


@fuzz
@given(st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()[:-1]))
@example(b"\xef\xbb\xbf")
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b"[" + b"9" * 5000 + b"]")
@example(b'[{"prompt": "a\\u0000b", "image_name": "a\\u0000.png"}]')
def test_any_bytes_give_requests_or_an_input_error(tmp_path, data):
    for name in ("r.json", "r.jsonl"):
        (tmp_path / name).write_bytes(data)
        assert read_or_refuse(tmp_path / name) != []


@fuzz
@given(nasty_names)
@example("../x.png")
@example("a/../../x.png")
@example("a/..")
@example("C:/x.png")
def test_an_accepted_image_name_stays_below_the_output_folder(tmp_path, name):
    try:
        path = safe_path(tmp_path / "out", name)
    except InputError:
        return
    assert path == tmp_path / "out" / name
    assert path.resolve().is_relative_to((tmp_path / "out").resolve())
    assert path.name.endswith(".png")
    assert not any(unicodedata.category(character) in ("Cc", "Cs") for character in name)


@pytest.mark.parametrize(
    "name",
    [
        *("../x.png", "/x.png", "a/../x.png", "a//x.png", "./x.png", "a/", "", ".", "..", " ", "x", "x.jpg", ".png"),
        *("x\0.png", "x\n.png", "C:x.png", "C:\\x.png", "..\\x.png", "\ud800.png", "x" * 300 + ".png", "a/.png"),
        *("d/" * 600 + "x.png", "contact_sheet.png", 5, None, True, ["x.png"]),
    ],
)  # fmt: skip
def test_a_bad_image_name_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="image_name"):
        check_image_name(name)
    place = "line 1" if name == "x\0.png" else "entry [1]"  # NUL is refused when the file is read
    assert place in error_of(write(tmp_path, [{"prompt": "a"}, {"prompt": "b", "image_name": name}]))


def test_a_symlink_below_the_output_folder_is_refused_and_the_folder_itself_may_be_one(tmp_path):
    elsewhere, real = tmp_path / "elsewhere", tmp_path / "real"
    elsewhere.mkdir()
    real.mkdir()
    out = tmp_path / "out"
    out.symlink_to(real)
    assert safe_path(out, "a/x.png") == out / "a" / "x.png"
    (real / "a").symlink_to(elsewhere)
    (real / "link.png").symlink_to(elsewhere / "x.png")
    (real / "file").touch()
    (real / "folder.png").mkdir()
    for name in ("a/x.png", "link.png", "file/x.png", "folder.png"):
        with pytest.raises(InputError, match="image_name"):
            safe_path(out, name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[]", "no requests"),
        ("{}", "no requests"),
        ("3", "found 3"),
        ('[\n  {"prompt" "a"}\n]', "line 2, column 13: malformed JSON"),
        ('{"prompt": "a"}\n{"prompt": "b"}', "line 2, column 1: malformed JSON: Extra data; is it JSONL"),
        ('{"a": {"prompt": "x"},\n "a": {"prompt": "y"}}', "line 2, column 2: key 'a' occurs twice"),
        ('[{"prompt": "{x", "seed": 1,\n "seed": 2}]', "line 2, column 2: key 'seed' occurs twice"),
        ('[{"prompt": "NaN", "seed": NaN}]', "line 1, column 28: found NaN"),
        ("[-Infinity]", "line 1, column 2: found -Infinity"),
        ("[\n" + "1" * 5000 + "]", "line 2, column 1: found an integer of 5000 digits"),
        ("[" * 100_000, "nested too deeply"),
        ([{"prompt": ""}], "entry [0]: prompt: is empty"),
        ([{"prompt": " \n"}], "entry [0]: prompt: is empty"),
        ([{"prompt": "\ud800"}], "entry [0]: prompt: lone surrogate '\\ud800'"),
        ([{"prompt": 5}], "entry [0]: prompt: found 5, expected text"),
        ([{"labels": ["red cube"], "class": "red cube"}], "entry [0]: found labels and class; give one"),
        ([{"class": "a", "class_id": 3}], "entry [0]: found class and class_id; give one"),
        ([{"class": True}], "entry [0]: class: found True, expected a class's name or number"),
        ([{"class": ["red cube"]}], "entry [0]: class: found ['red cube'], expected a class's name or number"),
        ([{"class": " "}], "entry [0]: labels: is empty"),
        ([{"prompt": None}, {"prompt": "a"}], "entry [1]: asks by text, but"),
        ([{"prompt": "a", "text_prompt": "b"}], "both text_prompt and prompt"),
        ({"k": {"image_name": "k.png", "text_prompt": ""}}, "key 'k': text_prompt: is empty"),
        ({"k": {"image_name": "k.png", "text_prompt": None}}, "key 'k': text_prompt: found None"),
        ({"k": {"given_description": ["a", "b"]}}, "key 'k': given_description"),
        ({"k": {"given_description": "", "action_description": ""}}, "key 'k': prompt: is empty"),
        ({"prompt": "a"}, "key 'prompt': found 'a'"),
        ({"\ud800": {"prompt": "a"}}, "lone surrogate"),
        ([{"prompt": "a"}, ["red cube"]], "entry [1]: asks by labels"),
        ([["red cube"], []], "entry [1]: labels: found []"),
        ([["red cube", "red cube"]], "entry [0]: labels: 'red cube' occurs twice"),
        ([["red cube", 3]], "entry [0]: labels: found 3"),
        ([{"labels": "red cube"}], "entry [0]: labels: found 'red cube'"),
        (["red cube"], "entry [0]: found 'red cube'"),
        ([["red cube"], ["red cubes"]], "entry [1]: unknown label 'red cubes'; did you mean 'red cube'?"),
        ([{"prompt": "a", "image_name": "x.png"}, {"prompt": "b", "image_name": "X.png"}], "taken by"),
        ([{"prompt": "a", "image_name": "e\u0301.png"}, {"prompt": "b", "image_name": "\xe9.png"}], "taken by"),
        ([{"prompt": "a"}, {"prompt": "b", "image_name": "0.png"}], "entry [1]: image_name '0.png' is taken by"),
        ([{"prompt": "a", "image_name": "x.png/y.png"}, {"prompt": "b", "image_name": "X.png"}], "needs a folder"),
        *(([{"prompt": "a", "seed": seed}], "seed: found") for seed in (-1, 2**63, True, 1.0, "1", 1e300)),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_line_that_names_place_and_problem(tmp_path, content, message):
    assert message in error_of(write(tmp_path, content))


def test_a_bad_jsonl_line_is_named(tmp_path):
    good = '{"prompt": "a"}\n\n'
    assert "line 3, column 12: malformed" in error_of(write(tmp_path, good + '{"prompt": }', "r.jsonl"))
    assert "line 3: prompt: is empty" in error_of(write(tmp_path, good + '{"prompt": ""}', "r.jsonl"))
    assert "line 3, column 2: found NaN" in error_of(write(tmp_path, good + "[NaN]", "r.jsonl"))
    assert "no requests" in error_of(write(tmp_path, "\n", "r.jsonl"))


def test_a_missing_file_a_folder_and_foreign_encodings_are_named(tmp_path):
    assert "no such file" in error_of(tmp_path / "nothing.json")
    assert "is a folder" in error_of(tmp_path)
    path = tmp_path / "r.json"
    path.write_bytes(b'[\n{"prompt": "\xff"}]')
    assert "line 2, column 13: not UTF-8 (found byte 0xff)" in error_of(path)
    path.write_text('[{"prompt": "a"}]', encoding="utf-16")
    assert "UTF-16" in error_of(path)
    path.write_text('[{"prompt": "a"}]', encoding="utf-8-sig")
    assert read_requests(path)[0].prompt == "a"


def test_giant_values_are_abbreviated_in_messages(tmp_path):
    giant = "x" * 1_000_000
    for content in ([{"prompt": [giant]}], [giant], [[giant]], [{"prompt": "a", "image_name": giant}], {giant: 1}):
        error_of(write(tmp_path, content))


@pytest.mark.parametrize(
    ("objects", "message"),
    [([], "found []"), ({}, "found {}"), ({"a": 1}, "index 1"), ({"a": 0, "b": 0}, "'a'"), ({"a": True}, "True")],
)
def test_objects_that_are_no_numbering_are_refused(tmp_path, objects, message):
    write(tmp_path, objects, "objects.json")
    with pytest.raises(InputError, match=r"objects\.json") as caught:
        read_requests(write(tmp_path, [["a"]]))
    assert message in str(caught.value)


def test_resolve_seed_is_the_documented_hash_and_a_seed_of_zero_is_a_seed():
    # printf '0:0_main.png' | sha256sum, the last 16 hex digits without their top bit; likewise 42:sub/1.png
    assert resolve_seed(Request("a", "0_main.png", "x"), 0) == 4114948822911459052
    assert resolve_seed(Request("a", "sub/1.png", "x"), 42) == 692099117435464079
    assert resolve_seed(Request("a", "0_main.png", "x", seed=0), 42) == 0


def test_multi_hot_has_a_one_for_every_label_and_nothing_else():
    requests = [
        Request("0", "0.png", labels=("gray cube",)),
        Request("1", "1.png", labels=("yellow cylinder", "red cube")),
    ]
    rows = multi_hot(requests, ICLEVR_OBJECTS)
    assert (rows.dtype, rows.shape) == (np.float32, (2, 24))
    assert np.argwhere(rows == 1).tolist() == [[0, 0], [1, 1], [1, 23]]
    assert rows.sum() == 3
    with pytest.raises(InputError, match="prompt"):
        multi_hot([Request("0", "0.png", prompt="a")], ICLEVR_OBJECTS)
    with pytest.raises(InputError, match="unknown label"):
        multi_hot(requests, {"red cube": 0})


def test_a_json_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"é": "\ud800", "n": [1.5, None]})
    assert read_json(path) == {"é": "\ud800", "n": [1.5, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "folder", tmp_path / "missing" / "a.json"):
        with pytest.raises(FastgenError, match="cannot be written") as caught:
            write_bytes(target, b"x")
        assert caught.value.exit_code == 1
    assert sorted(child.name for child in tmp_path.iterdir()) == ["a.json", "folder"]
    assert read_json(path)["n"] == [1.5, None]


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    path = write(tmp_path, '"a\u2028b"\n\n"c"', "r.jsonl")
    assert read_jsonl(path) == [(1, "a\u2028b"), (3, "c")]


@real_files
def test_the_real_monsters_file_has_1063_requests():
    path = REAL / "monsters" / "test.json"
    requests = read_requests(path)
    raw = json.loads(path.read_text())
    assert len(requests) == 1063
    assert all(request.prompt == raw[request.id]["text_prompt"] for request in requests)
    assert len({resolve_seed(request, 0) for request in requests}) == 1063


@real_files
def test_the_real_monsters_prompt_is_description_and_action(tmp_path):
    raw = json.loads((REAL / "monsters" / "test.json").read_text())
    without = {key: {k: v for k, v in entry.items() if k != "text_prompt"} for key, entry in raw.items()}
    assert read_requests(write(tmp_path, without)) == read_requests(REAL / "monsters" / "test.json")


@real_files
@pytest.mark.parametrize(("name", "count"), [("test.json", 72), ("new_test.json", 84)])
def test_the_real_iclevr_files_have_32_requests(name, count):
    requests = read_requests(REAL / "iclevr" / name)
    objects = json.loads((REAL / "iclevr" / "objects.json").read_text())
    assert objects == ICLEVR_OBJECTS
    assert list(objects) == list(ICLEVR_OBJECTS)
    assert [request.image_name for request in requests] == [f"{i}.png" for i in range(32)]
    assert multi_hot(requests, objects).sum() == count
