"""A pool of workers over a cluster that is made up: the same bytes as one process, whatever dies."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace

import fsspec
import pytest
from fake_ray import DieError, FakeRay

pytest.importorskip("ray")

import fastgen
from fastgen.cluster import pool as pools
from fastgen.cluster.environment import most_common
from fastgen.cluster.machines import Slot
from fastgen.cluster.pool import Pool
from fastgen.cluster.work import PoolWork
from fastgen.cluster.worker import Opened, OutOfMemory, Refused, Worker, WorkerOptions
from fastgen.errors import FastgenError, InputError
from fastgen.files.places import Url
from fastgen.files.store import Folder
from fastgen.generate.job import run_job, run_work
from fastgen.generate.job_record import difference, recorded_environment
from fastgen.generate.pipeline import load
from fastgen.generate.recipe import Recipe
from fastgen.generate.requests import Request

NAMES = ["red cube", "blue sphere", "gray cylinder"]
REQUESTS = [Request(str(i), f"{i}.png", labels=(NAMES[i % 3],)) for i in range(16)]
RECIPE = Recipe(REQUESTS, {"num_inference_steps": 2, "seed": 3}, {}, None)
TWO = {"one": {"CPU": 1.0}, "two": {"CPU": 1.0}}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(pools, "NODES_S", 0.02)
    monkeypatch.setattr(pools, "LOOK_S", 0.01)


@pytest.fixture(scope="module")
def local(label_bundle, tmp_path_factory):
    """The folder that one process makes."""
    out = tmp_path_factory.mktemp("local") / "out"
    run_job(RECIPE.run(load(label_bundle, "ort"), None), out, batch_size=4, progress=False)
    return contents(out)


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name != "job.json"
    }


class Scripted(Worker):
    """A worker that does what a test says before it makes a batch."""

    def __init__(self, get, node, before=lambda node, batch: None, change=lambda node, opened: opened):
        super().__init__(get)
        self.node, self.before, self.change = node, before, change

    def open(self, options):
        opened = self.change(self.node, super().open(options))
        if isinstance(opened, Opened):
            self._environment = dict(opened.environment)
        return opened

    def make(self, key, recipe, batch, limits):
        instead = self.before(self.node, batch)
        return instead if instead is not None else super().make(key, recipe, batch, limits)


def run(label_bundle, out, machines=TWO, *, before=None, change=None, mixed=False, expected=None, said=None, meet=None):
    """Run the job on a made-up cluster. `meet(ray)` is called with it first."""
    settings = {name: value for name, value in (("before", before), ("change", change)) if value is not None}
    ray = FakeRay(machines, lambda get, node: Scripted(get, node, **settings))
    if meet is not None:
        meet(ray)
    options = WorkerOptions(label_bundle, "ort", mixed=mixed)
    say = (said if said is not None else []).append
    with Pool(ray, Slot(1, False), options, expected=expected, say=say) as pool:
        report = run_work(PoolWork(pool, RECIPE), out, batch_size=4, progress=False, say=say)
    ray.deaths = pool.deaths
    assert not any(actor.alive for actor in ray.actors)
    return report, ray


def test_two_workers_make_the_folder_of_one_process(label_bundle, local, tmp_path):
    used = set()
    report, ray = run(label_bundle, tmp_path / "out", before=lambda node, batch: used.add(node) or time.sleep(0.05))
    assert report.generated == 16
    assert not report.errors
    assert ray.deaths == 0
    assert used == {"one", "two"}
    assert contents(tmp_path / "out") == local
    assert recorded_environment(Folder(tmp_path / "out"))["engine"] == "ort"
    again, _ = run(label_bundle, tmp_path / "out")
    assert again.generated == 0
    assert contents(tmp_path / "out") == local


def test_pictures_of_workers_go_into_a_bucket(label_bundle, local):
    fs, url = fsspec.filesystem("memory"), Url(f"memory://{id(local)}/out")
    assert run(label_bundle, url)[0].generated == 16
    found = {path.partition("/out/")[2]: fs.cat_file(path) for path in fs.find(url[8:])}
    assert {name: data for name, data in found.items() if name != "job.json"} == local
    assert run(label_bundle, url)[0].generated == 0


def test_batches_of_workers_and_machines_that_die_are_made_elsewhere(label_bundle, local, tmp_path):
    deaths, met = [], []

    def before(node, batch):
        if len(deaths) < 2 and batch.start >= 4:
            deaths.append(batch)
            raise DieError
        if len(deaths) == 2 and "one" in met[0].machines:
            threading.Thread(target=met[0].lose, args=["one"]).start()
            met[0].machines["three"] = {"CPU": 2.0}
            time.sleep(0.1)

    report, ray = run(label_bundle, tmp_path / "out", before=before, meet=met.append)
    assert len(deaths) == 2
    assert ray.deaths >= 2  # and those of the machine that was lost
    assert not report.errors
    assert contents(tmp_path / "out") == local
    assert {actor.node for actor in ray.actors} >= {"two", "three"}


def test_an_image_that_kills_workers_is_an_error_and_all_others_are_made(label_bundle, local, tmp_path):
    poison, said = 9, []

    def before(node, batch):
        if batch.start <= poison < batch.stop:
            raise DieError

    report, ray = run(label_bundle, tmp_path / "out", before=before, said=said)
    assert set(report.errors) == {"9.png"}
    assert report.errors["9.png"] == "3 workers died with this image: The actor died unexpectedly."
    made = contents(tmp_path / "out")
    assert {name for name in local if name.endswith(".png")} - made.keys() == {"9.png"}
    assert all(made[f"{i}.png"] == local[f"{i}.png"] for i in range(16) if i != poison)
    halves = [line for line in said if "it is made in batches of" in line]
    assert halves == [f"ray: 3 workers died with a batch of {n}; it is made in batches of {n // 2}" for n in (4, 2)]
    assert (
        sum(not actor.alive for actor in ray.actors) <= 3 * 3 + 2
    )  # three for each size, and the pool's own at its end


def test_a_batch_beside_one_that_kills_is_innocent(label_bundle, local, tmp_path):
    """Two calls are with a worker when it dies: after that each is alone."""
    together, lock, now = [], threading.Lock(), []

    def before(node, batch):
        with lock:
            now.append(batch)
            together.append(sorted(b.start for b in now))
        time.sleep(0.03)
        with lock:
            now.remove(batch)
        if batch.start == 4:
            raise DieError

    report, _ = run(label_bundle, tmp_path / "out", {"one": {"CPU": 1.0}}, before=before)
    assert set(report.errors) == {"4.png"}
    assert contents(tmp_path / "out")["0.png"] == local["0.png"]
    assert sum(group == [0, 4] or group == [4, 8] for group in together) <= 2


def test_out_of_memory_halves_the_batch(label_bundle, local, tmp_path):
    said = []
    report, _ = run(
        label_bundle,
        tmp_path / "out",
        before=lambda node, batch: OutOfMemory("no memory") if batch.bucket > 2 else None,
        said=said,
    )
    assert not report.errors
    assert contents(tmp_path / "out") == local  # this engine's rows do not depend on their batch
    assert "ray: out of memory with a batch of 4; it is made in batches of 2" in said


def test_out_of_memory_with_one_image_ends_the_job(label_bundle, tmp_path):
    with pytest.raises(FastgenError, match="out of memory with a batch of 1: no memory"):
        run(label_bundle, tmp_path / "out", before=lambda node, batch: OutOfMemory("no memory"))


def other(field, value, nodes=("two",)):
    """Machines that differ in a field."""

    def change(node, opened):
        if node not in nodes:
            return opened
        return replace(opened, environment={**opened.environment, field: value})

    return change


FIELDS = ["engine", "dtype", "processor", "onnxruntime", "zlib"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_machine_of_another_kind_is_left_out_and_the_field_is_named(label_bundle, local, tmp_path, field):
    said, used = [], set()
    machines = {"one": {"CPU": 2.0}, "two": {"CPU": 1.0}}
    run(
        label_bundle, tmp_path / "out", machines, change=other(field, "xyz"), said=said, before=lambda n, b: used.add(n)
    )
    assert used == {"one"}
    assert contents(tmp_path / "out") == local
    (line,) = said
    assert line.startswith(f"ray: two is left out: {field} is ")
    assert line.endswith(" in this job and xyz there; --allow-mixed takes it")


def test_a_machine_with_another_version_of_fastgen_is_left_out_also_of_a_mixed_job(label_bundle, tmp_path):
    said = []
    run(label_bundle, tmp_path / "out", change=other("fastgen", "0.0.9"), mixed=True, said=said)
    assert said == [
        f"ray: two is left out: fastgen is 0.0.9 there and {fastgen.__version__} here; install one version on all machines"
    ]


def test_a_job_goes_on_only_with_the_kind_of_machine_that_began_it(label_bundle, tmp_path):
    run(label_bundle, tmp_path / "out")
    found = recorded_environment(Folder(tmp_path / "out"))
    with pytest.raises(InputError, match=r"numpy is \S+ in this job and 9 there"):
        run(label_bundle, tmp_path / "out", expected=found, change=other("numpy", "9", TWO))


def test_mixed_machines_are_noted_in_each_line(label_bundle, local, tmp_path):
    out = tmp_path / "out"
    slow = lambda node, batch: time.sleep(0.05)  # noqa: E731  # so that both work
    run(label_bundle, out, change=other("dtype", "bf16"), mixed=True, before=slow)
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert {line["node"]["dtype"] for line in lines} == {"fp32", "bf16"}
    assert all(line["dtype"] == line["node"]["dtype"] for line in lines)
    before = contents(out)
    (out / "3.png").unlink()
    run(label_bundle, out, change=other("dtype", "fp16", TWO), mixed=True)
    after = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    again = {i for i in range(16) if after[i] != lines[i]}
    assert again == {0, 1, 2, 3}  # the batch that was not complete
    assert all(contents(out)[f"{i}.png"] == before[f"{i}.png"] for i in range(4, 16))
    with pytest.raises(InputError, match="machines of several kinds made its images"):
        run(label_bundle, out)


def test_where_every_machine_refuses_the_first_reason_is_the_error(label_bundle, tmp_path):
    with pytest.raises(InputError, match=r"--ray: (one|two): engine trt needs a GPU"):
        run(label_bundle, tmp_path / "out", change=lambda node, opened: Refused("engine trt needs a GPU", 2))
    assert not (tmp_path / "out").exists()


def test_workers_that_die_while_they_load_are_given_up(label_bundle, tmp_path):
    tries = []

    def change(node, opened):
        tries.append(node)
        raise DieError

    with pytest.raises(FastgenError, match="the worker died 5 times while it loaded the model"):
        run(label_bundle, tmp_path / "out", change=change)
    assert 5 <= len(tries) <= 10


def test_a_job_ends_where_no_machine_is_left_that_can_load_the_model(label_bundle, tmp_path):
    """Both worked at first; after the first batch every worker dies, and none can load the model again."""
    began = []

    def before(node, batch):
        began.append(batch)
        if len(began) > 2:
            raise DieError

    def change(node, opened):
        if len(began) > 2:
            raise DieError
        return opened

    said = []
    with pytest.raises(FastgenError, match=r"--ray: (one|two): the worker died 5 times"):
        run(label_bundle, tmp_path / "out", before=before, change=change, said=said)
    assert sum("is left out: the worker died 5 times while it loaded the model" in line for line in said) == 2


def test_an_error_of_a_worker_that_nobody_expects_ends_the_job_in_one_line(label_bundle, tmp_path):
    def before(node, batch):
        raise ZeroDivisionError("a bug")

    with pytest.raises(FastgenError, match=r"--ray: (one|two): ZeroDivisionError: a bug"):
        run(label_bundle, tmp_path / "out", before=before)


def test_a_cluster_without_room_is_refused(label_bundle, tmp_path):
    with pytest.raises(InputError, match="no machine of the cluster has a CPU; found 0 CPUs, 0 GPUs"):
        run(label_bundle, tmp_path / "out", {"one": {"CPU": 0.0}})


@pytest.mark.parametrize(
    ("slot", "resources", "workers", "takes"),
    [
        (Slot(None, False), {"CPU": 16}, 1, {"num_cpus": 16, "num_gpus": 0}),
        (Slot(4, False), {"CPU": 14, "GPU": 2}, 3, {"num_cpus": 4, "num_gpus": 0}),
        (Slot(None, True), {"CPU": 16, "GPU": 8}, 8, {"num_cpus": 1, "num_gpus": 1}),
        (Slot(4, True), {"CPU": 16, "GPU": 8}, 4, {"num_cpus": 4, "num_gpus": 1}),
        (Slot(None, True), {"CPU": 16}, 0, {"num_cpus": 1, "num_gpus": 1}),
        (Slot(None, False), {}, 0, {"num_cpus": 1, "num_gpus": 0}),
    ],
)
def test_workers_of_a_machine(slot, resources, workers, takes):
    assert slot.workers(resources) == workers
    assert slot.takes(resources) == takes


def test_environments():
    a, b = {"engine": "trt", "card": "H100"}, {"engine": "trt", "card": "H200"}
    assert difference(a, dict(a)) is None
    assert difference(a, b) == "card is H100 there and H200 here"
    assert difference(a, {"engine": "trt"}) == "card is H100 there and none here"
    assert most_common([b, a, a]) == a
    assert most_common([b, a]) == b
    assert Opened(a, ()).environment == a


def test_without_ray_the_line_has_the_command_that_installs_it(fastgen_process, tmp_path):
    words = ["generate", "--labels", "red cube", "--count", "2", "--out", tmp_path / "out", "--ray"]
    done = fastgen_process(*words, blocked=["ray"])
    assert done.returncode == 2
    assert done.stderr == 'fastgen: error: --ray needs the package ray; pip install "ray>=2.40"\n'
    assert not (tmp_path / "out").exists()
