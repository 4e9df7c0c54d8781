"""A job's folder in a bucket (S3, Google Cloud Storage, Azure), through fsspec.

An object appears whole, so there are no temporary files; folders are parts of names. fsspec reads the user's configuration:
environment variables of the provider, `FSSPEC_S3_ENDPOINT_URL` and its like, and `~/.config/fsspec`.
"""

from __future__ import annotations

import errno
import io
import queue
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from fastgen.errors import FastgenError, InputError, first_line, one_line
from fastgen.files.installing import hint
from fastgen.files.jsonfiles import MAX_BYTES, brief
from fastgen.files.names import JOB, check_image_name
from fastgen.files.outputs import Kind, software
from fastgen.files.places import EXTRAS, Url
from fastgen.files.png import METADATA_KEY, SOFTWARE_KEY, text_in
from fastgen.files.store import Folder, Store

ANSWER_S = 10  # until a bucket must have answered for the first time
HEAD = 16 * 1024  # bytes that hold the metadata of most images
AT_ONCE = 64  # files that are read at a time


class Bucket(Store):
    """A folder in a bucket. `fs`: fsspec's file system; `root`: the folder's name in it; `url`: what messages show.

    Methods raise FastgenError where the bucket refuses or does not answer; `open` and `write_new`, which begin a job,
    InputError.
    """

    writers = 8

    def __init__(self, fs: Any, root: str, url: str) -> None:
        self._fs, self._root, self._url = fs, root.rstrip("/"), url

    @classmethod
    def open(cls, url: Url, option: str = "--out") -> Bucket:
        """Connect, and check that the bucket answers within 10 s. Raises InputError for a package that is not installed, and as
        `check` does."""
        protocol = url.partition("://")[0]

        def connect() -> Bucket:
            from fsspec.core import url_to_fs

            fs, root = url_to_fs(url)
            bucket = cls(fs, root, url)
            bucket.check()
            return bucket

        try:
            return _within(ANSWER_S, connect)
        except ImportError:
            raise InputError(f"{option} {url}: a package is missing: {hint(EXTRAS.get(protocol, 's3'))}") from None
        except queue.Empty:
            help_text = "check the network, and the endpoint in your configuration"
            raise InputError(f"{option} {url}: no answer within {ANSWER_S} s; {help_text}") from None
        except FastgenError as error:
            raise InputError(f"{option} {error}") from None
        except Exception as error:  # every provider's library has classes of its own
            _refuse(url, "opened", error, InputError)

    def __str__(self) -> str:
        return self._url

    def check(self) -> None:
        bucket = self._root.partition("/")[0]
        with self._working(str(self), "read"):
            if "s3" in self._protocols:  # elsewhere, to look at a bucket itself takes a permission of its own
                try:
                    self._fs.info(bucket)
                except FileNotFoundError:
                    help_text = "create it, or choose another --out"
                    raise InputError(f"{self}: there is no bucket {bucket}; {help_text}") from None
                except PermissionError:
                    pass  # a policy may allow this folder alone
            self.exists(JOB)

    def check_name(self, name: str) -> None:
        check_image_name(name)
        if "?versionid=" in name.lower():  # which libraries take for the version of an object
            raise InputError(f"image_name: found {brief(name)}, expected a name without ?versionId=; rename it")

    def check_output(self, name: str, kind: Kind) -> None:
        if not self.exists(name):
            return
        (mark,) = self.text_chunks([name], METADATA_KEY if kind == "image" else SOFTWARE_KEY)
        if mark is None or (kind != "image" and mark != software(kind)):
            what = "a generated image" if kind == "image" else f"written by fastgen ({kind})"
            raise InputError(f"--out {self.place(name)}: exists and is not {what}; choose another name")

    def exists(self, name: str) -> bool:
        info = self._info(self._path(name))
        return info is not None and info["type"] == "file"

    def present(self, names: Sequence[str]) -> set[str]:
        there = {path[len(self._root) + 1 :] for path in self._find()}
        return there.intersection(names)

    def is_link(self, name: str) -> bool:
        return False

    def names(self, start: str) -> list[str]:
        names = (path[len(self._root) + 1 :] for path in self._find(prefix=start))
        return [name for name in names if name.startswith(start) and "/" not in name]

    def read(self, name: str, expected: str = "a file", limit: int = MAX_BYTES) -> bytes:
        with self._working(self.place(name), "read"):
            try:
                data = self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                raise InputError(f"{self.place(name)}: no such file") from None
        if len(data) > limit:
            found = f"has {len(data) / 2**20:,.0f} MiB, expected at most {limit / 2**20:,.0f} MiB"
            raise InputError(f"{self.place(name)}: {found}; split it")
        return data

    def read_all(self, names: Sequence[str]) -> Iterator[bytes]:
        for start in range(0, len(names), AT_ONCE):
            window = names[start : start + AT_ONCE]
            for name, data in zip(window, self._ranges(window, None), strict=True):
                if isinstance(data, Exception):
                    _refuse(self.place(name), "read", data, FastgenError)
                yield data

    def text_chunks(self, names: Sequence[str], key: str) -> Iterator[str | None]:
        for start in range(0, len(names), AT_ONCE):
            window = names[start : start + AT_ONCE]
            for name, head in zip(window, self._ranges(window, HEAD), strict=True):
                text = None if isinstance(head, Exception) else text_in(io.BytesIO(head), key)
                if text is None and (isinstance(head, Exception) or len(head) == HEAD):
                    text = text_in(io.BytesIO(self.read(name)), key)  # a long text, or a file that has no such range
                yield text

    def write(self, name: str, data: bytes) -> None:
        with self._working(self.place(name), "written"):
            self._fs.pipe_file(self._path(name), data)

    def write_new(self, name: str, data: bytes) -> bool:
        with self._working(self.place(name), "written", InputError):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create")
            except (PermissionError, FileNotFoundError):
                raise
            except OSError as error:  # a FileExistsError, or what else a store answers for a name that is taken
                if self.exists(name):
                    return False
                if error.errno != errno.ENOSYS:
                    raise
                self._fs.pipe_file(self._path(name), data)  # a store without conditional writes; docs/scale.md says so
        return True

    def delete(self, name: str) -> None:
        with self._working(self.place(name), "deleted"), suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def delete_empty(self, name: str) -> None:
        info = self._info(self._path(name))
        if info is not None and info["type"] == "file" and not info["size"]:
            self.delete(name)

    def clean(self, names: Collection[str], records: re.Pattern[str], *, any_machine: bool = False) -> None:
        """There is nothing to do: no file has a temporary name."""

    @property
    def _protocols(self) -> tuple[str, ...]:
        protocol = self._fs.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _info(self, path: str) -> dict[str, Any] | None:
        """What the bucket says of a path, and not an earlier listing; None where there is nothing."""
        with self._working(str(self), "read"):
            self._fs.invalidate_cache()
            try:
                return self._fs.info(path)
            except FileNotFoundError:
                return None

    def _find(self, **options: Any) -> list[str]:
        """Paths of all files below the folder: one listing, which the store sends in pages."""
        with self._working(str(self), "listed"):
            self._fs.invalidate_cache()
            try:
                paths = self._fs.find(self._root, **options)
            except FileNotFoundError:
                return []
        return [path for path in paths if path.startswith(f"{self._root}/") and not path.endswith("/")]

    def _ranges(self, names: Sequence[str], end: int | None) -> list[Any]:
        """The first `end` bytes of each file, or the exception that its reading raised."""
        with self._working(str(self), "read"):
            start = None if end is None else 0
            return self._fs.cat_ranges([*map(self._path, names)], start, end, on_error="return")

    @contextmanager
    def _working(self, place: str, done: str, kind: type[FastgenError] = FastgenError) -> Iterator[None]:
        """The exceptions of a provider's library, raised inside, as a line of this kind."""
        try:
            yield
        except FastgenError:
            raise
        except Exception as error:  # every provider's library has classes of its own
            _refuse(place, done, error, kind)


def store_of(out: Path | Url) -> Store:
    """The folder at a place. Raises InputError as `Bucket.open` does."""
    return Bucket.open(out) if isinstance(out, Url) else Folder(out)


def store_of_file(file: Path | Url) -> tuple[Store, str]:
    """A folder, and a file's name in it: of a file in a bucket the whole bucket, so that the folders above can be looked at."""
    if isinstance(file, Path):
        return Folder(file.parent), file.name
    bucket, _, name = file.partition("://")[2].partition("/")
    if not name:
        raise InputError(f"--out {file}: has no file's name, expected {file}/x.png")
    return Bucket.open(Url(f"{file.partition('://')[0]}://{bucket}")), name


def _refuse(place: str, done: str, error: Exception, kind: type[FastgenError]) -> NoReturn:
    denied = "no permission: " if isinstance(error, PermissionError) else ""
    raise kind(f"{place}: cannot be {done}: {denied}{one_line(first_line(error), 160)}") from None


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result, or what it raises; `queue.Empty` when it has not ended in time."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    Thread(target=ask, daemon=True).start()
    value, error = answers.get(timeout=seconds)
    if error is not None:
        raise error
    return value
