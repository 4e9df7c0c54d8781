"""The figures of docs/reliability.md are those of the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"


def collected() -> dict[str, int]:
    """Test file -> number of tests in it, the slow ones too."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", str(HERE)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return {Path(name).name: int(count) for name, count in re.findall(r"^(\S+\.py): (\d+)$", done.stdout, re.M)}


def test_the_page_has_the_number_of_attacks_in_each_file():
    counts = collected()
    assert sum(counts.values()) >= 600
    rows = dict(re.findall(r"^\| .*\(`(test_hostile_\w+\.py)`\) \| (\d+) \|$", PAGE.read_text(), re.M))
    files = {name for name in counts if name not in ("test_hostile_page.py", "test_hostile_kills.py")}
    assert {name: int(count) for name, count in rows.items()} == {name: counts[name] for name in files}


def test_the_page_has_their_sum():
    rows = re.findall(r"^\| .*\(`test_hostile_\w+\.py`\) \| (\d+) \|$", PAGE.read_text(), re.M)
    assert f"{sum(map(int, rows)):,} tests are of this kind" in PAGE.read_text()
