"""The command that installs missing packages. No package index has fastgen itself, so the command names the packages of an
extra, as the metadata of the installed fastgen lists them."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "fastgen-diffusion"


def hint(extra: str, note: str = "") -> str:
    """The command for the packages of an extra of pyproject.toml, such as `pip install "onnxruntime>=1.20" "openvino>=2025.0"`,
    followed by the note.

    Where the metadata does not list them (fastgen was never installed, or before it had this extra), the command that installs
    from the clone. Where a package does not exist for this platform, a sentence that says so.
    """
    from importlib.metadata import PackageNotFoundError, requires

    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        requirements = []
    packages = dict(_packages(extra, requirements))
    if not packages:
        return f'pip install ".[{extra}]" in the clone of fastgen, the folder of its pyproject.toml'
    if unfit := [name for name, fits in packages.items() if not fits]:
        return f"no wheel of {', '.join(unfit)} is made for {sys.platform} on {platform.machine()}"
    command = " ".join(["pip install", *(f'"{name}"' for name in packages)])
    return f"{command} ({note})" if note else command


def _packages(extra: str, requirements: Sequence[Requirement]) -> Iterator[tuple[str, bool]]:
    """(`torch>=2.6`, whether it is for this platform) for each package of an extra, and of the extras of fastgen it names."""
    for requirement in requirements:
        if requirement.marker is None or f'extra == "{extra}"' not in str(requirement.marker):
            continue
        if requirement.name == DISTRIBUTION:
            for other in sorted(requirement.extras):
                yield from _packages(other, requirements)
        else:
            package = str(requirement).partition(";")[0].rstrip()
            yield package, requirement.marker.evaluate({"extra": extra})


class Install:
    """A class attribute that is `hint(extra, note)`, worked out when it is read."""

    def __init__(self, extra: str, note: str = "") -> None:
        self._extra, self._note = extra, note

    def __get__(self, instance: object, owner: type | None = None) -> str:
        return hint(self._extra, self._note)
