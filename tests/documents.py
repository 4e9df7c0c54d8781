"""The commands that README.md and docs/*.md show, and whether the command line takes them as they are written."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import dropwhile, takewhile
from pathlib import Path

import click

from fastgen.cli.commands import cli

REPO = Path(__file__).parents[1]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{file.name}" for file in (REPO / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(fastgen|pip|accelerate|torchrun|ray|bin/[\w-]+|python -m [\w.]+)( |$)")


RELEASING = ("build", "twine", "venv")


@dataclass(frozen=True)
class Step:
    """Something that a document tells the reader to run."""

    document: str
    text: str  # a command on one line without comments, or a Python block
    python: bool = False

    def __str__(self) -> str:
        return f"{self.document}: {self.text.strip().splitlines()[0]}"

    @property
    def words(self) -> list[str]:
        """Of the command, without the assignments before it."""
        words = shlex.split(self.text)
        return words[len(self.environment) :]

    @property
    def environment(self) -> dict[str, str]:
        """The assignments before the command."""
        assigned = takewhile(lambda word: re.match(r"[A-Z_]+=", word), shlex.split(self.text))
        return dict(word.split("=", 1) for word in assigned)


def steps(document: str) -> list[Step]:
    """The commands of a document's ```bash blocks and its ```python blocks, in order."""
    found: list[Step] = []
    for language, text in FENCE.findall((REPO / document).read_text(encoding="utf-8")):
        if language == "python":
            found.append(Step(document, text, python=True))
        elif language == "bash":
            lines = (_command(line) for line in text.replace("\\\n", " ").splitlines())
            found += [Step(document, line) for line in lines if line]
    return found


def _command(line: str) -> str:
    """A line without its comment, and without what sends a command into the background."""
    words = takewhile(lambda word: word[0] not in "&>", shlex.split(line, comments=True))
    return shlex.join(dropwhile(lambda word: word in ("nohup", "nice"), words))


def inline(document: str) -> Iterator[str]:
    """The `code spans` of a document that are commands."""
    text = FENCE.sub("", (REPO / document).read_text(encoding="utf-8"))
    for span in re.findall(r"`([^`]+)`", text):
        if COMMAND.match(command := " ".join(span.split())):
            yield command


def links(document: str) -> list[str]:
    """The places in the repository that a document links to, or shows as pictures, relative to it."""
    text = FENCE.sub("", (REPO / document).read_text(encoding="utf-8"))
    targets = (target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)", text))
    return [target for target in targets if target and "://" not in target]


def named(document: str) -> Iterator[tuple[str, Path]]:
    """(name, module) of every link such as [`Run.begin`](../fastgen/generate/run.py), to what a module defines."""
    text = (REPO / document).read_text(encoding="utf-8")
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)\s]+\.py)\)", text):
        yield name, (REPO / document).parent / target


def definitions(module: Path) -> set[str]:
    """The classes, functions and variables of a module, and the members of its classes as `Class.member`."""
    names: set[str] = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        names |= set(_defined(node))
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for member in node.body for name in _defined(member)}
    return names


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def unmarked(document: str) -> Iterator[str]:
    """Commands in blocks that are not marked as bash, where nothing would run them."""
    for language, text in FENCE.findall((REPO / document).read_text(encoding="utf-8")):
        if language not in ("bash", "python"):
            yield from (line for line in text.splitlines() if re.match(r"(fastgen|pip|python) ", line))
            yield from (line for line in text.splitlines() if re.match(r"bin/[\w-]+ +#", line))


def check_words(words: Sequence[str], incomplete: bool = False) -> None:
    """Raise click.UsageError unless the program that is named first takes these arguments; nothing runs.

    `incomplete`: required arguments may be missing, as in a command that is only mentioned.
    """
    program, *arguments = words
    program = program.removeprefix("CLEAN/bin/")  # of the environment in which docs/releasing.md tests a wheel
    if words[:3] == ["python", "-m", "pip"]:
        program, *arguments = words[2:]
    if program in ("accelerate", "torchrun"):
        program, arguments = "fastgen", arguments[arguments.index("fastgen") + 1 :]
    if program == "python" and arguments[:2] == ["-m", "fastgen"]:
        program, arguments = "fastgen", arguments[2:]
    if program == "fastgen":
        _check_click(cli, arguments, incomplete)
    elif program == "python" and arguments[:1] == ["-m"] and arguments[1].startswith("benchmarks."):
        _check_click(importlib.import_module(arguments[1]).main, arguments[2:], incomplete)
    elif program == "pip" and arguments[:1] == ["install"]:
        _check_extras(arguments[1:])
    elif program == "ray":
        from ray.scripts.scripts import cli as ray

        _check_click(ray, arguments, incomplete)
    elif program == "git" or (program == "python" and arguments[:1] == ["-m"] and arguments[1] in RELEASING):
        pass  # programs of others, which a release needs
    elif program.startswith("bin/"):
        _check_script(REPO / program, arguments)
    else:
        raise click.UsageError(f"{program!r} is no program that the documents' tests know")


def _check_click(command: click.Command, arguments: Sequence[str], incomplete: bool) -> None:
    rest = list(arguments)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            raise click.UsageError(f"no such command: {rest[0]}")
        command = command.commands[rest.pop(0)]
    try:
        command.make_context(str(command.name), rest)
    except click.exceptions.Exit:  # of --help
        pass
    except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
        if not incomplete:
            raise


def _check_extras(packages: Sequence[str]) -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    for package in packages:
        name, _, extras = package.rstrip("]").partition("[")
        if name == project["name"]:
            raise click.UsageError(f"{package}: no package index has fastgen; `pip install .` installs the clone")
        for extra in filter(None, extras.split(",")):
            if name == "." and extra not in project["optional-dependencies"]:
                raise click.UsageError(f"{package}: there is no extra {extra!r}")


def _check_script(file: Path, arguments: Sequence[str]) -> None:
    if not os.access(file, os.X_OK):
        raise click.UsageError(f"{file.name} is not an executable file in bin/")
    text = file.read_text()
    for word in arguments:
        if word not in text and "pytest" not in text:
            raise click.UsageError(f"bin/{file.name} does not know {word}")
