"""Runs `fastgen` commands, each in a fork of one process that has imported fastgen, torch, diffusers and the engines.

A command then takes a tenth of a second, and what it breaks, it breaks alone. Nothing is computed before the fork: OpenMP's
threads do not survive one.

Protocol: a line of JSON in, {"argv", "cwd", "env", "stdout", "stderr", "seconds"}; a line of JSON out, {"code", "seconds"}. The
code is None where the command took longer than `seconds` and was killed.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

import export
import fastgen

HEAVY = (
    "torch",
    "torch._subclasses.fake_tensor",
    "diffusers",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.unets.unet_2d_condition",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "transformers",
    "transformers.models.clip.modeling_clip",
    "tokenizers",
    "onnxruntime",
    "openvino",
    "PIL.Image",
    "safetensors.torch",
    "encodings.utf_8_sig",
)
MEMORY = 6 * 2**30  # bytes of address space that a command may take beyond what the imports took


def main() -> None:
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    for package in (
        fastgen,
        export,
    ):  # all of their modules: a command would spend more on importing them than on its work
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(("__main__", ".ray_app")):  # Ray takes seconds
                with contextlib.suppress(ImportError):
                    importlib.import_module(module.name)
    gc.collect()
    gc.freeze()  # else a collection in a child writes to all these objects, and the kernel copies their pages
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    print("ready", file=answers, flush=True)
    for line in requests:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


def _run(request: dict[str, Any]) -> dict[str, Any]:
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        _command(request)
    descriptor = os.pidfd_open(child)
    ended, _, _ = select.select([descriptor], [], [], request["seconds"])
    os.close(descriptor)
    if not ended:
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # it has not come to its setsid
            os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    code = os.waitstatus_to_exitcode(status) if ended else None
    return {"code": code, "seconds": time.monotonic() - start}


def _command(request: dict[str, Any]) -> None:
    """The child: run the command, and never return."""
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name, target in (("stdout", 1), ("stderr", 2)):
            opened = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(opened, target)
            os.close(opened)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        sys.argv = ["fastgen", *request["argv"]]
        socket.getaddrinfo = socket.socket.connect = _no_network  # type: ignore[assignment, method-assign]
        from fastgen.cli import main as command

        command()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _no_network(*arguments: Any, **options: Any) -> NoReturn:
    """In place of what every connection begins with: a second line on stderr, which `check` refuses."""
    print("asks the network", file=sys.stderr, flush=True)
    raise OSError("no network in these tests")


if __name__ == "__main__":
    main()
