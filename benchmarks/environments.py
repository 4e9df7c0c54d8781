"""Virtual environments of the peers that cannot live beside this package's own: `python -m benchmarks.environments`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from fastgen.files.cachedir import cache_dir

PEERS = {
    "optimum-onnx": ["optimum-onnx[onnxruntime]==0.1.0", "transformers==4.57.*", "diffusers==0.35.*", "accelerate"],
    "optimum-intel": ["optimum-intel[openvino]", "diffusers>=0.36,<0.40", "accelerate"],
}
CPU_TORCH = "torch==2.13.0"  # where no NVIDIA GPU is found, as bin/setup does


def folder(name: str) -> Path:
    return cache_dir() / "environments" / name


def interpreter(name: str) -> Path | None:
    """The environment's python, or None where it has not been made."""
    return _python(name) if (folder(name) / "installed").is_file() else None


def _python(name: str) -> Path:
    return folder(name) / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def make(name: str) -> Path:
    """The environment's python, after installing what is missing. torch goes first, so that nothing else chooses its build."""
    if found := interpreter(name):
        return found
    shutil.rmtree(folder(name), ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder(name))], check=True)
    torch = "torch" if _has_gpu() else CPU_TORCH
    constraints = folder(name) / "constraints.txt"
    constraints.write_text("" if _has_gpu() else CPU_TORCH + "\n")
    python = _python(name)
    for packages in (["--upgrade", "pip"], [torch], PEERS[name]):
        subprocess.run([str(python), "-m", "pip", "install", "-q", "-c", str(constraints), *packages], check=True)
    if not _has_gpu():  # comes along, and cannot be imported beside the CPU build of torch
        subprocess.run([str(python), "-m", "pip", "uninstall", "-q", "-y", "torchvision"], check=True)
    (folder(name) / "installed").write_text("\n".join([torch, *PEERS[name]]) + "\n")
    return python


def _has_gpu() -> bool:
    try:
        return subprocess.run(["nvidia-smi"], capture_output=True).returncode == 0
    except OSError:
        return False


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(PEERS)))
def main(names: Sequence[str]) -> None:
    """Make the environments of the NAMES, all by default, in fastgen's cache: about 3 GB each, a few minutes. A peer that
    cannot be installed is reported and left out; the others' measurements go on without it."""
    failed = []
    for name in names or PEERS:
        try:
            click.echo(f"{name}: {make(name)}")
        except subprocess.CalledProcessError as error:
            failed.append(name)
            click.echo(f"{name}: failed: {' '.join(map(str, error.cmd))}", err=True)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
