"""Folders that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from killed import leftover

from fastgen.errors import FastgenError
from fastgen.files.folders import new_folder
from fastgen.files.temporary import remove_leftovers, temporary_path


def contents(folder: Path) -> dict[str, str]:
    return {f.relative_to(folder).as_posix(): f.read_text() for f in folder.rglob("*") if f.is_file()}


def test_a_folder_appears_when_the_block_ends(tmp_path):
    with new_folder(tmp_path / "far" / "x") as folder:
        (folder / "a").write_text("new")
        assert not (tmp_path / "far" / "x").exists()
    assert contents(tmp_path) == {"far/x/a": "new"}


def fail(folder: Path, error: BaseException) -> None:
    (folder / "a").write_text("half")
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FastgenError("x: cannot be written"), OSError(28, "No space")])
def test_nothing_is_left_of_a_block_that_raises(tmp_path, error):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("old")
    expected = FastgenError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught, new_folder(tmp_path / "x", existing="replace") as folder:
        fail(folder, error)
    assert contents(tmp_path) == {"x/a": "old"}
    assert [f.name for f in tmp_path.iterdir()] == ["x"]
    if expected is FastgenError:
        assert str(caught.value).startswith(("x: cannot be written", f"{tmp_path / 'x'}: cannot be written: No space"))


@pytest.mark.parametrize(("existing", "expected"), [("replace", "new"), ("keep", "old")])
def test_a_folder_that_is_there_is_replaced_or_kept(tmp_path, existing, expected):
    with new_folder(tmp_path / "x", existing=existing) as folder:
        (folder / "a").write_text("new")
        (tmp_path / "x").mkdir()  # by another process meanwhile
        (tmp_path / "x" / "a").write_text("old")
    assert contents(tmp_path) == {"x/a": expected}
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_only_an_empty_folder_gives_way_unasked(tmp_path):
    (tmp_path / "x").mkdir()
    with new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("old")
    with (
        pytest.raises(FastgenError, match=r"x: cannot be written: Directory not empty"),
        new_folder(tmp_path / "x") as f,
    ):
        (f / "a").write_text("new")
    assert contents(tmp_path) == {"x/a": "old"}


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise PermissionError(13, "Permission denied")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with (
        pytest.raises(FastgenError, match="Permission denied"),
        new_folder(tmp_path / "x", existing="replace") as folder,
    ):
        (folder / "a").write_text("new")
    assert contents(tmp_path) == {"x/a": "old"}


def test_what_a_killed_process_left_behind_is_removed(tmp_path):
    partial = leftover(tmp_path / "x") / "new"
    partial.mkdir(parents=True)
    (partial / "half").write_text("half")
    with new_folder(tmp_path / "x") as folder:
        (folder / "a").write_text("whole")
    assert contents(tmp_path) == {"x/a": "whole"}


def test_what_others_wrote_or_a_live_process_writes_is_not_removed(tmp_path):
    live, dead, elsewhere = temporary_path(tmp_path / "x"), leftover(tmp_path / "x"), leftover(tmp_path / "x")
    machine = elsewhere.name.split("fastgen-")[1][:8]
    elsewhere = elsewhere.with_name(elsewhere.name.replace(machine, "0" * 8))
    other_target = leftover(tmp_path / "y")
    foreign = [tmp_path / name for name in (".tmp-0123456789abcdef", ".x.partial", "x.tmp", ".x.fastgen-1.tmp")]
    kept = [live, elsewhere, other_target, *foreign]
    for path in (dead, *kept):
        path.write_text("half")
    linked = leftover(tmp_path / "x")
    linked.symlink_to(live)
    remove_leftovers(tmp_path, ["x"])
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (*kept, linked)}
    remove_leftovers(tmp_path)
    assert not other_target.exists()


def test_a_long_name_has_a_temporary_name_that_fits(tmp_path):
    target = tmp_path / ("é" * 120 + ".png")
    path = leftover(target)
    path.write_text("half")
    remove_leftovers(tmp_path, [target.name])
    assert not path.exists()
