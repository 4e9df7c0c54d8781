"""What a process that was killed leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = (
    "import sys, pathlib; from fastgen.files import temporary as t; print(t.temporary_path(pathlib.Path(sys.argv[1])))"
)


def leftover(target: Path) -> Path:
    """The name of a temporary file or folder for `target`, of a process that has ended."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(target)], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip())
