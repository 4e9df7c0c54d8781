from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastgen.errors import InputError
from fastgen.sampling.compile import TableCompiler, compile_table
from fastgen.sampling.schedulers import FLOW_CLASSES, SOLVERS, make_scheduler
from fastgen.sampling.stability import input_growth

COSINE = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SECOND_ORDER = ("heun", "kdpm2", "kdpm2-ancestral")  # in sigma, by a midpoint or a trapezium
OTHERS = [
    name for name, (class_name, _) in SOLVERS.items() if name not in SECOND_ORDER and class_name not in FLOW_CLASSES
]


def config(**options: Any) -> dict[str, Any]:
    return {"_class_name": "DDPMScheduler", "clip_sample": False, "prediction_type": "v_prediction", **options}


def growth(name: str, steps: int, **options: Any) -> float:
    scheduler = make_scheduler(name, config(**options))
    return input_growth(compile_table(scheduler, steps, name=name), scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    ("name", "steps"), [("heun", 8), ("heun", 30), ("kdpm2", 3), ("ddim", 5), ("euler-ancestral", 6)]
)
def test_the_growth_is_what_diffusers_does_to_gaussian_data(name: str, steps: int, prediction_type: str) -> None:
    if name in ("euler-ancestral", "kdpm2") and prediction_type == "sample":
        pytest.skip("diffusers' class does not take sample prediction")
    scheduler: Any = make_scheduler(name, config(prediction_type=prediction_type, **COSINE))
    expected = input_growth(compile_table(scheduler, steps, name=name), scheduler)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=generator, dtype=torch.float64) * scheduler.init_noise_sigma
    deviations = []
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        deviations.append(float(scaled.std()))
        level = np.interp(float(timestep), np.arange(1000), scheduler.alphas_cumprod.double().numpy())
        factor = {"epsilon": np.sqrt(1 - level), "v_prediction": 0.0, "sample": np.sqrt(level)}[prediction_type]
        noise = {"generator": generator} if name == "euler-ancestral" else {}
        x = scheduler.step(factor * scaled, timestep, x, **noise).prev_sample
    assert max(*deviations, float(x.std())) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("schedule", [COSINE, STABLE_DIFFUSION, {}], ids=["cosine", "scaled linear", "linear"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_solvers_keep_the_inputs_at_unit_variance(name: str, schedule: dict[str, Any]) -> None:
    for steps in (4, 10, 25):
        if name == "dpmpp-2s" and schedule is COSINE:
            schedule = {**schedule, "timestep_spacing": "linspace"}
        assert growth(name, steps, **schedule) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("name", ["heun", "heun-karras", "HeunDiscreteScheduler"])
def test_a_solver_whose_steps_are_too_coarse_is_refused_by_name(name: str) -> None:
    compiler = TableCompiler(config(**COSINE))
    with pytest.raises(InputError, match=rf"solver {name}\b.* at 5 steps: .*too coarse.*take more steps") as caught:
        compiler.table(f"{name}:5")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"would become 1\.31 times too large"):
        compiler.table("heun:50")
    assert len(compiler.table("heun:100")) == 199
    assert len(compiler.table("heun:10:5")) == 9  # a late start leaves the coarse steps out
    own = TableCompiler(config(**COSINE) | {"_class_name": "HeunDiscreteScheduler"})
    assert len(own.table("heun:5")) == 9


def test_the_second_order_solvers_fit_the_schedule_of_stable_diffusion() -> None:
    compiler = TableCompiler(config(**STABLE_DIFFUSION, prediction_type="epsilon"))
    for name in (*SECOND_ORDER, "heun-karras", "kdpm2-karras"):
        for steps in (4, 8, 15, 20, 25, 50):
            assert compiler.table(f"{name}:{steps}").num_inference_steps == steps


def test_schedules_of_other_processes_are_not_looked_at() -> None:
    flow = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    scheduler = make_scheduler("FlowMatchHeunDiscreteScheduler", flow)
    assert input_growth(compile_table(scheduler, 4), scheduler) == 1.0
