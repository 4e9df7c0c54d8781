"""`fastgen serve` under Ray Serve: two replicas of a small model on a cluster of this machine."""

from __future__ import annotations

import base64
import os
import re
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import httpx
import pytest
from served import expected_files
from serving_client import wait_for

from fastgen.cli.ray_serve import app
from fastgen.serving.messages import ImageTask

ray = pytest.importorskip("ray")
pytest.importorskip("fastapi")
yaml = pytest.importorskip("yaml")
psutil = pytest.importorskip("psutil")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own configuration
REPO = Path(__file__).parents[2]
PATH = "/v1/images/generations"
KEY = "a-key-of-the-test"
LONG = {"num_inference_steps": 900, "scheduler": "ddim", "guidance_scale": 1.0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "B"}, "unknown argument 'model'; did you mean 'models'?"),
        ({"port": 8000}, "port: is Ray Serve's; give it in http_options of its configuration file"),
        ({"replicas": "0"}, "--replicas: found '0', expected a whole number from 1 to 10000"),
        ({"gpus": "many"}, "--gpus: found 'many', expected a number from 0 to 64"),
        ({"engine": "trt"}, "gpus: found 0, but engine trt needs a GPU; give gpus=1, one for each replica"),
        ({"device": "cuda:0"}, "gpus: found 0, but device cuda:0 needs a GPU"),
        ({"engine": "ortt"}, "unknown engine 'ortt'; did you mean 'ort'?"),
        ({"max_wait": 0}, "--max-wait: found '0', expected a number above 0"),
        ({"exact": "yes"}, "exact: found 'yes', expected true or false"),
        ({"threads": {"all": 1}}, "threads: found {'all': 1}, expected a text or a number"),
        ({"models": "nothing-of-this-name"}, "nothing-of-this-name"),
        ({"models": "a=B,a=B"}, "two are called a"),
        ({"api-key": "short"}, "--api-key: found a key of 5 characters, expected 8 to 200"),
    ],
)
def test_wrong_arguments_are_one_line_before_ray_starts(label_bundle, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "B").symlink_to(label_bundle)
    with pytest.raises(click.ClickException) as caught:
        app(arguments)
    text = caught.value.format_message()
    assert words in text
    assert "\n" not in text
    assert len(text) < 300
    assert not ray.is_initialized()


def test_the_arguments_reach_the_replicas(label_bundle, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    given = {"models": [f"a={label_bundle}"], "api_key_file": str(keys), "max-wait": 5, "exact": False, "threads": "2"}
    more = {"cors": "https://a.example,https://b.example", "drain": 3, "log": "false", "allow_pickle": False}
    built = app({**given, **more, "replicas": "3", "gpus": 0.5, "engine": "ort"})
    deployment = built._bound_deployment
    assert deployment.num_replicas == 3
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 0.5}
    (model,), policy, _, drain, log = deployment.init_args
    assert (model.model, model.name, model.engine) == (label_bundle.resolve(), "a", "ort")
    assert (model.max_wait_s, model.exact, model.threads, model.allow_pickle) == (5.0, False, 2, False)
    assert (policy.keys, policy.hosts, policy.origins) == ((KEY,), None, ("https://a.example", "https://b.example"))
    assert (drain, log) == (3.0, False)
    assert app({"models": str(label_bundle)})._bound_deployment.init_args[1].hosts is not None


def test_the_page_shows_commands_and_a_configuration_that_ray_and_fastgen_take(label_bundle, tmp_path, monkeypatch):
    from ray.serve.schema import ServeDeploySchema

    monkeypatch.chdir(tmp_path)
    for name in ("BUNDLE", "OTHER"):
        (tmp_path / name).symlink_to(label_bundle)
    monkeypatch.setattr("fastgen.cli.ray_serve.checked", lambda model: model)  # there is no GPU here
    page = (REPO / "docs/scale.md").read_text()
    commands = re.findall(r"^serve run fastgen\.cli\.ray_serve:app (.*)$", page, re.MULTILINE)
    shown = [dict(word.split("=", 1) for word in command.split()) for command in commands]
    assert len(shown) == 2
    [text] = [t for t in re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL) if "ray_serve" in t]
    (tmp_path / "keys").write_text(KEY)
    config = ServeDeploySchema.model_validate(yaml.safe_load(text.replace("/shared", str(tmp_path))))
    [application] = config.applications
    assert application.import_path == "fastgen.cli.ray_serve:app"
    built = [app(arguments)._bound_deployment for arguments in (*shown, application.args)]
    assert [deployment.num_replicas for deployment in built] == [2, 8, 8]
    assert [deployment.ray_actor_options["num_gpus"] for deployment in built] == [0, 1, 1]
    assert [model.name for model in built[1].init_args[0]] == ["a", "b"]


class Cluster:
    """Ray on this machine, with one application."""

    def __init__(self, bundle):
        self.bundle, self.serve = bundle, ray.serve
        self.client = httpx.Client(timeout=60, trust_env=False)

    def run(self, **arguments):
        built = app({"models": f"m={self.bundle}", "engine": "ort", "threads": 1, "max-wait": 2, **arguments})
        self.serve.run(built, name="fastgen")

    def ask(self, seed=3, client=None, headers=None, **fields):
        body = {"labels": "red cube", "seed": seed, **fields}
        return (client or self.client).post(PATH, json=body, headers=headers)

    def counts(self, sample, patience_s=10):
        """A counter of both replicas, or of those that requests have met when the time is over: Ray Serve may send one after
        the other to the same. A replica is known by the time of its start."""
        found, end = {}, time.monotonic() + patience_s
        with ThreadPoolExecutor(8) as pool:
            while len(found) < 2:
                for answer in pool.map(lambda _: self.client.get("/metrics"), range(8)):
                    lines = answer.text.splitlines()
                    begin, value = (
                        next(float(line.split()[-1]) for line in lines if line.startswith(name))
                        for name in ("fastgen_start_time_seconds", sample)
                    )
                    found[begin] = value
                if time.monotonic() > end:
                    break
        return list(found.values())

    def replicas(self):
        return [p for p in family() if "ServeReplica" in name_of(p)]


def family():
    return psutil.Process().children(recursive=True)


def name_of(process):
    try:
        return " ".join(process.cmdline())
    except psutil.Error:  # it has ended
        return ""


def pictures(answer):
    return [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]]


@pytest.fixture(scope="module")
def cluster(label_bundle):
    from ray import serve
    from serving_client import http

    listener = http.bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    listener.close()
    with tempfile.TemporaryDirectory(prefix="fg-", dir="/tmp") as folder:  # sockets have short paths
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
        try:
            serve.start(http_options={"port": port})
            cluster = Cluster(label_bundle)
            cluster.client.base_url = f"http://127.0.0.1:{port}"
            cluster.run(replicas=2)
            yield cluster
            started = family()
            serve.shutdown()
        finally:
            ray.shutdown()
        _, left = psutil.wait_procs(started, 20)
    assert not left, [name_of(process) for process in left]


@pytest.fixture(scope="module")
def expected(label_bundle, tmp_path_factory):
    """Seed -> the bytes of `fastgen generate`."""
    files = {}

    def get(seed, **fields):
        key = (seed, *fields.items())
        if key not in files:
            task = ImageTask(seed, labels=("red cube",), **fields)
            [files[key]] = expected_files(label_bundle, "ort", [task], tmp_path_factory.mktemp("expected"), threads=1)
        return files[key]

    return get


@pytest.mark.slow
def test_both_replicas_give_the_bytes_of_generate(cluster, expected):
    seeds = [i % 6 for i in range(48)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(cluster.ask, seeds))
    assert [answer.status_code for answer in answers] == [200] * 48
    assert all(pictures(answer) == [expected(seed)] for seed, answer in zip(seeds, answers, strict=True))
    made = cluster.counts("fastgen_images_total")
    assert len(made) == 2
    assert sum(made) == 48


@pytest.mark.slow
def test_what_another_replica_would_have_to_know_is_refused(cluster):
    for field, value in (("detached", True), ("response_format", "url")):
        answer = cluster.ask(**{field: value})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
        assert "several replicas" in answer.json()["error"]["message"]
    for path in ("/v1/images/jobs/0123456789ab", "/"):
        answer = cluster.client.get(path)
        assert (answer.status_code, "replica" in answer.json()["error"]["message"]) == (404, True)


@pytest.mark.slow
def test_a_website_cannot_use_the_server_through_the_proxy(cluster):
    for headers, code in (({"host": "evil.example"}, "host_not_allowed"), ({"origin": "null"}, "origin_not_allowed")):
        answer = cluster.ask(headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, code)
    assert cluster.client.get("/health/ready").json()["status"] == "ready"


@pytest.mark.slow
def test_events_come_while_the_image_is_made_and_a_client_that_leaves_cancels(cluster):
    body = {"labels": "red cube", "seed": 1, "stream": True, "partial_images": 3, **LONG}
    came = []
    with cluster.client.stream("POST", PATH, json=body) as answer:
        for line in answer.iter_lines():
            if line.startswith("event:"):
                came.append(time.monotonic())
    assert len(came) == 4
    assert came[-1] - came[0] > 0.1
    with cluster.client.stream("POST", PATH, json=body) as answer:
        next(line for line in answer.iter_lines() if line.startswith("event:"))
    wait_for(lambda: 1.0 in cluster.counts('fastgen_requests_total{model="m",outcome="cancelled"'), 20)
    wait_for(lambda: cluster.counts("fastgen_requests_running") == [0, 0], 20)


@pytest.mark.slow
def test_more_than_the_replicas_can_do_is_429_with_the_time_to_come_again(cluster):
    with ThreadPoolExecutor(40) as pool:
        answers = list(pool.map(lambda seed: cluster.ask(seed, **LONG), range(40)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert all(answer.json()["error"]["code"] == "busy" for answer in refused)


@pytest.mark.slow
def test_the_metrics_of_both_replicas_are_among_rays_own(cluster):
    port = ray.nodes()[0]["MetricsExportPort"]

    def made():
        text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
        lines = re.findall(r'^ray_fastgen_images_total\{.*model="m".*replica="(\w+)".* ([\d.]+)$', text, re.MULTILINE)
        return {replica: float(count) for replica, count in lines}

    wait_for(lambda: len(made()) == 2 and all(made().values()), 40)


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_loses_no_client_and_is_replaced(cluster, expected):
    before = {process.pid for process in cluster.replicas()}
    assert len(before) == 2
    orphans = psutil.Process(min(before)).children(recursive=True)
    assert any("spawn_main" in name_of(process) for process in orphans)
    answers, end, killed = [], time.monotonic() + 60, threading.Event()

    def ask(client_number):
        with httpx.Client(base_url=cluster.client.base_url, timeout=60, trust_env=False) as client:
            seed = client_number
            while not (killed.is_set() and recovered()) and time.monotonic() < end:
                answers.append((seed % 6, cluster.ask(seed % 6, client)))
                if answers[-1][1].status_code != 200:
                    time.sleep(0.2)  # as a client does
                seed += 1

    def recovered():
        now = {process.pid for process in cluster.replicas()}
        return len(now) == 2 and now != before and len(cluster.counts("fastgen_images_total", 0.5)) == 2

    with ThreadPoolExecutor(6) as pool:
        clients = [pool.submit(ask, number) for number in range(6)]
        time.sleep(1)
        os.kill(min(before), signal.SIGKILL)
        killed.set()
        for client in clients:
            client.result(120)
    assert time.monotonic() < end
    assert not psutil.wait_procs(orphans, 20)[1]
    statuses = {answer.status_code for _, answer in answers}
    assert statuses <= {200, 429, 500, 502, 503, 504}
    good = [(seed, answer) for seed, answer in answers if answer.status_code == 200]
    assert len(good) > len(answers) / 2
    assert all(pictures(answer) == [expected(seed)] for seed, answer in good)


@pytest.mark.slow
def test_a_new_version_waits_for_running_images_and_one_replica_keeps_jobs(cluster, expected, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(KEY)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(cluster.ask, 5, n=10, **LONG)
        time.sleep(0.2)
        cluster.run(replicas=1, **{"api-key-file": str(keys)})
        assert pictures(running.result(60))[0] == expected(5, **LONG)
    assert cluster.ask().status_code == 401
    key = {"authorization": f"Bearer {KEY}"}
    assert cluster.client.get("/").headers["content-type"].startswith("text/html")
    answer = cluster.ask(headers=key, detached=True)
    job = f"/v1/images/jobs/{answer.json()['id']}"
    assert answer.status_code == 202
    wait_for(lambda: cluster.client.get(job, headers=key).json()["status"] == "done", 30)
    assert cluster.client.get(f"{job}/images/0.png").content == expected(3)
    assert cluster.client.get("/health/ready").json()["status"] == "ready"
