"""The README's table of certificates says what the bundles' certificates say, and no other bundle's."""

from __future__ import annotations

import json
import shutil

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from benchmarks.certificates import main


def test_a_line_for_each_engine_of_each_bundle(text_bundle, label_bundle):
    done = CliRunner().invoke(main, [str(text_bundle), str(label_bundle)])
    assert done.exit_code == 0, done.output
    head, _, *lines = done.output.splitlines()
    files = [f for bundle in (text_bundle, label_bundle) for f in sorted((bundle / "certificates").iterdir())]
    assert len(lines) == len(files) >= 2
    names = [name.strip() for name in head.strip("|").split("|")]
    for file, line in zip(files, lines, strict=True):
        held = json.loads(file.read_text())
        found = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        assert found["engine"] == f"`{held['engine']}` {held['dtype']}"
        errors = {row["what"]: row["relative_l2"] for row in held["rows"] if row["what"] not in ("images", "latents")}
        assert found["networks"] == str(len(errors))
        assert errors[found["furthest off"].strip("`")] == max(errors.values())
        assert float(found["relative error"]) == pytest.approx(max(errors.values()), rel=0.06)
        assert found["PSNR of images"] == f"{held['rows'][-1]['psnr_db']:.1f} dB"
        assert found["certified"] == "yes"


def test_what_missed_is_named(label_bundle, tmp_path):
    bundle = shutil.copytree(label_bundle, tmp_path / "bundle")
    file = min((bundle / "certificates").iterdir())
    held = json.loads(file.read_text())
    held["rows"][0]["passed"] = False
    file.write_text(json.dumps(held))
    assert "no: unet |" in CliRunner().invoke(main, [str(bundle)]).output


def test_certificates_of_another_export_are_refused_with_the_command(label_bundle, tmp_path):
    bundle = shutil.copytree(label_bundle, tmp_path / "bundle")
    file = min((bundle / "certificates").iterdir())
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"bundle_sha256": "0" * 64}))
    done = CliRunner().invoke(main, [str(bundle)])
    assert done.exit_code == 1
    assert "is of another export; `fastgen export" in done.output
    shutil.rmtree(bundle / "certificates")
    assert "has no certificates" in CliRunner().invoke(main, [str(bundle)]).output
