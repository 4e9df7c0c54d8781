"""Batch sizes that fit, jobs that run out of memory, and estimates."""

from __future__ import annotations

import gc
import json
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastgen.engines import memory
from fastgen.engines.batches import Batch
from fastgen.errors import FastgenError
from fastgen.files.store import Folder
from fastgen.generate import estimate, work
from fastgen.generate.decoder import Decoder
from fastgen.generate.job import estimate_job, run_job
from fastgen.generate.job_folder import JobFolder
from fastgen.generate.job_record import Limits
from fastgen.generate.local_work import LocalWork
from fastgen.generate.pipeline import load
from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.shards import Shard


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
    run_job(Run(labels, requests(9), labels.settings()), tmp_path / "whole", batch_size=8)
    seen, said = limit_rows(monkeypatch, labels.engine, 4), []  # guided: two images
    report = run_job(Run(labels, requests(9), labels.settings()), tmp_path / "halved", batch_size=8, say=said.append)
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
        run_job(Run(labels, requests(4), labels.settings()), tmp_path / "out", batch_size=2)
    assert "\n" not in str(error.value)


def test_other_errors_are_not_taken_for_a_lack_of_memory(labels, monkeypatch, tmp_path):
    def fail(network, *inputs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(labels.engine, "run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        run_job(Run(labels, requests(4), labels.settings()), tmp_path / "out", batch_size=2)


class Recorder:
    """A run on a GPU as the job sees it, and its pipeline and engine: starting a batch returns at once."""

    on_gpu, settings, requests = True, None, ()

    def __init__(self, fails_at=()):
        self.log, self.fails_at, self.engine, self.pipeline = [], list(fails_at), self, self
        self.device = "cuda"

    def begin(self, batch, *, decode_batch_size, on_row):
        assert on_row is None  # the bar of a GPU's job follows batches
        if batch.start in self.fails_at and batch.bucket > 2:
            raise MemoryError
        self.log.append(f"start {batch.start}")
        return lambda: self.log.append(f"wait {batch.start}")

    def is_out_of_memory(self, error):
        return isinstance(error, MemoryError)

    def free_memory(self):
        self.log.append("free")


def generated(recorder, batches):
    said = []
    plan = SimpleNamespace(limits=Limits(4, None), sizes=None)
    done = [batch for batch, _ in LocalWork(recorder).pictures(plan, batches, None, said.append)]
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
        array = staticmethod(np.asarray)

        def batch_sizes(self, network):
            return None

        def run(self, network, x):
            images = text.engine.run(network, x)[0]
            images[1] = value
            return (images,)

        def numpy(self, values):
            return values

    x = np.random.default_rng(0).standard_normal((3, *text.spec.space.shape)).astype(np.float32)
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
    assert str(explained.problems[1]).endswith("decoding in fp32 instead failed: no fp32 engine was built")


def test_the_default_batch_is_16_on_a_cpu_or_the_largest_compiled_one(labels, monkeypatch):
    assert estimate.automatic_batch_size(labels, labels.settings()) == 16
    monkeypatch.setattr(labels.engine, "batch_sizes", lambda network: [2, 4, 16])
    assert estimate.automatic_batch_size(labels, labels.settings()) == 8
    assert estimate.automatic_batch_size(labels, labels.settings(guidance_scale=1.0)) == 16
    assert labels.buckets(labels.settings(guidance_interval=(0, 1))) == [2]  # 1 and 8 lack unguided rows
    monkeypatch.setattr(labels.engine, "batch_sizes", lambda network: [3, 16])
    with pytest.raises(FastgenError, match="no batch size for both"):
        labels.buckets(labels.settings(guidance_interval=(0, 1)))


def test_a_resumed_job_keeps_the_batch_size_that_it_began_with(labels, tmp_path):
    run_job(Run(labels, requests(5), labels.settings()), tmp_path / "out", batch_size=2)
    (tmp_path / "out" / "3.png").unlink()
    report = run_job(Run(labels, requests(5), labels.settings()), tmp_path / "out")
    assert report.generated == 2  # the batch of 2 and 3, not all five


def test_an_estimate_counts_batches_and_evaluations_and_writes_nothing(labels, tmp_path):
    found = estimate_job(
        Run(labels, requests(35), labels.settings(scheduler="ddim", num_inference_steps=10)), batch_size=16
    )
    assert [b.bucket for b in found.batches] == [12, 12, 12]
    assert (found.images, found.evaluations) == (35, 10)
    assert found.seconds > 0
    assert found.memory > 50 * 2**20  # numpy alone takes that
    assert "35 images in 3 batches (3 of 12; padding 2.8%), 10 evaluations each: about" in str(found)
    assert not list(tmp_path.iterdir())


def test_an_estimate_is_near_what_the_job_takes(labels, tmp_path):
    settings = labels.settings(scheduler="ddim", num_inference_steps=20)
    expected = estimate_job(Run(labels, requests(32), settings), batch_size=8).seconds
    report = run_job(Run(labels, requests(32), settings), tmp_path / "out", batch_size=8)
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


class Card:
    """A GPU of `total` bytes: a library takes `start` bytes when it is first used, a network `fixed` and `row` for each row.
    As an engine it keeps what it had at its peak until that is released."""

    device = "cuda"

    def __init__(self, total, *, row, fixed=0, start=0):
        self.total, self.row, self.fixed, self.start = total, row, fixed, start
        self.loaded = self.held = 0
        self.probed = []

    def free(self):
        return self.total - self.loaded - self.held

    def probe(self, network, rows):
        self.probed.append(rows)
        self.loaded = self.start
        self.held = max(self.held, self.fixed + rows * self.row)
        if self.free() < 0:
            self.held = 0
            raise MemoryError("out of memory")

    def synchronize(self):
        pass

    def release_memory(self):
        self.held = 0

    def is_out_of_memory(self, error):
        return isinstance(error, MemoryError)


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda engine: engine.free())
    return Card


@pytest.mark.parametrize("start", [0, 10**9, 4 * 10**9])
@pytest.mark.parametrize("fixed", [0, 2 * 10**8])
def test_what_libraries_take_when_they_are_first_used_is_not_memory_of_the_rows(card, start, fixed):
    engine = card(16 * 10**9, row=10**8, fixed=fixed, start=start)
    cost = memory.measure_memory(engine, "unet")
    assert cost == memory.Memory(fixed, 10**8)
    rows = cost.rows_in(estimate.USABLE * engine.free())
    engine.probe("unet", rows)  # fits
    assert rows == int((0.8 * (16 * 10**9 - start) - fixed) / 10**8)


@pytest.mark.parametrize(("total", "rows"), [(9, 9), (7, 2), (3, 2), (1, 1), (0.5, 1)])
def test_memory_that_runs_out_while_it_is_measured_limits_the_batch(card, total, rows):
    engine = card(int(total * 10**8), row=10**8)
    found = memory.measure_memory(engine, "unet").rows_in(total * 10**8)
    assert found == rows
    assert engine.held == 0


def test_other_errors_while_measuring_are_errors(card):
    engine = card(10**9, row=1)
    engine.is_out_of_memory = lambda error: False
    engine.total = 0
    with pytest.raises(MemoryError):
        memory.measure_memory(engine, "unet")


def on_a_gpu(pipeline, monkeypatch, total, costs):
    """The pipeline as if its engine ran on a GPU of so many free bytes, where networks take `costs`."""
    monkeypatch.setattr(pipeline, "on_gpu", True)
    monkeypatch.setattr(pipeline, "memory", costs)
    monkeypatch.setattr(memory, "free_memory", lambda engine: total)


def test_the_unet_gets_what_the_decoder_that_runs_beside_it_leaves(text, monkeypatch):
    costs = {"vae_decoder": memory.Memory(0, 100.0), "unet": memory.Memory(0, 10.0)}
    monkeypatch.setattr(text.engine, "decode_pixels", 16 * text.spec.space.pixels)
    on_a_gpu(text, monkeypatch, 4000, costs)
    assert estimate.decode_batch_size(text) == 10  # a quarter of 4000
    assert estimate.automatic_batch_size(text, text.settings(guidance_scale=1.0)) == 128
    assert estimate.automatic_batch_size(text, text.settings(guidance_scale=2.0)) == (3200 - 1000) // 20
    on_a_gpu(text, monkeypatch, 10**6, costs)
    assert estimate.decode_batch_size(text) == 16  # the engine's own
    on_a_gpu(text, monkeypatch, 10, costs)
    assert estimate.decode_batch_size(text) == estimate.automatic_batch_size(text, text.settings()) == 1


def test_a_network_is_measured_once_per_pipeline(text, monkeypatch):
    measured = []
    on_a_gpu(text, monkeypatch, 10**6, {})
    monkeypatch.setattr(memory, "measure_memory", lambda e, name: measured.append(name) or memory.Memory(0, 1.0))
    for _ in range(2):
        estimate.automatic_batch_size(text, text.settings())
        estimate.decode_batch_size(text)
    assert measured == ["vae_decoder", "unet"]


def decoded(monkeypatch, pipeline):
    """The numbers of images that the VAE decodes together."""
    run, seen = pipeline.engine.run, []

    def noted(network, *inputs):
        if network == "vae_decoder":
            seen.append(len(inputs[0]))
        return run(network, *inputs)

    monkeypatch.setattr(pipeline.engine, "run", noted)
    return seen


def test_a_resumed_job_decodes_as_many_together_as_it_began_with(text, monkeypatch, tmp_path):
    asked = [Request(str(i), f"{i}.png", prompt="a red dragon", seed=i) for i in range(8)]
    monkeypatch.setattr(work, "decode_batch_size", lambda pipeline: 2)
    seen = decoded(monkeypatch, text)
    run_job(Run(text, asked, text.settings()), tmp_path, batch_size=4)
    assert seen == [2, 2, 2, 2]
    monkeypatch.setattr(work, "decode_batch_size", lambda pipeline: 3)  # there is more memory now
    (tmp_path / "5.png").unlink()
    seen.clear()
    run_job(Run(text, asked, text.settings()), tmp_path)
    assert seen == [2, 2]
    seen.clear()
    text.generate(prompts=["a red dragon"] * 4, batch_size=4)  # a job leaves nothing behind in the pipeline
    assert seen == [4]


def test_a_resumed_job_of_an_engine_with_sizes_of_its_own_runs_the_same_batches(labels, monkeypatch, tmp_path):
    monkeypatch.setattr(labels.engine, "batch_sizes", lambda network: [8, 64, 128])
    monkeypatch.setattr(labels.engine, "static_shapes", True)
    seen, run = [], labels.engine.run
    monkeypatch.setattr(labels.engine, "run", lambda name, *x: seen.append(len(x[0])) or run(name, *x))
    settings = labels.settings(num_inference_steps=1, scheduler="ddim")
    run_job(Run(labels, requests(63), settings), tmp_path)  # fewer than the 64 that run together
    assert seen == [128]
    (tmp_path / "5.png").unlink()
    assert run_job(Run(labels, requests(63), settings), tmp_path).generated == 63
    assert seen == [128, 128]


class MissesIt(Folder):
    """The folder of a process that looks for job.json just before another one writes it."""

    looked = 0

    def exists(self, name):
        self.looked += name == "job.json"
        return super().exists(name) and not (name == "job.json" and self.looked <= 2)


def test_shards_that_begin_together_run_the_batches_of_the_one_that_was_first(labels, monkeypatch, tmp_path):
    """Each measures the memory of its own card; job.json is written by one of them."""
    settings, claim = labels.settings(), JobFolder.claim
    run_job(Run(labels, requests(7), settings), tmp_path / "whole", batch_size=2)

    def late(self, *arguments, **options):
        out = self.store.path
        if not (out / "job.json").exists():  # the other one was a little sooner
            monkeypatch.setattr(work, "automatic_batch_size", lambda *a: 2)
            monkeypatch.setattr(JobFolder, "claim", claim)
            run_job(Run(labels, requests(7), settings), out, shard=Shard(1, 2))
            self = replace(self, store=MissesIt(out), files=[])  # nor has it seen the other one's files
        return claim(self, *arguments, **options)

    monkeypatch.setattr(work, "automatic_batch_size", lambda *a: 3)
    monkeypatch.setattr(JobFolder, "claim", late)
    report = run_job(Run(labels, requests(7), settings), tmp_path / "out", shard=Shard(2, 2))
    assert report.complete
    assert json.loads((tmp_path / "out" / "job.json").read_text())["limits"]["batch"] == 2
    assert np.array_equal(pixels(tmp_path / "out"), pixels(tmp_path / "whole"))


def test_a_job_of_an_older_version_goes_on_with_what_fits_now(text, monkeypatch, tmp_path):
    asked = [Request(str(i), f"{i}.png", prompt="a red dragon", seed=i) for i in range(4)]
    run_job(Run(text, asked, text.settings()), tmp_path, batch_size=4)
    record = json.loads((tmp_path / "job.json").read_text())
    assert record.pop("limits") == {"batch": 4, "decode": 64}
    (tmp_path / "job.json").write_text(json.dumps(record))
    (tmp_path / "1.png").unlink()
    assert run_job(Run(text, asked, text.settings()), tmp_path).generated == 4


@pytest.mark.parametrize(
    ("batch", "expected"), [(119, [16] * 8), (128, [16] * 8), (64, [16] * 4), (7, [7]), (16, [16])]
)
def test_an_engine_that_compiles_per_size_decodes_large_batches_in_one_size(text, monkeypatch, batch, expected):
    seen = []

    class Compiled:
        device, dtype, static_shapes, decode_pixels, xp = "cpu", "fp16", True, 16 * text.spec.space.pixels, np
        array = staticmethod(np.asarray)

        def batch_sizes(self, network):
            return None

        def padded(self, rows, size):
            return type(text.engine).padded(self, rows, size)

        def run(self, network, x):
            seen.append(len(x))
            return (np.repeat(x[:, :3].mean((2, 3))[:, :, None, None], 2, 2),)

    x = np.random.default_rng(0).standard_normal((batch, *text.spec.space.shape)).astype(np.float32)
    images = Decoder(Compiled(), text.spec).decode(x)
    assert seen == expected
    np.testing.assert_allclose(images[:, :, 0, 0], x[:, :3].mean((2, 3)) / text.spec.space.scaling_factor, atol=1e-6)


def test_an_error_without_words_ends_a_job_in_one_line(labels, monkeypatch, tmp_path):
    def fail(network, *inputs):
        raise MemoryError

    monkeypatch.setattr(labels.engine, "run", fail)
    with pytest.raises(FastgenError, match=r"batch_size is 1 already: MemoryError$"):
        run_job(Run(labels, requests(2), labels.settings()), tmp_path / "out", batch_size=1)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["cuDNN", "CUDA", "cuBLAS"],
)
def test_what_cuda_s_libraries_say_when_memory_runs_out_halves_the_batch(label_model, monkeypatch, tmp_path, error):
    pipeline = load(label_model, "eager")
    run, said = pipeline.engine.run, []

    def limited(network, *inputs):
        if len(inputs[0]) > 2:
            raise error
        return run(network, *inputs)

    monkeypatch.setattr(pipeline.engine, "run", limited)
    report = run_job(Run(pipeline, requests(4), pipeline.settings()), tmp_path / "out", batch_size=2, say=said.append)
    assert (report.errors, said) == ({}, ["cpu: out of memory with a batch of 2; going on with 1"])


def test_a_batch_that_ran_out_of_memory_is_gone_before_the_next_is_tried(monkeypatch):
    """With what caused the error: tracebacks hold on to tensors."""
    recorder, held = Recorder(), []

    class Tensors:
        pass

    def begin(batch, **options):
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        if batch.bucket > 2:
            try:
                raise RuntimeError(str(tensors))
            except RuntimeError as cause:
                raise MemoryError("no room") from cause
        return lambda: None

    monkeypatch.setattr(recorder, "begin", begin)
    alive = []
    monkeypatch.setattr(recorder, "free_memory", lambda: alive.append(held[0]()))
    gc.disable()
    try:
        generated(recorder, [Batch(0, 4, 4)])
    finally:
        gc.enable()
    assert alive == [None]


def test_memory_that_only_the_collector_finds_is_free_for_the_next_batch(labels):
    class Cycle:
        pass

    cycle = Cycle()
    cycle.itself = cycle
    held = weakref.ref(cycle)
    gc.disable()
    try:
        del cycle
        assert held() is not None
        labels.free_memory()
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_a_batch_size_is_found_from_free_memory_and_never_too_large(label_model):
    pipeline = load(label_model, "eager", device="cuda", dtype="fp16")
    assert 1 <= estimate.automatic_batch_size(pipeline, pipeline.settings()) <= estimate.MAX_BATCH
