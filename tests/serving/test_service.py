"""The service: pictures with the bytes of `generate`, and what happens to them when a worker fails."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time

import pytest
from served import (
    DIES,
    NOT_FINITE,
    RAISES,
    asks,
    ended,
    expected_files,
    faulty_worker,
    serving,
    slow_worker,
    until,
    without_torch,
)

from fastgen.errors import InputError
from fastgen.serving.errors import ApiError

pytest.importorskip("prometheus_client")
pytest.importorskip("onnxruntime")

SOLVERS = ("ddim", "dpmpp-2m", "ddpm", "unipc", "pndm", "euler-ancestral")
STEPS = (1, 2, 3, 5, 10)
NAMES = ("gray cube", "red cube", "blue sphere", "green cylinder", "cyan sphere")


def random_requests(count, seed):
    rng = random.Random(seed)
    for _ in range(count):
        steps = rng.choice(STEPS)
        interval = (0, max(1, steps // 2)) if rng.random() < 0.3 and steps > 1 else None
        yield asks(
            "m", seed=rng.randrange(2**63), labels=tuple(rng.sample(NAMES, rng.randint(1, 3))), scheduler=rng.choice(SOLVERS),
            num_inference_steps=steps, guidance_scale=rng.choice([None, 1.0, 1.5, 3.0]), guidance_interval=interval,
            normalize=rng.choice(["clamp", "min-max"]), previews=rng.choice([0, 0, 3]),
        )  # fmt: skip


@pytest.mark.parametrize("engine", ["ort", "openvino"])
def test_pictures_that_share_steps_have_the_bytes_of_generate(label_bundle, tmp_path, engine):
    pytest.importorskip("openvino" if engine == "openvino" else "onnxruntime")
    requests = list(random_requests(24, seed=5))

    async def main():
        async with serving(("m", label_bundle), engine=engine) as service:
            assert service.models["m"].info.exact
            jobs, rng = [], random.Random(6)
            for request in requests:
                jobs.append(service.submit(request))
                await asyncio.sleep(rng.random() * 0.02)
                if rng.random() < 0.2:
                    service.cancel(service.submit(asks("m", seed=rng.randrange(2**40), num_inference_steps=10)).id)
            return [(await ended(job)).images[0] for job in jobs]

    images = asyncio.run(main())
    files = expected_files(label_bundle, engine, [request.task for request in requests], tmp_path)
    for image, file, request in zip(images, files, requests, strict=True):
        assert image.error is None, image.error
        assert image.data == file, request.task
        assert image.row == image.rows > 0
        assert image.previews <= request.task.previews
    assert any(image.previews for image in images)


@pytest.mark.slow
def test_a_request_for_n_images_has_seeds_in_a_row(label_bundle):
    async def main():
        async with serving(("m", label_bundle), engine="ort") as service:
            together = await ended(service.submit(asks("m", n=3, seed=7, num_inference_steps=2)))
            alone = [await ended(service.submit(asks("m", seed=seed, num_inference_steps=2))) for seed in (7, 8, 9)]
            return together, alone

    together, alone = asyncio.run(main())
    assert [image.seed for image in together.images] == [7, 8, 9]
    assert [image.data for image in together.images] == [job.images[0].data for job in alone]
    assert len({image.data for image in together.images}) == 3


def test_a_task_that_the_model_does_not_take_is_refused_with_its_field(label_bundle):
    cases = [
        ({"scheduler": "dimm"}, "scheduler", "ddim"),
        ({"labels": ("red cub",)}, "labels", "red cube"),
        ({"guidance_interval": (3, 2), "num_inference_steps": 5}, "guidance_interval", "LO < HI"),
        ({"scheduler": "dpmpp-2m", "num_inference_steps": 9999}, "num_inference_steps", "1000"),
        ({"labels": None, "prompt": "a cube"}, "prompt", "takes labels"),
        ({"rag": True}, "rag", "--rag"),
    ]

    async def main():
        async with serving(("m", label_bundle), engine="ort") as service:
            jobs = [service.submit(asks("m", **fields)) for fields, _, _ in cases]
            good = await ended(service.submit(asks("m", num_inference_steps=1)))
            return [(await ended(job)).images[0] for job in jobs], good.images[0]

    images, good = asyncio.run(main())
    for bad, (_, param, words) in zip(images, cases, strict=True):
        assert (bad.phase, bad.error.status, bad.error.param) == ("failed", 400, param)
        assert words in bad.error.message
    assert good.phase == "done"


def test_a_fault_of_one_image_is_no_fault_of_its_neighbours(label_bundle):
    async def main():
        async with serving(("m", label_bundle), target=faulty_worker, engine="openvino") as service:
            seeds = [1, RAISES, 2, NOT_FINITE, 3]
            return [
                await ended(job) for job in [service.submit(asks("m", seed=s, num_inference_steps=5)) for s in seeds]
            ]

    one, raises, two, broken, three = (job.images[0] for job in asyncio.run(main()))
    assert [image.phase for image in (one, two, three)] == ["done"] * 3
    assert (raises.error.status, raises.error.code) == (500, "engine_error")
    assert "does not like" in raises.error.message
    assert (broken.error.status, broken.error.code) == (500, "not_finite")


@pytest.mark.slow
def test_an_image_that_kills_the_worker_is_found_out_and_the_others_are_made(label_bundle):
    async def main():
        async with serving(("m", label_bundle), target=faulty_worker, engine="ort") as service:
            seeds = [1, 2, DIES, 3, 4]
            jobs = [service.submit(asks("m", seed=s, num_inference_steps=5)) for s in seeds]
            jobs = [await ended(job, 120) for job in jobs]
            await until(lambda: service.models["m"].state == "ready")
            clean = [await ended(service.submit(asks("m", seed=s, num_inference_steps=5))) for s in (1, 2, 3, 4)]
            return jobs, clean, service.metrics().decode()

    jobs, clean, metrics = asyncio.run(main())
    poison = jobs.pop(2).images[0]
    assert (poison.error.status, poison.error.code) == (500, "engine_crashed")
    assert [job.images[0].data for job in jobs] == [job.images[0].data for job in clean]
    assert 'fastgen_engine_restarts_total{model="m"} 2.0' in metrics


@pytest.mark.slow
def test_images_in_flight_survive_a_kill_with_the_same_bytes(label_bundle):
    async def main():
        async with serving(("m", label_bundle), target=slow_worker, engine="ort") as service:
            jobs = [service.submit(asks("m", seed=s, num_inference_steps=5)) for s in range(6)]
            assert [job.ahead for job in jobs] == list(range(6))
            assert [job.wait_s for job in jobs] == sorted(job.wait_s for job in jobs)
            await until(lambda: jobs[0].images[0].row > 0)
            os.kill(service.models["m"].pid, signal.SIGKILL)
            start = time.monotonic()
            await until(lambda: service.models["m"].state != "ready")
            assert time.monotonic() - start < 1
            with pytest.raises(ApiError) as refused:
                service.submit(asks("m"))
            assert (refused.value.status, refused.value.code) == (503, "model_not_ready")
            assert refused.value.retry_after >= 1
            jobs = [await ended(job, 120) for job in jobs]
            again = [await ended(service.submit(asks("m", seed=s, num_inference_steps=5))) for s in range(6)]
            return jobs, again

    jobs, again = asyncio.run(main())
    assert all(job.images[0].phase == "done" for job in jobs)
    assert [job.images[0].data for job in jobs] == [job.images[0].data for job in again]


@pytest.mark.slow
def test_a_worker_that_dies_again_and_again_is_given_up_and_others_serve_on(label_bundle, monkeypatch):
    monkeypatch.setattr("fastgen.serving.keeper.BACKOFF_S", 0.1)

    async def main():
        async with serving(("a", label_bundle), ("b", label_bundle), engine="ort") as service:
            job = service.submit(asks("a", num_inference_steps=150, scheduler="ddpm"))
            for _ in range(5):
                await until(lambda: service.models["a"].pid is not None and service.models["a"].state != "restarting")
                os.kill(service.models["a"].pid, signal.SIGKILL)
                await until(lambda: service.models["a"].state in ("restarting", "failed"))
            assert service.models["a"].state == "failed"
            with pytest.raises(ApiError) as refused:
                service.submit(asks("a"))
            return (await ended(job)).images[0], (await ended(service.submit(asks("b")))).images[0], refused.value

    lost, good, refused = asyncio.run(main())
    assert lost.error.code == "engine_crashed"
    assert good.phase == "done"
    assert (refused.status, refused.code) == (503, "failed")


@pytest.mark.slow
def test_a_worker_that_hangs_is_not_ready_and_is_replaced(label_bundle, monkeypatch):
    monkeypatch.setattr("fastgen.serving.keeper.ANSWER_S", 0.5)
    monkeypatch.setattr("fastgen.serving.keeper.HANG_S", 2.0)

    async def main():
        async with serving(("m", label_bundle), engine="ort", target=slow_worker) as service:
            job = service.submit(asks("m", num_inference_steps=10))
            await until(lambda: job.images[0].row > 0)
            pid = service.models["m"].pid
            os.kill(pid, signal.SIGSTOP)
            await until(lambda: service.models["m"].state == "stalled", 10)
            done = await ended(job, 60)
            return pid, service.models["m"].pid, done.images[0]

    before, after, image = asyncio.run(main())
    assert before != after
    assert image.phase == "done"


@pytest.mark.slow
def test_a_cancelled_image_frees_its_slot_within_a_step(label_bundle):
    async def main():
        async with serving(("m", label_bundle), engine="ort", target=slow_worker) as service:
            long = service.submit(asks("m", num_inference_steps=150, scheduler="ddpm"))
            await until(lambda: long.images[0].row > 1)
            service.cancel(long.id)
            row = long.images[0].row
            good = await ended(service.submit(asks("m", num_inference_steps=1)))
            await asyncio.sleep(0.3)
            return long, row, good, service.models["m"].running

    long, row, good, running = asyncio.run(main())
    assert (long.images[0].phase, long.images[0].row) == ("cancelled", row)
    assert good.images[0].phase == "done"
    assert running == 0


def test_more_than_can_end_in_time_is_refused_at_once(label_bundle):
    async def main():
        async with serving(("m", label_bundle), engine="ort", target=slow_worker, max_wait_s=0.2) as service:
            jobs, refused = [], []
            for seed in range(300):
                try:
                    jobs.append(service.submit(asks("m", seed=seed, num_inference_steps=10)))
                except ApiError as error:
                    refused.append(error)
            for job in jobs:
                service.cancel(job.id)
            return jobs, refused, await ended(service.submit(asks("m", num_inference_steps=1)))

    jobs, refused, after = asyncio.run(main())
    assert jobs
    assert refused
    assert {(error.status, error.code) for error in refused} == {(429, "busy")}
    assert min(error.retry_after for error in refused) >= 1
    assert after.images[0].phase == "done"


def test_a_deadline_is_kept(label_bundle):
    async def main():
        async with serving(("m", label_bundle), engine="ort", target=slow_worker) as service:
            return await ended(service.submit(asks("m", num_inference_steps=150, scheduler="ddpm", deadline_s=1.0)), 10)

    image = asyncio.run(main()).images[0]
    assert (image.error.status, image.error.code) == (504, "deadline")


def test_a_deadline_that_cannot_be_kept_is_no_reason_to_try_again(label_bundle):
    async def main():
        async with serving(("m", label_bundle), engine="ort") as service:
            with pytest.raises(ApiError) as refused:
                service.submit(asks("m", num_inference_steps=1000, scheduler="ddpm", deadline_s=0.001))
            return refused.value

    error = asyncio.run(main())
    assert (error.status, error.param, error.retry_after) == (400, "deadline_s", None)


def test_a_drain_ends_what_runs_and_refuses_the_rest(label_bundle):
    async def main():
        async with serving(("m", label_bundle), engine="ort", target=slow_worker) as service:
            running = service.submit(asks("m", num_inference_steps=5))
            await until(lambda: running.images[0].row > 0)
            several = service.submit(asks("m", n=3, num_inference_steps=3))
            await until(lambda: several.images[0].row > 0)
            waiting = [service.submit(asks("m", seed=s, num_inference_steps=50)) for s in range(4)]
            drain = asyncio.create_task(service.drain(20))
            await asyncio.sleep(0)
            with pytest.raises(ApiError) as refused:
                service.submit(asks("m"))
            await drain
            return running.images[0], several, [job.images[0] for job in waiting], refused.value

    running, several, waiting, refused = asyncio.run(main())
    assert running.phase == "done"
    assert [image.phase for image in several.images] == ["done"] * 3  # it had begun
    assert (refused.status, refused.code) == (503, "draining")
    assert {image.error.status for image in waiting if image.phase != "done"} == {503}


def test_a_model_that_is_none_is_one_error_before_anything_is_served(tmp_path):
    async def main():
        async with serving(("m", tmp_path)):
            pass

    with pytest.raises(InputError, match="neither a bundle"):
        asyncio.run(main())


def test_metrics_count_what_the_client_saw(label_bundle):
    from prometheus_client.parser import text_string_to_metric_families

    async def main():
        async with serving(("m", label_bundle), engine="ort") as service:
            jobs = [service.submit(asks("m", n=2, seed=s, num_inference_steps=3, guidance_scale=2.0)) for s in range(3)]
            jobs += [service.submit(asks("m", labels=("nothing known",)))]
            for job in jobs:
                await ended(job)
            cancelled = service.submit(asks("m", num_inference_steps=150, scheduler="ddpm"))
            service.cancel(cancelled.id)
            await asyncio.sleep(0.2)
            return service.metrics().decode()

    samples = [s for family in text_string_to_metric_families(asyncio.run(main())) for s in family.samples]
    value = {
        (s.name, s.labels.get("outcome") or s.labels.get("kind")): s.value for s in samples if "le" not in s.labels
    }
    assert value["fastgen_images_total", None] == 6
    assert {k: value["fastgen_requests_total", k] for k in ("ok", "rejected", "cancelled", "failed", "deadline")} == {
        "ok": 3, "rejected": 1, "cancelled": 1, "failed": 0, "deadline": 0,
    }  # fmt: skip
    assert value["fastgen_rows_total", "used"] >= 2 * 6 * 3
    assert value["fastgen_requests_waiting", None] == value["fastgen_requests_running", None] == 0
    assert value["fastgen_engine_up", None] == 1
    assert json.dumps(value["fastgen_request_seconds_count", None]) == "5.0"


def test_a_refusal_names_the_right_field_and_no_path_of_the_server(label_bundle, monkeypatch):
    monkeypatch.setenv("BLOCKED_IMPORTS", "torch diffusers transformers")

    async def main():
        async with serving(("m", label_bundle), engine="ort", target=without_torch) as service:
            jobs = [
                service.submit(asks("m", **fields))
                for fields in ({"num_inference_steps": 777}, {"scheduler": "nosuch"})
            ]
            return [(await ended(job)).images[0].error for job in jobs]

    steps, scheduler = asyncio.run(main())
    assert (steps.param, scheduler.param) == ("num_inference_steps", "scheduler")
    for error in (steps, scheduler):
        assert error.status == 400
        assert "is not stored (nearest: " in error.message
        assert str(label_bundle) not in error.message


@pytest.mark.slow
def test_what_a_drain_cuts_off_may_be_tried_elsewhere(label_bundle):
    async def main():
        async with serving(("m", label_bundle), engine="ort", target=slow_worker) as service:
            job = service.submit(asks("m", num_inference_steps=150, scheduler="ddpm"))
            await until(lambda: job.images[0].row > 0)
            await service.drain(0.2)
            return job.images[0].error

    error = asyncio.run(main())
    assert (error.status, error.code, error.retry_after) == (503, "draining", 1)


@pytest.mark.slow
def test_finished_jobs_are_kept_for_a_while_and_the_oldest_go_first(label_bundle, monkeypatch):
    monkeypatch.setattr("fastgen.serving.service.KEPT_IMAGES", 3)

    async def main():
        async with serving(("m", label_bundle), engine="ort") as service:
            jobs = [await ended(service.submit(asks("m", n=2, num_inference_steps=1))) for _ in range(2)]
            assert service.job(jobs[1].id) is jobs[1]
            with pytest.raises(ApiError) as forgotten:
                service.job(jobs[0].id)
            monkeypatch.setattr("fastgen.serving.service.KEPT_S", 0.0)
            with pytest.raises(ApiError):
                service.job(jobs[1].id)
            return forgotten.value

    error = asyncio.run(main())
    assert (error.status, error.code) == (404, "job_not_found")
