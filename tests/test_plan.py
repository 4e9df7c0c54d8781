"""Batch sizes that fit, jobs that run out of memory, and estimates."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image

from fastgen.buckets import Batch
from fastgen.errors import FastgenError
from fastgen.jobs import job, plan
from fastgen.jobs.job import estimate_job, run_job
from fastgen.pictures import Decoder
from fastgen.pipeline import load
from fastgen.requests import Request


@pytest.fixture
def labels(label_bundle):
    return load(label_bundle, "ort")


@pytest.fixture
def text(text_bundle):
    return load(text_bundle, "ort")


def requests(count):
    return [Request(str(i), f"{i}.png", labels=("red cube",)) for i in range(count)]


def pixels(out):
    return [np.asarray(Image.open(f)).astype(int) for f in sorted(out.glob("[0-9]*.png"), key=lambda f: int(f.stem))]


def limit_rows(monkeypatch, engine, rows):
    """An engine whose memory holds so many rows of the UNet."""
    run, seen = engine.run, []

    def limited(network, *inputs):
        if network == "unet" and len(inputs[0]) > rows:
            raise MemoryError(f"cannot allocate {len(inputs[0])} rows")
        seen.append(len(inputs[0]))
        return run(network, *inputs)

    monkeypatch.setattr(engine, "run", limited)
    return seen


def test_out_of_memory_halves_the_batch_and_goes_on_and_says_so(labels, monkeypatch, tmp_path):
    run_job(labels, requests(9), tmp_path / "whole", labels.settings(), batch_size=8)
    seen, said = limit_rows(monkeypatch, labels.engine, 4), []  # guided: two images
    report = run_job(labels, requests(9), tmp_path / "halved", labels.settings(), batch_size=8, say=said.append)
    assert (report.generated, report.errors) == (9, {})
    assert max(seen) == 4
    assert said == [
        "cpu: out of memory with a batch of 5; going on with 3",
        "cpu: out of memory with a batch of 3; going on with 2",
    ]
    for one, other in zip(pixels(tmp_path / "whole"), pixels(tmp_path / "halved"), strict=True):
        assert np.abs(one - other).max() <= 1


def test_one_image_that_does_not_fit_ends_the_job_in_one_line(labels, monkeypatch, tmp_path):
    limit_rows(monkeypatch, labels.engine, 1)
    with pytest.raises(
        FastgenError, match="cpu: out of memory with a batch of 1, and batch_size is 1 already"
    ) as error:
        run_job(labels, requests(4), tmp_path / "out", labels.settings(), batch_size=2)
    assert "\n" not in str(error.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(labels, monkeypatch, tmp_path):
    def fail(network, *inputs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(labels.engine, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_job(labels, requests(4), tmp_path / "out", labels.settings(), batch_size=2)


class Recorder:
    """A pipeline on a GPU as the job sees it: starting a batch returns at once."""

    on_gpu = True

    def __init__(self, fails_at=()):
        self.log, self.fails_at, self.engine = [], list(fails_at), self
        self.device = "cuda"

    def begin(self, batch):
        if batch.start in self.fails_at and batch.bucket > 2:
            raise MemoryError
        self.log.append(f"start {batch.start}")
        return lambda: self.log.append(f"wait {batch.start}")

    def is_out_of_memory(self, error):
        return isinstance(error, MemoryError)

    def free_memory(self):
        self.log.append("free")

    def buckets(self, settings):
        return None


class Unguided:
    guided = False


def generated(recorder, batches):
    said = []
    done = [batch for batch, _ in job._generated(recorder, Unguided(), batches, recorder.begin, said.append)]
    return done, said


def test_on_a_gpu_the_next_batch_is_queued_before_the_last_one_is_waited_for():
    recorder = Recorder()
    batches = [Batch(i, i + 1, 1) for i in range(4)]
    assert generated(recorder, batches) == (batches, [])
    assert recorder.log == ["start 0", "start 1", "wait 0", "start 2", "wait 1", "start 3", "wait 2", "wait 3"]


def test_batches_in_flight_are_finished_before_memory_is_freed():
    recorder = Recorder(fails_at=[4])
    done, said = generated(recorder, [Batch(0, 4, 4), Batch(4, 8, 4), Batch(8, 12, 4)])
    assert recorder.log[:3] == ["start 0", "wait 0", "free"]
    assert [i for b in done for i in range(b.start, b.stop)] == list(range(12))
    assert {b.bucket for b in done[1:]} == {2}
    assert said == ["cuda: out of memory with a batch of 4; going on with 2"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 3.0])
def test_broken_or_flat_pictures_are_decoded_again_in_fp32(text, value):
    class Broken:
        """The same engine in half precision, whose decoder breaks the second image."""

        device, dtype, static_shapes, decode_pixels, xp = "cpu", "fp16", False, 2**16, np

        def batch_sizes(self, network):
            return None

        def run(self, network, x):
            images = text.engine.run(network, x)[0]
            images[1] = value
            return (images,)

        def numpy(self, values):
            return values

    x = np.random.default_rng(0).standard_normal((3, *text.spec.latent_shape)).astype(np.float32)
    expected = text.decoder.start(x)()
    assert expected.problems == [None] * 3
    fixed = Decoder(Broken(), text.spec, lambda: text.engine).start(x)()
    assert fixed.problems == [None] * 3
    assert np.array_equal(fixed.pixels, expected.pixels)

    unfixed = Decoder(Broken(), text.spec).start(x)()
    assert unfixed.problems[0] is None
    assert unfixed.problems[1]

    def no_engine():
        raise FastgenError("no fp32 engine was built")

    explained = Decoder(Broken(), text.spec, no_engine).start(x)()
    assert explained.problems[1].endswith("decoding in fp32 instead failed: no fp32 engine was built")


def test_the_default_batch_is_16_on_a_cpu_or_the_largest_compiled_one(labels, monkeypatch):
    assert plan.automatic_batch_size(labels, labels.settings()) == 16
    monkeypatch.setattr(labels.engine, "batch_sizes", lambda network: [2, 4, 16])
    assert plan.automatic_batch_size(labels, labels.settings()) == 8
    assert plan.automatic_batch_size(labels, labels.settings(guidance_scale=1.0)) == 16
    assert labels.buckets(labels.settings(guidance_interval=(0, 1))) == [2]  # 1 and 8 lack unguided rows
    monkeypatch.setattr(labels.engine, "batch_sizes", lambda network: [3, 16])
    with pytest.raises(FastgenError, match="no batch size for both"):
        labels.buckets(labels.settings(guidance_interval=(0, 1)))


def test_a_resumed_job_keeps_the_batch_size_that_it_began_with(labels, tmp_path):
    run_job(labels, requests(5), tmp_path / "out", labels.settings(), batch_size=2)
    (tmp_path / "out" / "3.png").unlink()
    report = run_job(labels, requests(5), tmp_path / "out", labels.settings())
    assert report.generated == 2  # the batch of 2 and 3, not all five


def test_an_estimate_counts_batches_and_evaluations_and_writes_nothing(labels, tmp_path):
    found = estimate_job(labels, requests(35), labels.settings(scheduler="ddim", num_inference_steps=10), batch_size=16)
    assert [b.bucket for b in found.batches] == [12, 12, 12]
    assert (found.images, found.evaluations) == (35, 10)
    assert found.seconds > 0
    assert found.memory > 50 * 2**20  # numpy alone takes that
    assert "35 images in 3 batches (3 of 12; padding 2.8%), 10 evaluations each: about" in str(found)
    assert not list(tmp_path.iterdir())


def test_an_estimate_is_near_what_the_job_takes(labels, tmp_path):
    settings = labels.settings(scheduler="ddim", num_inference_steps=20)
    expected = estimate_job(labels, requests(32), settings, batch_size=8).seconds
    report = run_job(labels, requests(32), tmp_path / "out", settings, batch_size=8)
    assert expected / 4 < report.seconds < expected * 6 + 1  # tiny networks on a busy machine


def test_half_as_long_for_a_shard(fastgen_process, label_bundle, requests_files, tmp_path):
    arguments = ["generate", requests_files["labels"], "--model", label_bundle, "--batch-size", 1, "--dry-run"]
    done = fastgen_process(*arguments, "--shard", "1/2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("shard 1/2: 2 images in 2 batches")
    assert not (tmp_path / "out").exists()


def test_graphs_need_a_gpu(label_bundle):
    with pytest.raises(FastgenError, match="CUDA graphs need a GPU"):
        load(label_bundle, "ort", graphs=True)


@pytest.mark.gpu
def test_a_batch_size_is_found_from_free_memory_and_never_too_large(label_model):
    pipeline = load(label_model, "eager", device="cuda", dtype="fp16")
    assert 1 <= plan.automatic_batch_size(pipeline, pipeline.settings()) <= plan.MAX_BATCH
