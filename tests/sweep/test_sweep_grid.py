"""A grid is every combination, in a fixed order, with names of its own; what is wrong with it is listed, each item once."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgen.errors import InputError
from fastgen.generate.settings import Settings
from fastgen.sampling.defaults import Sampling
from fastgen.sweep.grid import Grid, Point, Points, RefusedError, parse_grid

DEFAULT = Sampling("ddpm", 7, 1.5)


def problems(call):
    with pytest.raises(RefusedError) as caught:
        call()
    return caught.value.problems


def test_the_points_are_the_cartesian_product_and_the_steps_vary_fastest():
    grid = parse_grid(scheduler="ddim,unipc", num_inference_steps="5, 10", guidance_scale="1,2.5")
    points = grid.points(DEFAULT)
    expected = itertools.product(["ddim", "unipc"], [1.0, 2.5], [5, 10])
    assert [(p.scheduler, p.guidance_scale, p.num_inference_steps) for p in points] == list(expected)


def test_what_is_not_given_is_the_models_own():
    assert Grid().points(DEFAULT) == [Point("ddpm", 7, 1.5)]
    assert Grid().points(Sampling("ddim", 70, 10.0), rag=True) == [Point("ddim", 70, 10.0, noise_steps=60)]


def test_cache_intervals_are_points_of_their_own():
    points = parse_grid(num_inference_steps="4,6", cache_interval="1,3").points(DEFAULT)
    assert [(p.cache_interval, p.num_inference_steps) for p in points] == [(1, 4), (1, 6), (3, 4), (3, 6)]
    assert [p.name for p in points[::2]] == ["ddpm-4steps-g1.5", "ddpm-4steps-g1.5-c3"]
    assert str(points[2]) == "ddpm 4 steps, guidance 1.5, cache interval 3"
    assert points[2].settings()["cache_interval"] == 3


def test_none_among_the_noise_steps_is_a_full_start():
    points = parse_grid(noise_steps="none,3,7").points(DEFAULT, rag=True)
    assert [p.noise_steps for p in points] == [None, 3, 7]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"scheduler": "ddim,"}, ["--scheduler: found '', expected names such as ddim,dpmpp-2m"]),
        ({"num_inference_steps": "5,0"}, ["--num-inference-steps: found 0, expected from 1 to 10000"]),
        ({"num_inference_steps": "5,5"}, ["--num-inference-steps: 5 is given twice"]),
        ({"guidance_scale": "inf"}, ["--guidance-scale: found inf, expected a number from 0 to 1000"]),
        ({"cache_interval": "1,x"}, ["--cache-interval: found 'x', expected integers such as 1,2,3"]),
        ({"cache_interval": "0"}, ["--cache-interval: found 0, expected from 1 to 10000"]),
        ({"noise_steps": "3,some"}, ["--noise-steps: found 'some', expected integers such as 20,30, or none"]),
        ({"checkpoint": "best,best"}, ["--checkpoint: 'best' is given twice"]),
        (
            {"num_inference_steps": "5,10", "noise_steps": "5,6,11"},
            [
                "--noise-steps 6 with --num-inference-steps 5: expected at most 5",
                "--noise-steps 11 with --num-inference-steps 5: expected at most 5",
                "--noise-steps 11 with --num-inference-steps 10: expected at most 10",
            ],
        ),
    ],
)
def test_every_bad_value_is_an_item_that_names_the_option_and_what_was_expected(options, expected):
    assert problems(lambda: parse_grid(**options)) == expected


def test_bad_values_of_all_options_are_listed_together():
    options = {"scheduler": "ddim,ddim", "num_inference_steps": "x,0", "guidance_scale": "-1,nan", "noise_steps": "0"}
    found = problems(lambda: parse_grid(**options))
    assert [item.partition(":")[0] for item in found] == [
        "--num-inference-steps",
        "--scheduler",
        "--num-inference-steps",
        "--guidance-scale",
        "--guidance-scale",
        "--noise-steps",
    ]


def test_combinations_that_the_models_own_steps_make_impossible_are_refused():
    grid = parse_grid(noise_steps="6,8")
    assert problems(lambda: grid.points(DEFAULT, rag=True)) == [
        "--noise-steps 8 with --num-inference-steps 7: expected at most 7"
    ]
    assert "give --rag INDEX too" in problems(lambda: parse_grid(noise_steps="6").points(DEFAULT))[0]
    assert "leave one of them out" in problems(lambda: parse_grid(noise_steps="none").points(DEFAULT, rag=True))[0]


def test_two_names_of_the_same_weights_are_refused():
    grid, labels = parse_grid(checkpoint="ema,last,200"), {"ema": "ema@200", "last": "last@200", "200": "ema@200"}
    assert problems(lambda: grid.points(DEFAULT, weights=labels)) == [
        "--checkpoint: ema and 200 are the same weights, ema@200"
    ]


POINTS = st.builds(
    Point,
    st.sampled_from(["ddim", "ddim-karras", "DDIMScheduler"]),
    st.integers(1, 2000),
    st.floats(0, 1000),
    st.none() | st.integers(1, 2000),
    st.none(),
    st.none() | st.sampled_from(["best@1", "last@1", "ema@11"]),
    st.none() | st.tuples(st.integers(0, 9), st.integers(10, 20)),
)


@given(POINTS, POINTS)
def test_different_points_have_different_names_that_are_one_folder_each(a, b):
    assert (a.name == b.name) == (a == b)
    assert "/" not in a.name


@given(POINTS)
def test_a_point_that_the_grid_lets_through_is_one_that_the_settings_take(point):
    lists = {"schedulers": (point.scheduler,), "num_inference_steps": (point.num_inference_steps,)}
    try:
        (found,) = Grid(**lists, guidance_scales=(point.guidance_scale,), noise_steps=(point.noise_steps,)).points(
            DEFAULT, rag=point.noise_steps is not None
        )
    except InputError:
        assert point.noise_steps > point.num_inference_steps
        return
    Settings(found.scheduler, found.num_inference_steps, found.guidance_scale, noise_steps=found.noise_steps)


def test_points_given_one_by_one_are_taken_in_their_order():
    chosen = (Point("ddim", 5, 1.0), Point("heun", 3, 2.0))
    assert Points(chosen).points(DEFAULT) == list(chosen)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ((), "there are none"),
        ((Point("ddim", 5, 1.0), Point("ddim", 5, 1.0)), "ddim-5steps-g1 is given twice"),
        ((Point("ddim", 5, 1.0, noise_steps=3),), "starts late"),
    ],
)
def test_points_that_a_sweep_cannot_have_are_refused(chosen, words):
    with pytest.raises(RefusedError, match=words):
        Points(chosen)


def test_values_of_another_type_are_refused_like_values_out_of_range():
    with pytest.raises(RefusedError) as raised:
        Grid(num_inference_steps=("ten", 2.5), guidance_scales=("high",), noise_steps=(1.5,))
    assert [problem.partition(", expected")[0] for problem in raised.value.problems] == [
        "--num-inference-steps: found 'ten'",
        "--num-inference-steps: found 2.5",
        "--guidance-scale: found 'high'",
        "--noise-steps: found 1.5",
    ]
