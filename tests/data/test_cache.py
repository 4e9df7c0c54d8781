from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastgen.data.cache import cached, read_array, write_array
from fastgen.errors import FastgenError, InputError
from fastgen.files.cachedir import cache_dir


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTGEN_CACHE", str(tmp_path / "cache"))


def fill(folder: Path) -> None:
    def values(array: np.ndarray) -> None:
        array[:] = np.arange(6).reshape(2, 3)

    write_array(folder, "a", (2, 3), "float32", values)


def test_an_entry_is_computed_once_and_mapped_read_only() -> None:
    entry = cached("kind", {"x": 1}, fill)
    assert cached("kind", {"x": 1}, lambda _: pytest.fail("computed again")) == entry
    array = read_array(entry, "a")
    assert isinstance(array, np.memmap)
    np.testing.assert_array_equal(array, np.arange(6).reshape(2, 3))
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 9


def test_other_fields_are_another_entry() -> None:
    assert len({cached("kind", {"x": 1}, fill), cached("kind", {"x": 2}, fill), cached("other", {"x": 1}, fill)}) == 3


def test_a_computation_that_fails_leaves_nothing() -> None:
    def fails(folder: Path) -> None:
        fill(folder)
        raise InputError("bad image")

    with pytest.raises(InputError, match="bad image"):
        cached("kind", {"x": 1}, fails)
    assert list((cache_dir() / "training").iterdir()) == []


def test_a_damaged_entry_says_what_to_delete() -> None:
    entry = cached("kind", {"x": 1}, fill)
    (entry / "a.npy").write_bytes((entry / "a.npy").read_bytes()[:-4])
    with pytest.raises(FastgenError, match=r"delete .* and repeat"):
        read_array(entry, "a")


def test_the_folder_belongs_to_the_user_alone(tmp_path: Path) -> None:
    assert cache_dir().stat().st_mode & 0o777 == 0o700


def test_a_cache_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.chmod(tmp_path / "cache", 0o777)
    with pytest.raises(InputError, match="chmod go-w"):
        cache_dir()


def test_without_the_variable_it_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FASTGEN_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fastgen"
