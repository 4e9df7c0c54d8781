"""`generate --ray` on a real cluster of two raylets: workers, a raylet and the driver are killed, and the folder is that of one
process."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ray = pytest.importorskip("ray")

NAMES = ["red cube", "blue sphere", "gray cylinder"]
IMAGES = 60
MARK, MARKED = "FASTGEN_TEST_CLUSTER", str(os.getpid())  # in the environment of everything that these tests start
STEPS = "40"  # so that a job takes longer than a worker's start


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cache"))
    yield made
    made.close()


class Cluster:
    """A head without CPUs, and raylets with one CPU each, all on this machine."""

    def __init__(self, cache: Path) -> None:
        from ray.cluster_utils import Cluster as Raylets

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["FASTGEN_CACHE"] = str(cache)
        os.environ[MARK] = MARKED
        self.cache = cache
        self._raylets = Raylets(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}, shutdown_at_exit=False
        )
        self.address = self._raylets.address
        self.nodes = [self.add(), self.add()]

    def add(self):
        return self._raylets.add_node(num_cpus=1)

    def lose(self, node) -> None:
        """kill -9 of a raylet: its workers end with it."""
        self._raylets.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._raylets.shutdown()


def processes(word: str) -> list[int]:
    """The ids of the processes of these tests, not of other clusters on this machine, whose title or command line begins with a
    word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            ours = f"{MARK}={MARKED}".encode() in folder.joinpath("environ").read_bytes()
            if ours and folder.joinpath("cmdline").read_bytes().startswith(word.encode()):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


WORKER = "ray::Worker"  # the title of our workers' processes


@pytest.fixture(scope="module")
def job(label_bundle, tmp_path_factory) -> tuple[list[str], dict[str, bytes]]:
    """A command without its output and place, and the folder that one process makes."""
    folder = tmp_path_factory.mktemp("job")
    requests = folder / "requests.json"
    requests.write_text(json.dumps([[NAMES[i % 3]] for i in range(IMAGES)]))
    words = ["generate", str(requests), "--model", str(label_bundle), "--engine", "ort", "--batch-size", "2"]
    words += ["--num-inference-steps", STEPS]
    subprocess.run([sys.executable, "-m", "fastgen", *words, "--out", str(folder / "out")], check=True)
    return words, contents(folder / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "job.json"
    }


def start(words: list[str], out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fastgen", *words, "--out", str(out), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for_images(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Wait until the process has written so many images."""
    while len(list(out.glob("*.png"))) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out, err


def ended(name: str, seconds: float = 20) -> bool:
    """Whether no such process is left, after a while at the latest."""
    until = time.monotonic() + seconds
    while processes(name) and time.monotonic() < until:
        time.sleep(0.2)
    return not processes(name)


def kill_a_worker() -> bool:
    """Whether there was one."""
    found = processes(WORKER)
    if found:
        os.kill(random.choice(found), signal.SIGKILL)
    return bool(found)


def test_the_bundle_travels_and_two_machines_make_the_folder_of_one_process(cluster, job, tmp_path):
    words, expected = job
    out, _ = finish(start(words, tmp_path / "out", f"--ray={cluster.address}"))
    assert contents(tmp_path / "out") == expected
    assert f"{IMAGES} generated" in out
    (shipped,) = [p for p in (cluster.cache / "cluster").iterdir() if p.is_dir()]
    assert (shipped / Path(words[3]).name / "bundle.json").is_file()
    assert ended(WORKER)


def test_workers_killed_again_and_again_change_no_byte(cluster, job, tmp_path):
    words, expected = job
    process = start(words, tmp_path / "out", f"--ray={cluster.address}")
    killed = 0
    for images in (4, 14, 24, 34, 44):  # between two kills some are made, however slow the machine is
        wait_for_images(process, tmp_path / "out", images)
        killed += kill_a_worker()
    out, err = finish(process)
    lost = [line for line in err.splitlines() if ": a worker is lost: The actor died" in line]
    assert len(lost) == killed >= 3
    assert err.splitlines() == lost  # of Ray itself nothing
    assert len(out.splitlines()) == 1
    assert contents(tmp_path / "out") == expected
    assert ended(WORKER)


def test_a_raylet_that_is_killed_changes_no_byte(cluster, job, tmp_path):
    words, expected = job
    process = start(words, tmp_path / "out", f"--ray={cluster.address}")
    wait_for_images(process, tmp_path / "out", 4)
    cluster.lose(cluster.nodes.pop())
    finish(process)
    assert contents(tmp_path / "out") == expected
    cluster.nodes.append(cluster.add())
    assert ended(WORKER)


def test_a_driver_that_is_killed_leaves_no_worker_and_the_same_command_continues(cluster, job, tmp_path):
    words, expected = job
    process = start(words, tmp_path / "out", f"--ray={cluster.address}")
    wait_for_images(process, tmp_path / "out", 4)
    process.kill()
    process.communicate()
    assert ended(WORKER, 60)
    made = len(list((tmp_path / "out").glob("*.png")))
    assert 4 <= made < IMAGES
    out, _ = finish(start(words, tmp_path / "out", f"--ray={cluster.address}"))
    assert contents(tmp_path / "out") == expected
    assert int(out.partition(" images, ")[2].split()[0]) <= IMAGES - made + 2


def test_a_cluster_that_does_not_answer_is_refused_within_seconds(job, tmp_path):
    words, _ = job
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        silent_port = silent.getsockname()[1]
        begin = time.monotonic()
        process = start(words, tmp_path / "out", f"--ray=127.0.0.1:{silent_port}")
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert err.strip() == f"fastgen: error: --ray 127.0.0.1:{silent_port}: no answer within 10 s"
        assert time.monotonic() - begin < 40
    process = start(words, tmp_path / "out", f"--ray=127.0.0.1:{silent_port}")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(f"fastgen: error: --ray 127.0.0.1:{silent_port}: Connection refused")
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_asks_for_a_token_says_so_and_takes_it(job, short, tmp_path, monkeypatch):
    words, expected = job
    monkeypatch.setenv(MARK, MARKED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port", port]
    command += ["--num-cpus", "1", "--temp-dir", str(short), "--include-dashboard", "false", "--disable-usage-stats"]
    with subprocess.Popen(
        command, env=os.environ | token, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as head:
        try:
            until = time.monotonic() + 60
            while not list(short.glob("session_*/sockets/raylet")) and time.monotonic() < until:
                time.sleep(0.2)
            place = f"--ray=127.0.0.1:{port}"
            _, err = start(words, tmp_path / "out", place).communicate(timeout=60)
            assert err.startswith(f"fastgen: error: --ray 127.0.0.1:{port}: asks for a token; set RAY_AUTH_MODE=token")
            assert not (tmp_path / "out").exists()
            for name, value in token.items():
                monkeypatch.setenv(name, value)
            finish(start(words, tmp_path / "out", place))
            assert contents(tmp_path / "out") == expected
        finally:
            head.terminate()


def test_an_engine_that_no_machine_has_is_one_line(cluster, job, tmp_path):
    words, _ = job
    words = [*words[:5], "trt", *words[6:]]
    assert words[4] == "--engine"
    process = start(words, tmp_path / "out", f"--ray={cluster.address}")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    (line,) = err.strip().splitlines()
    assert line.startswith("fastgen: error: --ray: ")
    assert "trt" in line
    assert not (tmp_path / "out").exists()
    assert ended(WORKER)


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths may not be long."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        yield Path(folder)


def test_a_new_cluster_on_this_machine_leaves_no_process_and_no_file(job, short, tmp_path, monkeypatch):
    words, expected = job
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setenv(MARK, MARKED)
    before = set(processes(""))
    process = start(words, tmp_path / "out", "--cpus-per-worker", "1", "--ray")
    wait_for_images(process, tmp_path / "out", 4)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1].endswith("the same command continues")
    finish(start(words, tmp_path / "out", "--cpus-per-worker", "1", "--ray"))
    assert contents(tmp_path / "out") == expected
    until = time.monotonic() + 20
    while (left := set(processes("")) - before) and time.monotonic() < until:
        time.sleep(0.2)
    assert not left
    assert not list(short.glob("fastgen-ray-*"))


TWICE = """
from fastgen.cluster.connect import LOCAL, cluster

for turn in (1, 2):
    with cluster(LOCAL, print) as (ray, own):
        print(ray.get(ray.remote(lambda n: n).remote(turn)))
"""


def test_a_process_can_have_one_new_cluster_after_another(short, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["1", "2"]


def test_the_error_below_the_one_that_ray_raises_is_named():
    from fastgen.cluster.connect import _reason

    raised = RuntimeError(
        "Failed to start GCS.\n\n.Please check the log: Traceback\n  File x\nray.AuthError: wrong token\n"
    )
    assert _reason(raised) == "Failed to start GCS. ray.AuthError: wrong token"


FAILS_ONCE = """
from ray._private.node import Node

from fastgen.cluster.connect import LOCAL, cluster

start, started = Node.start_gcs_server, []

def fails_once(node):
    start(node)
    started.append(node)
    if len(started) == 1:
        raise RuntimeError("Failed to start GCS.  Last 0 lines of error files:")

Node.start_gcs_server = fails_once
with cluster(LOCAL, print) as (ray, own):
    assert own
    print(ray.get(ray.remote(lambda: 3).remote()), len(started))
"""


def test_a_new_cluster_whose_first_process_does_not_answer_is_started_once_more(short, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(short))
    monkeypatch.setenv(MARK, MARKED)
    before = set(processes(""))
    done = subprocess.run([sys.executable, "-c", FAILS_ONCE], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == [
        "ray: Failed to start GCS.  Last 0 lines of error files:; trying once more",
        "3 2",
    ]
    assert set(processes("")) <= before
    assert not list(short.glob("fastgen-ray-*"))
