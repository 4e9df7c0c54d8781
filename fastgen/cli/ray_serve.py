"""`serve run fastgen.cli.ray_serve:app models=B engine=ort replicas=2`: `fastgen serve` as an application of Ray Serve."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from fastgen.cli.parameters import Number, Whole
from fastgen.cli.serve import PACKAGES, check_packages, checked, policy_of, worker_options
from fastgen.cli.serve import serve as command
from fastgen.errors import FastgenError, InputError, one_line, unknown
from fastgen.files.jsonfiles import brief

if TYPE_CHECKING:
    from ray.serve import Application

REPLICAS, GPUS = Whole(1, 10_000), Number(0, 64)
RAYS = {"host": "http_options", "port": "http_options"}  # what Ray Serve's own configuration says
CLOSE_S = 10.0  # after `drain`, for the processes to end


class Refused(click.ClickException):
    """An error that Ray's command shows as one line."""

    exit_code = 2


def app(args: dict[str, Any]) -> Application:
    """The application: `fastgen serve` with these arguments, which are called as its options are, in `replicas` replicas.

    Besides: `models`, a text with commas or a list; `replicas` (1), and `gpus` (0), the GPUs of each one. Raises
    Refused for arguments that are wrong or unknown, and for models that cannot be served.
    """
    try:
        return _application(dict(args))
    except (FastgenError, click.UsageError) as error:
        text = error.format_message() if isinstance(error, click.UsageError) else str(error)
        raise Refused(one_line(text)) from None


def _application(args: dict[str, Any]) -> Application:
    check_packages("fastgen under Ray Serve", (*PACKAGES, "ray", "fastapi"), "ray-serve")
    from fastgen.serving.ray_app import Replica

    replicas = _own(args, "replicas", REPLICAS, 1)
    gpus = _own(args, "gpus", GPUS, 0.0)
    options = command.make_context("serve run", list(_words(args))).params
    _check_gpus(gpus, options["engine"], options["device"])
    keys = {"keys": options.pop("keys"), "key_file": options.pop("api_key_file")}
    host = "0.0.0.0" if any(keys.values()) else "127.0.0.1"
    policy = policy_of(host, **keys, origins=options.pop("origins"))
    drain, log = options.pop("drain"), options.pop("log")
    del options["host"], options["port"]
    if options["rag"] is not None:
        options["rag"] = options["rag"].resolve()
    models = [replace(model, model=model.model.resolve()) for model in worker_options(**options)]
    for model in models:
        checked(model)  # here for an error on one line; each replica does it for its own node
    actor = {"num_cpus": (options["threads"] or 1) * len(models), "num_gpus": gpus}
    deployment: Any = Replica
    deployment = deployment.options(
        num_replicas=replicas, ray_actor_options=actor, graceful_shutdown_timeout_s=drain + CLOSE_S
    )
    return deployment.bind(models, policy, checked, drain, log)


def _own(args: dict[str, Any], name: str, kind: Whole | Number, default: Any) -> Any:
    """An argument that is none of `fastgen serve`, taken out of `args`."""
    value = args.pop(name, default)
    return kind.convert(str(value), click.Option([f"--{name}"]), None)


def _words(args: Mapping[str, Any]) -> Iterator[str]:
    """The arguments as words of the command line of `fastgen serve`."""
    options = {max(p.opts, key=len).removeprefix("--"): p for p in command.params if isinstance(p, click.Option)}
    for given, value in args.items():
        name = str(given).replace("_", "-")
        if name in RAYS:
            raise InputError(f"{name}: is Ray Serve's; give it in {RAYS[name]} of its configuration file")
        if name == "models":
            continue
        if name not in options:
            raise unknown("argument", name, ("models", "replicas", "gpus", *sorted(options.keys() - RAYS)))
        option = options[name]
        if option.is_flag:
            yield from _switch(name, value, option)
        else:
            listed = isinstance(value, list) or (option.multiple and name != "api-key")  # a key may hold commas
            yield from (f"--{name}={_text(name, word)}" for word in (_several(value) if listed else [value]))
    yield "--"
    for word in _several(args.get("models", [])):
        yield _text("models", word)


def _switch(name: str, value: Any, option: click.Option) -> Sequence[str]:
    text = str(value).lower()
    if text not in ("true", "false"):
        raise InputError(f"{name}: found {brief(value)}, expected true or false")
    return option.opts[:1] if text == "true" else option.secondary_opts[:1]


def _several(value: Any) -> Sequence[Any]:
    """A list as it is, a text split at its commas."""
    return value if isinstance(value, list) else [word.strip() for word in str(value).split(",")]


def _text(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{name}: found {brief(value)}, expected a text or a number")
    return str(value)


def _check_gpus(gpus: float, engine: str | None, device: str | None) -> None:
    """InputError where the replicas would see no GPU, as Ray hides those that an actor has not asked for."""
    from fastgen.engines import engine_class

    needs = (device or "").startswith("cuda") or (engine is not None and engine_class(engine).built_by is not None)
    if needs and not gpus:
        found = f"device {device}" if device else f"engine {engine}"
        raise InputError(f"gpus: found 0, but {found} needs a GPU; give gpus=1, one for each replica")
