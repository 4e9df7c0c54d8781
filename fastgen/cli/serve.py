"""`fastgen serve`."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fastgen.cli.certifying import ensure_certified
from fastgen.cli.common import say
from fastgen.cli.parameters import DEVICE, DTYPE, ENGINE, FOLDER, PATH_OR_NAME, THREADS, Number, Whole, argument, option
from fastgen.errors import InputError
from fastgen.files.jsonfiles import brief

if TYPE_CHECKING:
    import socket

    from fastgen.serving.security import Policy
    from fastgen.serving.worker import WorkerOptions

PACKAGES = ("starlette", "uvicorn", "prometheus_client")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
MAX_KEYS = 1000
PORT = Whole(0, 65_535)
WAIT = Number(0, 3600, above=True)
DRAIN = Number(0, 3600)


@click.command()
@argument("models", metavar="[MODEL]...", nargs=-1, type=PATH_OR_NAME)
@option(
    "--engine",
    type=ENGINE,
    help="eager, compile, ort, openvino, trt or trt-rtx.  [default: the fastest that needs nothing built]",
)
@option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; other machines need an API key.")
@option("--port", type=PORT, default=8000, show_default=True, help="Port; 0 takes a free one.")
@option(
    "--api-key",
    "keys",
    multiple=True,
    metavar="KEY",
    help="A key that opens the API; repeatable. Processes of this machine see it.",
)
@option("--api-key-file", type=FOLDER, metavar="FILE", help="A file of keys, one a line.")
@option("--cors", "origins", multiple=True, metavar="ORIGIN", help="Let this website use the API; repeatable.")
@option("--max-wait", type=WAIT, default=30.0, show_default=True, help="Refuse requests that would wait longer, in s.")
@option("--drain", type=DRAIN, default=25.0, show_default=True, help="Time for running images at the end, in s.")
@option(
    "--exact/--fast",
    default=None,
    help="The bytes of `fastgen generate`, or any batch size.  [default: --exact on a CPU]",
)
@option("--rag", type=FOLDER, help="Let requests start from the nearest image of this index (`fastgen index`).")
@option("--checkpoint", help="A run's weights: best, last, ema or a step.  [default: the finished model's]")
@option("--allow-pickle", is_flag=True, help="Read weights in pickles (.bin) too, tensors alone.")
@option("--device", type=DEVICE, help="cpu, cuda, cuda:1, ...")
@option("--dtype", type=DTYPE, help="fp32, bf16, fp16, int8 or fp8.  [default: what suits the engine and the hardware]")
@option("--threads", type=THREADS, help="CPU threads of each model.  [default: the engine's]")
@option("--log/--no-log", default=True, show_default=True, help="A line on stderr for each request.")
def serve(
    models: Sequence[str],
    host: str,
    port: int,
    keys: Sequence[str],
    api_key_file: Path | None,
    origins: Sequence[str],
    drain: float,
    log: bool,
    **options: Any,
) -> None:
    """Serve models over HTTP: an API like OpenAI's for images, and a page to try it.

    MODEL is a bundle, a model folder, the name of a model that comes with fastgen, or NAME=FOLDER to choose its name; without
    one all that come with fastgen. A model folder is exported into the cache first, unless --engine eager or compile runs it
    as it is. Requests join the running batch at any step.
    """
    check_packages("fastgen serve", PACKAGES, "serve")
    import asyncio

    from fastgen.serving.app import PAGE, create_app
    from fastgen.serving.http import address_of, create_server
    from fastgen.serving.lifetime import serve as serve_until_signalled
    from fastgen.serving.service import Service

    policy = policy_of(host, keys, api_key_file, origins)
    served = worker_options(models, **options)
    with _listener(host, port) as listener:
        served = [checked(model) for model in served]
        address = address_of(listener)

        async def run() -> None:
            service = Service(served, say=say)
            server = create_server(create_app(service, policy, PAGE.read_bytes(), say if log else None))

            def ready() -> None:
                click.echo(f"fastgen serves {', '.join(service.models)} at {address}")

            await serve_until_signalled(service, server, listener, drain_s=drain, ready=ready)

        asyncio.run(run())


def worker_options(models: Sequence[str], max_wait: float, rag: Path | None, **options: Any) -> list[WorkerOptions]:
    """What to serve of each MODEL, and how. `options`: those of the command that `WorkerOptions` calls the same."""
    from fastgen.serving.worker import WorkerOptions

    named = named_models(models)
    if rag is not None and len(named) > 1:
        raise InputError("--rag: an index belongs to one model; name that MODEL alone")
    options |= {"rag": rag, "max_wait_s": max_wait, "check": ensure_certified}
    return [WorkerOptions(folder, name, **options) for name, folder in named.items()]


def named_models(models: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of the MODELs; of the shipped ones where none is given. Raises InputError for a name that is taken or
    cannot stand in an address."""
    from fastgen.models.find import MODELS, find_folder, shipped_names
    from fastgen.models.layout import INDEX

    named: dict[str, Path] = {}
    for text in models or [name for name in shipped_names() if (MODELS / name / INDEX).is_file()]:
        name, given, folder = text.partition("=")
        if not given or os.path.lexists(text):
            name, folder = "", text
        path = find_folder(folder or ".")
        name = name or path.resolve().name
        if not NAME.fullmatch(name):
            found = f"MODEL: found the name {brief(name)}, expected letters, digits, and . _ -"
            raise InputError(f"{found}; give NAME={folder}")
        if name in named:
            raise InputError(f"MODEL: two are called {name}: {named[name]} and {path}; give one of them as NAME=FOLDER")
        named[name] = path
    return named


def checked(options: WorkerOptions) -> WorkerOptions:
    """The options, with a model folder's bundle where the engine runs bundles. InputError for what is no model, for an engine
    that does not run it, and for a bundle whose files were altered."""
    from dataclasses import replace

    from fastgen.generate.pipeline import choose_engine
    from fastgen.models.find import find_model
    from fastgen.retrieval.index import open_index
    from fastgen.serving.bundles import served_folder

    if options.rag is not None:
        open_index(options.rag)
    folder = served_folder(options.model, options.engine, options.checkpoint, options.allow_pickle, say)
    options = replace(options, model=folder)
    model = find_model(options.model, options.checkpoint)
    choose_engine(model, options.engine, options.device)
    if model.bundle is not None:
        model.bundle.verify(options.dtype or "fp32")
    return options


def policy_of(host: str, keys: Sequence[str], key_file: Path | None, origins: Sequence[str]) -> Policy:
    """Who may ask a server at the address `host`. Raises InputError where other machines reach it and there is no key."""
    from fastgen.serving.app import PAGE
    from fastgen.serving.security import Policy, check_key, check_origin, content_policy, hosts_of, is_loopback

    keys = (*keys, *_keys_of(key_file))
    for key in keys:
        check_key(key, "--api-key")
    if not keys and not is_loopback(host):
        raise InputError(f"--host {brief(host)}: other machines reach this address; give --api-key-file, or --api-key")
    allowed = tuple(map(check_origin, origins))
    return Policy(keys, hosts_of(host), allowed, content_policy(PAGE.read_bytes()))


def _keys_of(file: Path | None) -> list[str]:
    """The keys in a file, one a line; empty lines and those that begin with # are none."""
    from fastgen.files.jsonfiles import read_text

    if file is None:
        return []
    lines = [line.strip() for line in read_text(file, "a file of keys", 2**20).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not 0 < len(keys) <= MAX_KEYS:
        raise InputError(f"--api-key-file {file}: holds {len(keys):,} keys, expected 1 to {MAX_KEYS}, one a line")
    return keys


def _listener(host: str, port: int) -> socket.socket:
    import socket

    from fastgen.serving.http import bind

    try:
        return bind(host, port)
    except (socket.gaierror, UnicodeError):
        raise InputError(f"--host: found {brief(host)}, expected an address of this machine") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port}: is in use; give another, or 0 for any that is free") from None
        if error.errno == errno.EACCES:
            raise InputError(f"--port {port}: needs rights that this user lacks; give one from 1024 on") from None
        raise InputError(f"--host {brief(host)}: {error.strerror}; expected an address of this machine") from None


def check_packages(what: str, packages: Sequence[str], extra: str) -> None:
    """InputError, with the command that installs the extra, where `what` needs packages that are not installed."""
    from importlib.util import find_spec

    from fastgen.files.installing import hint

    if missing := [name for name in packages if find_spec(name) is None]:
        raise InputError(f"{what} needs {', '.join(missing)}, not installed here: {hint(extra)}")
