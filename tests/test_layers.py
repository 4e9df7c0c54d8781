"""The order of the packages: an import never runs upwards, and no two packages of one floor import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).parents[1]
FLOORS = (  # top to bottom; on one floor a package may import those to its right
    ("cli",),
    ("sweep", "serving", "training"),
    ("export", "scoring", "cluster", "retrieval"),
    ("generate",),
    ("engines",),
    ("models",),
    ("presets", "data"),
    ("sampling", "files"),
    ("errors",),
)
ORDER = [package for floor in FLOORS for package in floor]
ROOT = {
    "__init__",
    "__main__",
}  # the names of the public API, imported when they are used; anybody may read the version


def package_of(module: str) -> str | None:
    """`fastgen.a.b` -> a; `export.x` -> export; None for fastgen itself and for other libraries."""
    parts = module.split(".")
    if parts[0] == "export":
        return "export"
    return parts[1] if parts[0] == "fastgen" and len(parts) > 1 else None


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, package) of every import: at the top, inside a function, or under TYPE_CHECKING, where a type is named."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fastgen" else [module]
        else:
            continue
        for name in names:
            package = package_of(name)
            if package is not None and not package.startswith("__"):  # from fastgen import __version__
                yield node.lineno, package


def modules() -> Iterator[tuple[str, Path]]:
    """(package, file) of the code that has a place in the order."""
    for file in sorted([*(REPO / "fastgen").rglob("*.py"), *(REPO / "export").rglob("*.py")]):
        parts = file.relative_to(REPO).with_suffix("").parts
        package = parts[0] if parts[0] == "export" else parts[1]
        if package not in ROOT:
            yield package, file


def test_the_top_of_fastgen_holds_the_packages_of_the_order_and_nothing_else():
    entries = {f.stem for f in (REPO / "fastgen").iterdir() if f.name != "__pycache__"}
    assert entries - ROOT <= set(ORDER) - {"export"}


def test_no_import_runs_upwards():
    upwards = [
        f"{file.relative_to(REPO)}:{line}: {package} imports {other}"
        for package, file in modules()
        for line, other in imports(file)
        if other not in ORDER or ORDER.index(other) < ORDER.index(package)
    ]
    assert not upwards, "\n".join(upwards)


def test_an_import_upwards_is_seen_wherever_it_stands(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nimport fastgen.cli.common as c\nfrom fastgen import sweep, __version__\n"
        "if TYPE_CHECKING:\n    from fastgen.engines.base import Engine\n\n\ndef f():\n    from export.bundle import export\n"
    )
    assert sorted(imports(file)) == [(2, "cli"), (3, "sweep"), (5, "engines"), (9, "export")]
