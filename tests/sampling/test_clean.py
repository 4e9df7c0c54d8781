"""The clean sample that a prediction implies is the one that diffusers' schedulers compute."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from fastgen.sampling.clean import alphas_cumprod, clean_coefficients  # noqa: E402
from fastgen.sampling.compile import TableCompiler  # noqa: E402

SCHEDULES = [
    {"beta_schedule": name, "num_train_timesteps": steps}
    for name in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    for steps in (1000, 200)
]
SCHEDULES += [
    {"rescale_betas_zero_snr": True},
    {"trained_betas": [0.01, 0.02, 0.3], "num_train_timesteps": 3},
    {"beta_start": 0.001, "beta_end": 0.01},
]


@pytest.mark.parametrize("config", SCHEDULES, ids=str)
def test_noise_levels_are_those_of_diffusers(config):
    expected = diffusers.DDIMScheduler(**config).alphas_cumprod.numpy() if "sigmoid" not in str(config) else None
    if expected is None:
        expected = diffusers.DDPMScheduler(**config).alphas_cumprod.numpy()
    np.testing.assert_allclose(alphas_cumprod(config), expected, atol=2e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler"])
def test_the_clean_sample_is_that_of_diffusers(name, prediction):
    config = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "prediction_type": prediction,
        "clip_sample": False,
    }
    table = TableCompiler(config).table(f"{name}:7")
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "ddpm": diffusers.DDPMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
    }
    scheduler = classes[name].from_config(config)
    scheduler.set_timesteps(7)
    generator = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 1, 3, 4, 4, generator=generator, dtype=torch.float64).unbind()
    pairs = clean_coefficients(table, config)
    for i, timestep in enumerate(scheduler.timesteps):
        network_input = scheduler.scale_model_input(x, timestep)
        found = pairs[i, 0] * network_input + pairs[i, 1] * output
        step = scheduler.step(output, timestep, x, generator=generator)
        np.testing.assert_allclose(found, step.pred_original_sample, rtol=2e-4, atol=2e-4)
        x = step.prev_sample


def test_a_straight_flow_ends_at_its_clean_sample():
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    table = TableCompiler(config).table("flow-match-euler:5")
    noise, x0 = np.random.default_rng(0).normal(size=(2, 8))
    for (u, w), timestep in zip(clean_coefficients(table, config), table.timesteps, strict=True):
        s = timestep / 1000
        np.testing.assert_allclose(u * ((1 - s) * x0 + s * noise) + w * (noise - x0), x0, atol=1e-12)


def test_a_schedule_in_other_terms_has_no_clean_sample():
    table = TableCompiler({"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000}).table(
        "EDMEulerScheduler:5"
    )
    assert clean_coefficients(table, {"_class_name": "EDMEulerScheduler", "num_train_timesteps": 1000}) is None
    assert alphas_cumprod({"beta_schedule": "laplace"}) is None
