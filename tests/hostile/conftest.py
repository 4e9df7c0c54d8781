"""One fork server per test process, and workspaces with what an attack breaks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from attacks import Attack, ForkServer, check


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("fork_server"))
    yield server
    server.close()


@pytest.fixture
def refused(fork_server, tmp_path) -> Callable[..., None]:
    """(attack, name=folder, ...) -> copies the folders into a workspace under these names, and checks the attack there."""

    def run(attack: Attack, **folders: Path) -> None:
        workspace = tmp_path / "workspace"
        workspace.mkdir()
        for name, folder in folders.items():
            copy = shutil.copytree if folder.is_dir() else shutil.copy2
            copy(folder, workspace / name)
        check(attack, workspace, fork_server, tmp_path / "cache")

    return run
