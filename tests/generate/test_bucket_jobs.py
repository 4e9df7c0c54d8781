"""A job writes the same files into a bucket as on the disk, and goes on there after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import fsspec
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from s3_server import s3  # noqa: F401

from fastgen.errors import FastgenError, InputError
from fastgen.files import bucket as bucket_module
from fastgen.files.bucket import Bucket
from fastgen.files.places import Url
from fastgen.generate.job import run_job
from fastgen.generate.pipeline import load
from fastgen.generate.requests import read_requests
from fastgen.generate.run import Run
from fastgen.generate.shards import Shard

IMAGES = 7


@pytest.fixture(scope="module")
def pipeline(label_bundle):
    return load(label_bundle, "ort")


@pytest.fixture(scope="module")
def requests_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("requests") / "requests.json"
    names = ["red cube", "blue sphere", "gray cylinder"]
    rows = [{"image_name": f"deep {i % 2}/é#{i}.png", "labels": names[: 1 + i % 3]} for i in range(IMAGES)]
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="module")
def job(pipeline, requests_file):
    """A function that runs the job into a folder."""

    def run(out, *, strip=None, **options):
        run = Run(pipeline, read_requests(requests_file), pipeline.settings(), strip=strip)
        return run_job(run, out, batch_size=2, progress=False, **options)

    return run


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """Files of the job on the disk but for job.json, with strips and a grid."""
    out = tmp_path_factory.mktemp("whole")
    job(out, strip=(500, 0), grid=3)
    found = {f.relative_to(out).as_posix(): f.read_bytes() for f in out.rglob("*") if f.is_file()}
    assert len(found) == 2 * IMAGES + 5
    return {name: data for name, data in found.items() if name != "job.json"}


@pytest.fixture
def place(s3):  # noqa: F811
    """A new folder in S3: its URL, and a function that reads its files but for job.json."""
    name = s3.bucket()

    def files() -> dict[str, bytes]:
        return {file: data for file, data in s3.files(name, "my/out").items() if file != "job.json"}

    return Url(f"s3://{name}/my/out"), files


def after(count: int, written: list[str], call):
    """A function that calls `call` once, when so many files are written."""
    left = [call]
    return lambda name: len(written) >= count and left and left.pop()()


@pytest.fixture
def writes(monkeypatch):
    """Names of the files that are written into buckets, in order; and a list of functions, each called before a write."""
    names, before = [], []
    write = Bucket.write

    def recorded(self, name, data):
        for call in before:
            call(name)
        write(self, name, data)
        names.append(name)

    monkeypatch.setattr(Bucket, "write", recorded)
    return names, before


@pytest.mark.parametrize("protocol", ["s3", "memory"])
def test_a_bucket_gets_the_files_of_the_disk_and_the_manifest_last(protocol, job, whole, writes, request):
    if protocol == "s3":
        url, files = request.getfixturevalue("place")
    else:
        url, fs = Url(f"memory://{id(whole)}/out"), fsspec.filesystem("memory")
        files = lambda: {p.partition("/out/")[2]: fs.cat_file(p) for p in fs.find(url[8:]) if "job.json" not in p}  # noqa: E731
    report = job(url, strip=(500, 0), grid=3)
    assert (report.generated, str(report.folder)) == (IMAGES, url)
    assert files() == whole
    assert writes[0][-1] == "manifest.jsonl"
    assert writes[0].index("job.json") == len(writes[0]) - 2
    writes[0].clear()
    assert job(url, strip=(500, 0), grid=3).generated == 0
    assert not any(re.search(r"\d\.png", name) for name in writes[0])
    assert files() == whole


def test_a_bucket_is_listed_once_when_a_job_continues(s3, place, job, monkeypatch):  # noqa: F811
    url, files = place
    job(url)
    before = files()
    for name in ("deep 0/é#4.png", "manifest.jsonl"):
        s3.client.delete_object(Bucket=url.split("/")[2], Key=f"my/out/{name}")
    listings, find = [], Bucket._find
    monkeypatch.setattr(Bucket, "_find", lambda self, **options: listings.append(options) or find(self, **options))
    assert job(url).generated == 2  # the batch of the image that is gone
    assert files() == before
    assert listings == [{}, {"prefix": "shard-"}]


def test_other_files_and_other_jobs_are_refused(s3, place, job, pipeline, requests_file):  # noqa: F811
    url, _ = place
    bucket = url.split("/")[2]
    s3.client.put_object(Bucket=bucket, Key="my/out/deep 1/é#1.png", Body=b"mine")
    with pytest.raises(InputError, match=f"{url}: 1 of the files to write exist already, such as é#1.png, but no job"):
        job(url)
    s3.client.delete_object(Bucket=bucket, Key="my/out/deep 1/é#1.png")
    job(url)
    for name, words in (("deep 1/é#1.png", "is no image of this job"), ("contact_sheet.png", "is not written by")):
        kept = s3.files(bucket, "my/out")
        s3.client.put_object(Bucket=bucket, Key=f"my/out/{name}", Body=b"")
        with pytest.raises(InputError, match=f"{url}/{name}: .*{words}".replace("is not", "(exists and is not)?")):
            job(url)
        s3.client.put_object(Bucket=bucket, Key=f"my/out/{name}", Body=kept[name])
    other = Run(pipeline, read_requests(requests_file), pipeline.settings(seed=9))
    with pytest.raises(InputError, match=f"{url}: holds another job: seed is 0 there and 9 now"):
        run_job(other, url, batch_size=2, progress=False)


def test_shards_in_a_bucket_make_the_whole_job(place, job, whole):
    url, files = place
    assert not job(url, strip=(500, 0), grid=3, shard=Shard(2, 2)).complete
    assert "shard-2-of-2.json" in files()
    assert "manifest.jsonl" not in files()
    assert job(url, strip=(500, 0), grid=3, shard=Shard(1, 2)).complete
    assert files() == whole
    report = job(url, strip=(500, 0), grid=3, shard=Shard(2, 2))
    assert (report.complete, report.generated) == (True, 0)
    assert files() == whole


def test_shards_that_end_at_the_same_time_merge_in_a_bucket(place, job, whole):
    """Each in a thread of its own; a record that is gone stands in the manifest."""
    url, files = place
    job(url, strip=(500, 0), grid=3)
    for _ in range(3):
        job_of = partial(job, url, strip=(500, 0), grid=3)
        store = Bucket.open(url)
        for name in ("manifest.jsonl", "deep 0/é#0.png", "deep 0/é#2.png", "deep 0/é#4.png"):
            store.delete(name)
        with ThreadPoolExecutor(3) as pool:
            reports = list(pool.map(lambda i, run=job_of: run(shard=Shard(i, 3)), (1, 2, 3)))
        assert any(report.complete for report in reports)
        assert files() == whole


def test_a_permission_that_is_lost_ends_the_job_and_the_same_command_continues(s3, place, job, whole, writes):  # noqa: F811
    url, files = place
    bucket = url.split("/")[2]
    writes[1].append(after(3, writes[0], lambda: s3.deny(bucket, "PutObject")))
    with pytest.raises(FastgenError, match=rf"{url}/.*\.png: cannot be written: no permission: ") as caught:
        job(url, strip=(500, 0), grid=3)
    assert caught.value.exit_code == 1
    writes[1].clear()
    s3.allow(bucket)
    there = files()
    assert 0 < len(there) < len(whole)
    assert there.items() <= whole.items()
    job(url, strip=(500, 0), grid=3)
    assert files() == whole


def refuse(path: str) -> None:
    raise PermissionError("Forbidden")


def fresh() -> None:
    """fsspec keeps a connection for each set of arguments, and the endpoint is none of them."""
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def _reconnect():
    fresh()
    yield
    fresh()


@pytest.mark.usefixtures("_reconnect")
def test_an_endpoint_that_goes_down_ends_the_job_and_the_same_command_continues(place, job, whole, writes, monkeypatch):
    url, files = place
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)  # the same buckets behind another port
    server.start()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        writes[1].append(after(3, writes[0], server.stop))
        with pytest.raises(FastgenError, match=rf"{url}/.*\.png: cannot be written: Could not connect") as caught:
            job(url, strip=(500, 0), grid=3)
    assert caught.value.exit_code == 1
    writes[1].clear()
    assert files().items() <= whole.items()
    fresh()
    job(url, strip=(500, 0), grid=3)
    assert files() == whole


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_killed_process_leaves_whole_images_and_the_same_command_continues(
    place, label_bundle, requests_file, command, whole
):
    url, files = place
    words = ["generate", requests_file, "--model", label_bundle, "--engine", "ort", "--batch-size", 2]
    line, environment = command(*words, "--strip", "500,0", "--grid=3", "--out", url)
    environment["FSSPEC_S3_ENDPOINT_URL"] = environment.pop("AWS_ENDPOINT_URL")  # the user's fsspec settings count
    with subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_for(files)
        os.kill(process.pid, signal.SIGKILL)
    there = files()
    assert "manifest.jsonl" not in there
    assert there.items() <= whole.items()
    images = len([name for name in there if name.startswith("deep")])
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=True)
    generated = int(re.search(rf"^{url}: {IMAGES} images, (\d) generated", done.stdout)[1])
    assert IMAGES - images <= generated < IMAGES + 1
    assert files() == whole


@pytest.fixture
def single(fastgen, label_bundle):
    """Run `fastgen generate` for one image -> (exit code, stdout, stderr)."""
    words = ["generate", "--labels", "red cube", "--model", label_bundle, "--engine", "ort"]
    return lambda out, *more: fastgen(*words, "--out", out, *more)


def test_a_single_image_goes_into_a_bucket(s3, place, single, job, tmp_path):  # noqa: F811
    url, files = place
    bucket = url.split("/")[2]
    assert single(tmp_path / "x.png")[0] == 0
    for _ in range(2):  # its own earlier image is replaced
        code, out, _ = single(f"{url}/x.png")
        assert (code, out.split(" in ")[0]) == (0, f"{url}/x.png: 1 image")
        assert files() == {"x.png": (tmp_path / "x.png").read_bytes()}
    s3.client.put_object(Bucket=bucket, Key="my/notes.png", Body=b"mine")
    url_of = f"s3://{bucket}/my"
    refused = single(f"{url_of}/notes.png")
    assert refused[0] == 2
    assert refused[2] == (
        f"fastgen: error: --out {url_of}/notes.png: exists and is not a generated image; choose another name\n"
    )
    assert single(f"s3://{bucket}.png")[2].endswith(f"has no file's name, expected s3://{bucket}.png/x.png\n")
    assert "give s3://b/x.png, or a folder" in single("s3://b/x.jpg")[2]
    job(Url(f"{url_of}/job"))
    image = f"{url_of}/job/deep 1/é#1.png"
    code, _, error = single(image)
    assert (code, error) == (2, f"fastgen: error: --out {image}: is the image of a job; choose another name\n")


@pytest.mark.usefixtures("_reconnect")
def test_a_bucket_that_cannot_be_opened_is_one_line(s3, place, single, monkeypatch, fastgen_process, tmp_path):  # noqa: F811
    url, _ = place
    bucket = url.split("/")[2]

    def refused(out: str, words: str) -> None:
        start = time.monotonic()
        code, _, error = single(out)
        assert code == 2
        assert re.fullmatch(rf"fastgen: error: --out {out}: {words}[^\n]*\n", error), error
        assert len(error) <= 300
        assert "hidden-secret" not in error
        assert time.monotonic() - start < bucket_module.ANSWER_S + 2

    refused("s3://no-such-bucket/x", "there is no bucket no-such-bucket; create it")
    refused("gs://bucket/x", 'a package is missing: pip install "gcsfs>=')
    refused("az://bucket/x", 'a package is missing: pip install "adlfs>=')
    s3.deny(bucket, "GetObject", "HeadObject")  # moto has an action of its own for HEAD
    refused(url, "cannot be read: no permission: ")
    s3.allow(bucket)
    s3.deny(bucket, "PutObject")
    with monkeypatch.context() as patch:  # a policy for a folder alone forbids to look at the bucket
        info = s3fs.S3FileSystem.info
        patch.setattr(s3fs.S3FileSystem, "info", lambda fs, path: info(fs, path) if "/" in path else refuse(path))
        code, _, error = single(url)
    assert (code, error.count("\n")) == (2, 1)
    assert f"{url}/job.json: cannot be written: no permission: " in error
    with monkeypatch.context() as patch:
        fresh()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.delenv(name)
        patch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
        refused(url, "cannot be read: Unable to locate credentials")
    with monkeypatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as silent:
        fresh()
        patch.setattr(bucket_module, "ANSWER_S", 1)
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*silent.getsockname()))
        refused(url, "no answer within 1 s; check the network")
    done = fastgen_process("generate", "--labels", "red cube", "--out", url, blocked=["s3fs"], cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(r'fastgen: error: --out s3://.*: a package is missing: pip install "s3fs>=.*"\n', done.stderr)
    assert not any(tmp_path.iterdir())


def test_a_url_on_this_machine_is_a_path(single, tmp_path):
    assert single(f"file://{tmp_path}/a/x.png")[0] == 0
    assert [path.name for path in Path(tmp_path, "a").iterdir()] == ["x.png"]
