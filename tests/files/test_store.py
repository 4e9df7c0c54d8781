"""What a job's folder does, on a disk and in buckets: one contract for all of them."""

from __future__ import annotations

import errno
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from s3_server import s3  # noqa: F401

from fastgen.errors import FastgenError, InputError
from fastgen.files.bucket import HEAD, Bucket
from fastgen.files.places import Url, is_url, parse_place, without_secrets
from fastgen.files.png import image_bytes, png_bytes
from fastgen.files.records import Record
from fastgen.files.store import Folder, Store

BLACK = np.zeros((4, 4, 3), np.uint8)
STORES = ("disk", "file", "memory", "s3")


class Point(Record, frozen=True):
    x: int


@pytest.fixture
def make(tmp_path, request):
    """A function that opens the same new, empty folder again."""
    kind = request.param
    if kind == "disk":
        return partial(Folder, tmp_path / "a" / "out")
    if kind == "file":
        return lambda: Folder(parse_place(f"file://{tmp_path}/a/out"))
    bucket = request.getfixturevalue("s3").bucket() if kind == "s3" else uuid.uuid4().hex
    return lambda: Bucket.open(parse_place(f"{kind}://{bucket}/a/out"))


each = pytest.mark.parametrize("make", STORES, indirect=True)


@each
def test_what_is_written_is_there_whole_for_everybody(make):
    store, names = make(), ["job.json", "1.png", "deep/er/2.png", "é ü [1]*#.png", "empty"]
    assert not store.exists("job.json")
    assert store.present(names) == set()
    assert store.names("job") == []
    for i, name in enumerate(names[:-1]):
        store.write(name, bytes([i]) * 3)
    store.write("empty", b"")
    store.write("1.png", b"new")
    other = make()
    assert list(other.read_all(names)) == [b"\0\0\0", b"new", b"\2\2\2", b"\3\3\3", b""]
    assert other.present([*names, "missing", "deep/3.png", "1.pn"]) == set(names)
    assert sorted(other.names("")) == sorted(n for n in names if "/" not in n)
    assert other.names("1") == ["1.png"]
    assert not other.is_link("1.png")
    assert other.read("1.png") == b"new"
    with pytest.raises(InputError, match="split it"):
        other.read("1.png", limit=2)
    with pytest.raises(InputError, match=r"missing\.json: no such file"):
        other.read("missing.json")


@each
def test_a_file_that_another_process_writes_is_seen(make):
    mine, other = make(), make()
    assert not mine.exists("shard-1-of-2.json")
    assert mine.names("shard-") == []
    other.write("shard-1-of-2.json", b"{}")
    assert mine.exists("shard-1-of-2.json")
    assert mine.names("shard-") == ["shard-1-of-2.json"]
    other.delete("shard-1-of-2.json")
    assert not mine.exists("shard-1-of-2.json")
    mine.delete("shard-1-of-2.json")
    for name, data in ((".lock", b""), ("full", b"x")):
        other.write(name, data)
        mine.delete_empty(name)
    mine.delete_empty("missing")
    assert mine.present([".lock", "full"]) == {"full"}


@each
def test_of_many_processes_one_makes_a_new_file(make):
    stores = [make() for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda i: stores[i].write_new("job.json", b"%d" % i), range(8)))
    assert sum(done) == 1
    assert make().read("job.json") == b"%d" % done.index(True)
    assert not make().write_new("job.json", b"late")


@each
def test_the_metadata_of_images_is_read_without_their_pixels(make):
    store = make()
    files = {
        "a.png": png_bytes(BLACK, {"seed": 1}),
        "long.png": png_bytes(BLACK, {"prompt": "x" * 2 * HEAD}),
        "sheet.png": image_bytes(Image.fromarray(BLACK), "fastgen job"),
        "cut.png": png_bytes(BLACK, {"prompt": "x" * 100})[:80],
        "empty.png": b"",
        "text.png": b"hello",
        "large.png": b"y" * 3 * HEAD,
    }
    for name, data in files.items():
        store.write(name, data)
    texts = list(store.text_chunks([*files], "fastgen"))
    assert texts == ['{"seed": 1}', '{"prompt": "' + "x" * 2 * HEAD + '"}', None, None, None, None, None]
    assert list(store.text_chunks(["sheet.png"], "Software")) == ["fastgen job"]
    for name, kind in (("a.png", "image"), ("sheet.png", "job"), ("free.png", "job")):
        store.check_output(name, kind)
    for name, kind in (("a.png", "job"), ("sheet.png", "image"), ("text.png", "image"), ("empty.png", "job")):
        with pytest.raises(InputError, match=rf"{name}: exists and is not .*; choose another name"):
            store.check_output(name, kind)


@each
def test_json_is_read_and_written_as_on_the_disk(make, tmp_path):
    store = make()
    store.write_json("a.json", {"x": 3})
    assert store.read_record("a.json", Point) == Point(3)
    assert store.read("a.json") == b'{\n  "x": 3\n}\n'
    assert not store.write_new_json("a.json", {})
    store.write("lines.jsonl", b'{"a": 1}\n\n[2]\n')
    assert store.read_jsonl("lines.jsonl", 100) == [(1, {"a": 1}), (3, [2])]
    for data, words in ((b'{"x": "3"}', "x: found '3'"), (b"\xff", "not UTF-8"), (b"{", "malformed JSON")):
        store.write("b.json", data)
        with pytest.raises(InputError, match=rf"a/out/b\.json: .*{words}"):
            store.read_record("b.json", Point)


@each
@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a/../x.png", "x.jpg", "a\\b.png", "a\0.png", ""])
def test_a_name_that_leaves_the_folder_is_refused(make, name):
    with pytest.raises(InputError, match="image_name"):
        make().check_name(name)


def test_the_version_of_an_object_is_no_part_of_a_name():
    with pytest.raises(InputError, match=r"without \?versionId="):
        Bucket.open(Url("memory://b/x")).check_name("a?versionId=1.png")


def test_a_neighbour_with_a_longer_name_is_not_in_the_folder(s3):  # noqa: F811
    bucket = s3.bucket()
    for key in ("out2/1.png", "out", "out/", "other/1.png"):
        s3.client.put_object(Bucket=bucket, Key=key, Body=b"x")
    store = Bucket.open(Url(f"s3://{bucket}/out"))
    assert store.present(["1.png", "2/1.png", ""]) == set()
    assert store.names("") == []


class Old:
    """A store that does not know conditional writes, and one that answers them in its own way."""

    protocol = "old"

    def __init__(self, code: int) -> None:
        self.files: dict[str, bytes] = {}
        self._code = code

    def invalidate_cache(self) -> None:
        pass

    def info(self, path: str) -> dict[str, str]:
        if path not in self.files:
            raise FileNotFoundError(path)
        return {"type": "file"}

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and (self._code == errno.ENOSYS or path in self.files):
            raise OSError(self._code, "not so")
        self.files[path] = data


def test_a_store_without_conditional_writes_still_refuses_a_name_that_is_taken():
    store: Store = Bucket(Old(errno.ENOSYS), "b/x", "old://b/x")
    assert store.write_new("job.json", b"1")
    assert not store.write_new("job.json", b"2")
    store = Bucket(Old(errno.EINVAL), "b/x", "old://b/x")
    assert store.write_new("job.json", b"1")
    assert not store.write_new("job.json", b"2")


def test_a_bucket_that_refuses_says_so_in_one_line(s3):  # noqa: F811
    bucket = s3.bucket()
    store = Bucket.open(Url(f"s3://{bucket}/out"))
    store.write("1.png", b"x")
    s3.deny(bucket, "PutObject", "GetObject")
    refused = "cannot be {}: no permission: "
    with pytest.raises(InputError, match=f"s3://{bucket}/out/job.json: {refused.format('written')}"):
        store.write_new("job.json", b"x")
    with pytest.raises(FastgenError, match=f"s3://{bucket}/out/2.png: {refused.format('written')}") as caught:
        store.write("2.png", b"x")
    assert caught.value.exit_code == 1
    with pytest.raises(FastgenError, match=f"s3://{bucket}/out/1.png: {refused.format('read')}"):
        list(store.read_all(["1.png"]))
    with pytest.raises(FastgenError, match=f"s3://{bucket}/out/1.png: {refused.format('read')}"):
        list(store.text_chunks(["1.png"], "fastgen"))


def test_a_place_is_a_path_or_the_url_of_a_bucket():
    assert parse_place("out/x") == Path("out/x")
    assert parse_place("file:///tmp/x/") == Path("/tmp/x")
    assert parse_place("s3://bucket/a b/é#[1]*/") == "s3://bucket/a b/é#[1]*"
    assert isinstance(parse_place("gs://bucket"), Url)
    assert [*map(is_url, ("s3://b", "a://", "C://x", "s3:/b", "out/s3://b"))] == [True, False, False, False, False]
    assert without_secrets("sftp://me:secret@host/x?token=1") == "sftp://me:***@host/x?..."
    assert without_secrets("abfs://box@account/x") == "abfs://box@account/x" == parse_place("abfs://box@account/x")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nope://b/x", "found the protocol 'nope', expected one of s3, "),
        ("https://example.org/x", "found the protocol 'https'"),
        ("sftp://me:secret@host/x", r"--out sftp://me:\*\*\*@host/x: found the protocol 'sftp'"),
        ("S3://b/x", "found the protocol 'S3'"),
        ("s3://", "expected s3://BUCKET/FOLDER"),
        ("s3:///x", "without empty parts"),
        ("s3://b//x", "without empty parts"),
        ("s3://b/../x", r"without empty parts, \. and \.\."),
        ("s3://b/x?token=1", r"--out s3://b/x\?\.\.\.: expected s3://BUCKET/FOLDER, without \?"),
        ("s3://key:secret@b/x", r"--out s3://key:\*\*\*@b/x: found a password"),
        ("s3://b/x\\y", r"without \?"),
        ("zip://x::s3://b/x", "found the protocol 'zip'"),
        ("s3://b/x::y", r"without \?"),
        ("s3://b/\nx", "control characters"),
        ("file://", "has no path"),
    ],
)
def test_another_url_is_refused(url, words):
    with pytest.raises(InputError, match=words):
        parse_place(url)
