"""A sweep whose points are made by one pool of workers: the same pictures and scores as in one process."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
from fake_ray import DieError, FakeRay
from scoring_helpers import make_evaluator

pytest.importorskip("ray")
pytest.importorskip("torchmetrics")

from fastgen.cluster import pool as pools
from fastgen.cluster.machines import Slot
from fastgen.cluster.pool import Pool
from fastgen.cluster.worker import Worker, WorkerOptions
from fastgen.errors import InputError
from fastgen.scoring.scorer import Scorer
from fastgen.sweep import Grid, sweep
from fastgen.sweep.models import PoolLoader

GRID = Grid(schedulers=("ddim", "dpmpp-2m"), num_inference_steps=(2, 3), guidance_scales=(1.0, 2.0))


@pytest.fixture
def made(label_bundle, requests_files, tmp_path, monkeypatch):
    """(folder, worker of a node, fields of the sweep) -> what a sweep on a made-up cluster of two machines returns."""
    monkeypatch.setattr(pools, "NODES_S", 0.02)
    monkeypatch.setattr(pools, "LOOK_S", 0.01)
    scorer = Scorer(evaluator=make_evaluator(tmp_path / "judge"))

    def build(out, worker=None, **options):
        if worker is not None:

            @contextmanager
            def workers(checkpoint):
                ray = FakeRay({"one": {"CPU": 1.0}, "two": {"CPU": 1.0}}, worker)
                with Pool(ray, Slot(1, False), WorkerOptions(label_bundle, "ort")) as pool:
                    yield pool

            options["loader"] = PoolLoader(label_bundle, workers)
        grid = options.pop("grid", GRID)
        return sweep(
            label_bundle,
            requests_files["labels"],
            tmp_path / out,
            grid,
            scorer=scorer,
            engine="ort",
            progress=False,
            **options,
        )

    return build


def contents(folder):
    files = (p for p in (folder / "points").rglob("*") if p.is_file() and p.name not in ("job.json", "score.json"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def figures(result):
    return {row.point.name: {key: figure.value for key, figure in row.figures.items()} for row in result.rows}


def test_points_made_by_a_pool_are_those_of_one_process_though_workers_die(made, tmp_path):
    expected = made("local", seeds=(0, 1))
    lock, calls, inside, most = threading.Lock(), [], set(), []

    class Dying(Worker):
        def make(self, key, recipe, batch, limits):
            with lock:
                calls.append(key)
                inside.add(key)
                most.append(len(inside))
            if len(calls) in (3, 7):
                raise DieError
            files = super().make(key, recipe, batch, limits)
            with lock:
                inside.discard(key)
            return files

    found = made("cluster", lambda get, node: Dying(get), seeds=(0, 1))
    assert contents(tmp_path / "cluster") == contents(tmp_path / "local")
    assert figures(found) == figures(expected)
    assert [row.point for row in found.rows] == [row.point for row in expected.rows]
    assert max(most) >= 2  # several points are made at the same time
    before = len(calls)
    again = made("cluster", lambda get, node: Dying(get), seeds=(0, 1))
    assert len(calls) == before
    assert figures(again) == figures(expected)


def test_a_sweep_of_another_engine_is_refused_before_a_new_point(made, tmp_path):
    one = Grid(schedulers=("ddim",), num_inference_steps=(2,), guidance_scales=(1.0,))
    made("out", lambda get, node: Worker(get), grid=one)
    before = contents(tmp_path / "out")

    class Other(Worker):
        def open(self, options):
            opened = super().open(options)
            self._pipeline.engine.dtype = "bf16"
            return opened

    with pytest.raises(InputError, match=r"dtype is .fp32. there and .bf16. now"):
        made("out", lambda get, node: Other(get))
    assert contents(tmp_path / "out") == before


def test_a_cache_that_the_workers_cannot_have_is_refused_before_the_first_image(made, tmp_path):
    grid = Grid(schedulers=("ddim",), num_inference_steps=(2,), guidance_scales=(1.0,), cache_intervals=(1, 2))
    with pytest.raises(InputError, match="has no graphs for --cache-interval"):
        made("out", lambda get, node: Worker(get), grid=grid)
    assert not (tmp_path / "out" / "points").exists()


def test_an_error_in_one_point_ends_the_others(made):
    class Failing(Worker):
        def make(self, key, recipe, batch, limits):
            raise ZeroDivisionError("a bug")

    with pytest.raises(Exception, match="ZeroDivisionError: a bug"):
        made("out", lambda get, node: Failing(get))
