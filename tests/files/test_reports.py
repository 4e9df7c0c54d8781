"""What a killed process left of a single file is removed when the file is written again."""

from __future__ import annotations

import pytest
from killed import leftover

from fastgen.files.outputs import write_report
from fastgen.files.temporary import temporary_path


@pytest.fixture
def left_beside():
    """(file) -> (a temporary file of a killed process for it, files that stay: another file's, one that is being written)."""

    def build(file):
        left, stays = leftover(file), [leftover(file.with_name("other.json")), temporary_path(file)]
        for path in (left, *stays):
            path.write_text("x")
        return left, stays

    return build


def test_a_report(tmp_path, left_beside):
    file = tmp_path / "report.json"
    left, stays = left_beside(file)
    write_report(file, "score", {"metrics": {}})
    assert sorted(tmp_path.iterdir()) == sorted([file, *stays])
    assert not left.exists()


def test_a_single_image(fastgen, label_bundle, tmp_path, left_beside):
    file = tmp_path / "x.png"
    left, stays = left_beside(file)
    words = ["generate", "--labels", "red cube", "--model", label_bundle, "--engine", "ort", "--out", file]
    code, _, err = fastgen(*words, "--num-inference-steps", "2")
    assert code == 0, err
    assert sorted(tmp_path.iterdir()) == sorted([file, *stays])
    assert not left.exists()
