from __future__ import annotations

from pathlib import Path

import pytest
import torch
from killed import leftover

from fastgen.errors import FastgenError
from fastgen.models import checkpoints


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3, 2), value)}, "ema": {"w": torch.full((3, 2), value / 2)}}


def save(folder: Path, *steps: int, limit: int = 5) -> None:
    for step in steps:
        checkpoints.save(folder, step, parts(step), {"job": "a"}, limit)


def fail(message: str) -> None:
    raise AssertionError(message)


def test_what_was_saved_is_what_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 10, 20)
    found = checkpoints.latest(tmp_path, fail)
    assert found is not None
    assert (found.step, found.extra) == (20, {"job": "a"})
    assert torch.equal(found.load("model")["w"], torch.full((3, 2), 20.0))
    assert torch.equal(found.load("ema")["w"], torch.full((3, 2), 10.0))


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoints.latest(tmp_path / "missing", fail) is None


def test_only_the_newest_are_kept_and_newest_is_by_number(tmp_path: Path) -> None:
    save(tmp_path, 5, 999_999, 1_000_000, limit=2)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-1000000", "step-999999"]
    found = checkpoints.latest(tmp_path, fail)
    assert found is not None
    assert found.step == 1_000_000


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "state", "foreign"])
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10, 20)
    weights, state = tmp_path / "step-000020" / "ema.safetensors", tmp_path / "step-000020" / "state.json"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-4])
    elif damage == "delete":
        weights.unlink()
    else:
        state.write_text("{" if damage == "state" else "[1]")
    warnings: list[str] = []
    found = checkpoints.latest(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 10
    assert len(warnings) == 1
    assert str(tmp_path / "step-000020") in warnings[0]
    assert "\n" not in warnings[0]


def test_a_half_written_checkpoint_is_swept_away(tmp_path: Path) -> None:
    save(tmp_path, 10)
    partial = leftover(tmp_path / "step-000020")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    found = checkpoints.latest(tmp_path, fail)
    assert found is not None
    assert found.step == 10
    assert [f.name for f in tmp_path.iterdir()] == ["step-000010"]


def test_a_step_can_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 10)
    checkpoints.save(tmp_path, 10, parts(7), {"job": "b"}, 2)
    found = checkpoints.latest(tmp_path, fail)
    assert found is not None
    assert found.extra == {"job": "b"}
    assert torch.equal(found.load("model")["w"], torch.full((3, 2), 7.0))


def test_a_failed_write_leaves_the_older_ones_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(FastgenError, match=r"step-000020.*No space left"):
        save(tmp_path, 20, limit=1)
    assert [f.name for f in tmp_path.iterdir()] == ["step-000010"]


def test_a_deletion_that_is_killed_leaves_no_half_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(folder: Path, **options: object) -> None:
        for file in sorted(Path(folder).rglob("*.json")):
            file.unlink()
        raise KeyboardInterrupt

    save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.keep_newest(tmp_path, 1)
    assert [folder.name for folder in tmp_path.glob("step-*")] == ["step-000002"]
