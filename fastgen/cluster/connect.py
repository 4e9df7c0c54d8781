"""Joining a Ray cluster, or starting one on this machine."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastgen.errors import FastgenError, InputError, Say, first_line, one_line
from fastgen.files.installing import hint
from fastgen.files.quiet import verbose

LOCAL = "local"  # the address of a cluster that this process starts, and ends
VARIABLE = "RAY_ADDRESS"
ANSWER_S = 10  # within which a head node answers
CONNECT_S = 60  # within which this process is connected to the cluster of this machine
PREFIX, LOCK = "fastgen-ray-", "lock"  # of the folder of such a cluster; and a file that its process holds locked
LONGEST_FOLDER = 20  # bytes of the path above it: the names of Ray's sockets below it may have 107 in all
TOKEN = "RAY_AUTH_TOKEN"
# Processes that say whether a cluster answers: Ray itself waits for over a minute, and then ends its process. The first asks
# the head node, the second connects to whatever cluster runs on this machine.
ASK = """
import sys
import ray
print("imported", flush=True)
try:
    getattr(ray._raylet, "GcsClient", lambda address: None)(address=sys.argv[1])
except Exception as error:
    print("token" if type(error).__name__ == "AuthenticationError" else str(error) or type(error).__name__, flush=True)
    raise SystemExit(1)
"""
CONNECT = """
import logging, sys
import ray
print("imported", flush=True)
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level=logging.CRITICAL)
except BaseException as error:
    print(str(error) or type(error).__name__, flush=True)
    raise SystemExit(1)
"""


def check_installed() -> None:
    """InputError, with the command that installs it, where Ray is missing."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"--ray needs the package ray; {hint('ray')}")


def parse_address(text: str) -> str:
    """The value of --ray: LOCAL, `auto` for the cluster that runs on this machine, or HOST:PORT of its head node. Raises
    InputError."""
    if text in (LOCAL, "auto"):
        return text
    if text.startswith("ray://"):
        raise InputError(
            f"--ray {text}: Ray's client protocol is not used; run this command on a machine of the cluster with --ray auto, "
            "or with `ray job submit`"
        )
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 65_536):
        where = "; write --ray behind the file, or --ray=ADDRESS" if Path(text).exists() else ""
        raise InputError(f"--ray: found {text!r}, expected no value, auto, or HOST:PORT of the head node{where}")
    return text


@contextmanager
def cluster(address: str, say: Say = lambda line: None) -> Iterator[tuple[Any, bool]]:
    """The module `ray`, connected to the cluster at `address` (see `parse_address`) for the time of the block, and whether that
    is a new one on this machine. Where the variable RAY_ADDRESS is set, LOCAL stands for the cluster that it names.

    Raises InputError for a cluster that does not answer within 10 s, or does not fit the Ray that is installed here.
    """
    check_installed()
    if address == LOCAL and (given := os.environ.get(VARIABLE)) and given != LOCAL:
        say(f"ray: the cluster of {VARIABLE}={given}")
        address = parse_address(given)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    import ray

    options: dict[str, Any] = {
        "log_to_driver": verbose(),
        "logging_level": logging.INFO if verbose() else logging.ERROR,
    }
    with contextlib.ExitStack() as stack:
        if address == LOCAL:
            folder = stack.enter_context(_own_folder())
            stack.enter_context(_own_token(ray))
            from fastgen.engines.machine import usable_cores

            options |= {"num_cpus": usable_cores(), "include_dashboard": False, "_temp_dir": str(folder)}
        else:
            _check_answers(address)
        if not verbose():
            _silence(ray)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        _connect(ray, address, options, say)
        stack.callback(ray.shutdown)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own prints the stack
        yield ray, address == LOCAL


def _connect(ray: Any, address: str, options: Mapping[str, Any], say: Say) -> None:
    """ray.init. A cluster of our own is tried twice: on a busy machine its first process may need longer than Ray waits. What
    the first try started ends with this process."""
    if ray.is_initialized():
        raise FastgenError(
            f"--ray {address}: this process is connected to a cluster of Ray already; ray.shutdown() ends that"
        )
    for last in (address != LOCAL, True):
        try:
            ray.init(address=address, **options)
        except (Exception, SystemExit) as error:
            ray.shutdown()
            if last or not isinstance(error, RuntimeError | SystemExit):
                raise FastgenError(f"--ray {address}: {_reason(error)}") from None
            say(f"ray: {_reason(error)}; trying once more")
        else:
            return


def _reason(error: BaseException) -> str:
    """What Ray says, in a line: its first, and its last one, which names the error below it."""
    first, last = first_line(error), str(error).strip().rpartition("\n")[2].strip()
    return first if last in ("", first) else one_line(f"{first} {last}")


@contextmanager
def _own_token(ray: Any) -> Iterator[None]:
    """A password for a cluster of our own, where Ray asks for one: without it, it writes one into the home folder. A process
    keeps the first one that it reads, so it is made to read it again: of this cluster, and afterwards of the next."""
    given = os.environ.get(TOKEN)
    os.environ.setdefault(TOKEN, secrets.token_hex(32))
    try:
        _forget_token(ray)
        yield
    finally:
        if given is None:
            os.environ.pop(TOKEN, None)
        _forget_token(ray)


def _forget_token(ray: Any) -> None:
    loader = getattr(ray._raylet, "AuthenticationTokenLoader", None)  # a Ray without it asks for no token
    if loader is not None:
        loader.instance().reset_cache()


def _silence(ray: Any) -> None:
    """Hide the many lines that Ray prints on stdout when a worker dies: the pool says it in one. Ray has no setting for this.
    In a version of Ray whose function has another name, the lines are printed."""
    printer = "print_to_stdstream"
    if hasattr(ray._private.worker, printer):
        setattr(ray._private.worker, printer, lambda *lines, **options: None)


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder for the files of a cluster that this process starts. It removes the folders that killed processes left."""
    from filelock import FileLock, Timeout

    place = Path(tempfile.gettempdir())
    if len(os.fsencode(place)) > LONGEST_FOLDER and os.path.isdir("/tmp"):
        place = Path("/tmp")
    for left in place.glob(f"{PREFIX}*"):
        # Another user's, or one that is in use, stays.
        with contextlib.suppress(OSError, Timeout), FileLock(left / LOCK, timeout=0):
            shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    try:
        with FileLock(folder / LOCK):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_answers(address: str) -> None:
    """InputError for a cluster that does not answer."""
    if address == "auto":
        _ask(CONNECT, address, CONNECT_S)
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
    except OSError as error:
        reason = "no answer" if isinstance(error, TimeoutError) else error.strerror or first_line(error)
        raise InputError(f"--ray {address}: {reason}; is the head node (`ray start --head`) running there?") from None
    _ask(ASK, address, ANSWER_S)


def _ask(script: str, address: str, seconds: float) -> None:
    """Run a script that connects to a cluster. Raises InputError with what it says, or where it takes longer."""
    command = [sys.executable, "-c", script, address]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as asking:
        assert asking.stdout is not None
        try:
            asking.stdout.readline()  # imported: from here on it is the cluster that takes time
            timer = threading.Timer(seconds, asking.kill)
            timer.start()
            said = asking.stdout.read().split("\n")
            timer.cancel()
        except BaseException:
            asking.kill()
            raise
    if asking.returncode == 0:
        return
    reason = f"no answer within {seconds} s" if asking.returncode < 0 else said[0]
    if reason == "token":
        reason = "asks for a token; set RAY_AUTH_MODE=token, and copy ~/.ray/auth_token from the head node"
    raise InputError(f"--ray {address}: {reason}")
