"""Every scheduler class of diffusers, found by introspection: as a model folder's it samples as diffusers' own loop does, or it
is refused in one line that says why. A class that a new version of diffusers adds is tested here too."""
# mypy: disable-error-code="attr-defined, misc"

from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from diffusers_loop import config, run_diffusers  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import fastgen.sampling.compile as solver  # noqa: E402
from fastgen.errors import InputError  # noqa: E402
from fastgen.files.jsonfiles import read_json  # noqa: E402
from fastgen.sampling.compile import TableCompiler  # noqa: E402
from fastgen.sampling.loop import sample, step, table_rows  # noqa: E402
from fastgen.sampling.noise import normal  # noqa: E402
from fastgen.sampling.probe import continuous  # noqa: E402
from fastgen.sampling.schedulers import (  # noqa: E402
    FITTING,
    FLOW,
    FLOW_SOLVERS,
    REFUSED,
    SOLVERS,
    TRAINED,
    WITHOUT_KARRAS,
    default_name,
    learned_variance,
    make_scheduler,
    noise_process,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
SEEDS = [3, 1]
SHAPE = (2, 4, 4)
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# The classes that are refused, with words of the reason.
WHY = {
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "CogVideoXDPMScheduler": "two timesteps and the last clean sample",
    "CosineDPMSolverMultistepScheduler": "Brownian noise",
    "DDIMInverseScheduler": "from a picture to noise",
    "DDPMWuerstchenScheduler": "ratios from 1 to 0",
    "DPMSolverMultistepInverseScheduler": "from a picture to noise",
    "DPMSolverSDEScheduler": "Brownian noise",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "HeliosDMDScheduler": "stages of growing size",
    "HeliosScheduler": "stages of growing size",
    "KarrasVeScheduler": "evaluates the network again",
    "PiflowScheduler": "a grid of velocities",
    "RFD4ProteinaScheduler": "proteins",
    "RePaintScheduler": "original_image and mask",
    "SCMScheduler": "takes angles",
    "ScoreSdeVeScheduler": "not linear",
    "VQDiffusionScheduler": "discrete tokens",
}
# Arguments without a default.
ARGUMENTS = {
    "AmusedScheduler": {"mask_token_id": 1},
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "RFD4ProteinaScheduler": {"schedule_mode": "power", "noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0},
}
FEWEST = {"PNDMScheduler": 4, "UnCLIPScheduler": 2, "MiniMaxH3Scheduler": 2}


def scheduler_names():
    found = {n: getattr(diffusers, n) for n in dir(diffusers) if n.endswith("Scheduler")}
    return sorted(n for n, cls in found.items() if isinstance(cls, type) and is_scheduler(cls))


def is_scheduler(cls):
    missing_package = hasattr(cls, "_backends")
    return missing_package or issubclass(cls, diffusers.SchedulerMixin)


def saved(cls, folder, **options):
    """The config as a model folder holds it, -Infinity included."""
    cls(**options).save_pretrained(folder)
    return read_json(folder / "scheduler_config.json", infinity=True)


def attempt(make):
    """What `make` makes, and None; or None and the one line that refuses."""
    try:
        return make(), None
    except InputError as error:
        words = str(error)
    assert words
    assert "\n" not in words
    return None, words


def network(x, timestep):
    """Linear in x, float64, and different at every timestep, of whatever scale."""
    time = torch.as_tensor(timestep, dtype=torch.float64)
    kernel = torch.randn(2, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) / 6
    return (
        torch.nn.functional.conv2d(x.double(), kernel, padding=1) + 0.3 * torch.sin(time / 50) + 0.2 * torch.cos(time)
    )


def assert_samples_as_diffusers_does(table, scheduler, steps, tolerance=2e-5):
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps
    np.testing.assert_array_equal(table.timesteps, timesteps.double().numpy())
    assert table.init_sigma == pytest.approx(float(getattr(scheduler, "init_noise_sigma", 1.0)), rel=1e-12)
    x = table.init_sigma * torch.from_numpy(normal(SEEDS, 0, SHAPE)).double()
    trail: list[torch.Tensor] = []
    expected = run_diffusers(scheduler, timesteps, network, x, seeds=SEEDS, trail=trail)
    ours = sample(lambda x, t: network(x, t[0]), table, x, (), seeds=SEEDS)
    largest = max(float(state.abs().max()) for state in trail)
    assert math.isfinite(largest)
    assert float((ours - expected).abs().max()) <= tolerance * largest


@pytest.mark.parametrize("name", scheduler_names())
def test_every_class_samples_as_diffusers_own_loop_or_says_why_not(name, tmp_path):
    cls = getattr(diffusers, name)
    if hasattr(cls, "_backends"):
        model = {"_class_name": name}
    else:
        model = saved(cls, tmp_path, **ARGUMENTS.get(name, {}))
    fewest = FEWEST.get(name, 1)
    for steps in (fewest, 5, 20):
        key = f"{default_name(model)}:{steps}"
        if name in WHY:
            with pytest.raises(InputError, match=f"{name} .*{WHY[name]}") as caught:
                TableCompiler(model).table(key)
            assert "\n" not in str(caught.value)
            continue
        assert_samples_as_diffusers_does(TableCompiler(model).table(key), cls.from_pretrained(tmp_path), steps)


def test_the_lists_of_refused_classes_name_the_same_classes():
    assert set(WHY) == set(REFUSED)
    assert set(REFUSED) <= set(scheduler_names())
    for class_name, _ in SOLVERS.values():
        has = "use_karras_sigmas" in config(getattr(diffusers, class_name))
        assert has == (class_name not in WITHOUT_KARRAS), class_name


KARRAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
EVERY_SIGMAS = ("DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep", "DEISMultistep", "HeunDiscrete", "LMSDiscrete")
EVERY_SIGMAS += ("SASolver", "DPMSolverSinglestep", "KDPM2Discrete", "KDPM2AncestralDiscrete")
FLOWS = ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep", "SASolver", "DPMSolverSinglestep")
TERMINAL = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
OPTIONS = [
    *((cls, {option: True}) for cls in EVERY_SIGMAS for option in KARRAS),
    *((cls, {"timestep_spacing": s}) for cls in EVERY_SIGMAS[:7] for s in ("linspace", "leading", "trailing")),
    *((cls, {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}) for cls in FLOWS),
    *((cls, {"prediction_type": "v_prediction"}) for cls in EVERY_SIGMAS),
    ("DPMSolverMultistep", {"use_lu_lambdas": True}),
    ("DPMSolverMultistep", {"use_exponential_sigmas": True, "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", {"solver_order": 3, "euler_at_final": True, "timestep_spacing": "trailing"}),
    ("DPMSolverMultistep", {"solver_order": 3, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistep", {"solver_order": 1, "solver_type": "heun", "lower_order_final": False}),
    ("DPMSolverMultistep", TERMINAL),
    ("DPMSolverSinglestep", {"solver_order": 3, "lower_order_final": True}),
    ("UniPCMultistep", {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistep", {"solver_type": "bh1", "disable_corrector": [0, 1], "final_sigmas_type": "sigma_min"}),
    ("UniPCMultistep", TERMINAL),
    ("DEISMultistep", {"solver_order": 3}),
    ("SASolver", {"predictor_order": 3, "corrector_order": 3}),
    ("SASolver", {"algorithm_type": "noise_prediction"}),
    ("EulerDiscrete", {"final_sigmas_type": "sigma_min"}),
    ("EulerDiscrete", {"interpolation_type": "log_linear"}),
    ("EulerDiscrete", {"timestep_type": "continuous", "prediction_type": "epsilon", "timestep_spacing": "trailing"}),
    (
        "EulerDiscrete",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
            "use_exponential_sigmas": True,
        },
    ),
    (
        "EulerDiscrete",
        {
            "timestep_type": "continuous",
            "prediction_type": "v_prediction",
            "timestep_spacing": "leading",
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
        },
    ),
    ("EulerDiscrete", TERMINAL),
    ("EulerAncestralDiscrete", TERMINAL),
    ("DDIM", TERMINAL),
    ("DDPM", {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    ("LCM", {"original_inference_steps": 100}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "use_karras_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0, "shift_terminal": 0.1}),
    ("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}),
    ("LTXEulerAncestralRF", {"eta": 0.5}),
    ("EDMEuler", {"sigma_schedule": "exponential", "prediction_type": "v_prediction"}),
    ("EDMDPMSolverMultistep", {"solver_order": 3, "final_sigmas_type": "sigma_min", "sigma_max": 20.0}),
    ("CMStochasticIterative", {"clip_denoised": False}),
]


@pytest.mark.parametrize(("stem", "options"), OPTIONS, ids=lambda value: str(value))
def test_options_are_sampled_as_diffusers_does(stem, options, tmp_path):
    if options.get("use_beta_sigmas"):
        pytest.importorskip("scipy")
    cls = getattr(diffusers, f"{stem}Scheduler")
    betas = SD if "beta_start" in config(cls) else {}
    model = saved(cls, tmp_path, **betas, **options)
    for steps in (5, 12):
        table = TableCompiler(model).table(f"{default_name(model)}:{steps}")
        assert_samples_as_diffusers_does(table, cls.from_pretrained(tmp_path), steps)


def test_an_unclip_step_ends_at_the_next_timestep_of_the_schedule():
    """Its step goes to the timestep before, 999 of 1000, unless it is told; its pipeline tells."""
    table = TableCompiler(config(diffusers.UnCLIPScheduler, clip_sample=False)).table("UnCLIPScheduler:10")
    state, history = np.array([1.0]), ()
    exact = np.array([0.25])  # the network knows the clean sample
    scheduler = diffusers.UnCLIPScheduler()
    for row in table_rows(table):
        a = float(scheduler.alphas_cumprod[int(row.timestep)])
        state, history = step(state, history, (state - a**0.5 * exact) / (1 - a) ** 0.5, row, np.zeros(1))
    assert state == pytest.approx(exact, abs=1e-3)


# Noise processes


def filled(model):
    """A config with the defaults of its class."""
    cls = getattr(diffusers, model["_class_name"])
    return cls, dict(cls.from_config(model).config)


@pytest.mark.parametrize(
    ("cls", "options", "process"),
    [
        ("DDPMScheduler", {}, "diffusion"),
        ("LCMScheduler", {}, "diffusion"),
        ("UnCLIPScheduler", {}, "diffusion"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "diffusion"),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            "diffusion whose timesteps are a quarter of log sigma",
        ),
        ("FlowMatchHeunDiscreteScheduler", {}, "flow matching"),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "flow matching"),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "noise levels that no other class has"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "noise levels that no other class has"),
        ("MiniMaxH3Scheduler", {}, "noise levels that no other class has"),
        ("EDMEulerScheduler", {}, "EDM preconditioning"),
        ("CMStochasticIterativeScheduler", {}, "the boundary conditions of consistency models"),
    ],
)
def test_noise_process(cls, options, process):
    assert noise_process(*filled(config(getattr(diffusers, cls), **options))) == process


MODELS = {
    "diffusion": config(),
    "EDM": config(diffusers.EDMEulerScheduler),
    "flow": config(diffusers.FlowMatchEulerDiscreteScheduler),
    "flow solver": config(
        diffusers.UniPCMultistepScheduler, use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    ),
    "consistency": config(diffusers.CMStochasticIterativeScheduler),
    "log sigma": config(diffusers.EulerDiscreteScheduler, timestep_type="continuous", prediction_type="v_prediction"),
    "angles": config(diffusers.IPNDMScheduler),
    "flow in its own time": config(diffusers.MiniMaxH3Scheduler),
    "flow map": config(diffusers.FlowMapEulerDiscreteScheduler),
    "shifted SNR": config(diffusers.CogVideoXDDIMScheduler),
    "no scheduler fits": config(diffusers.ScoreSdeVeScheduler),
}
OTHERS = [*SOLVERS, *(n for n in scheduler_names() if n not in REFUSED)]


@pytest.mark.parametrize("model", MODELS.values(), ids=list(MODELS))
@pytest.mark.parametrize("other", OTHERS)
def test_a_scheduler_of_another_noise_process_is_refused_by_name(model, other):
    source, trained = filled(model)
    process = noise_process(source, trained)
    made, refusal = attempt(lambda: make_scheduler(other, model))
    if refusal:
        assert "cannot sample this model" in refusal or "has no " in refusal
        assert other not in FITTING.get(process, ()) or model["_class_name"].startswith("CogVideoX")
        return
    assert type(made) is source or noise_process(type(made), made.config) == process
    assert type(made) is source or process in TRAINED


def test_the_refusal_lists_what_fits():
    with pytest.raises(InputError) as caught:
        make_scheduler("ddim", MODELS["EDM"])
    assert str(caught.value) == (
        "scheduler 'ddim' (DDIMScheduler) cannot sample this model: it was trained with EDM preconditioning "
        "(EDMEulerScheduler); use EDMEulerScheduler or EDMDPMSolverMultistepScheduler"
    )
    with pytest.raises(InputError, match=r"use flow-match-euler, .*unipc, .* or sa-solver$"):
        make_scheduler("euler", MODELS["flow"])
    with pytest.raises(InputError, match=r"use IPNDMScheduler$"):
        make_scheduler("euler", MODELS["angles"])
    with pytest.raises(InputError, match=r"use another model$"):
        make_scheduler("euler", MODELS["no scheduler fits"])
    with pytest.raises(InputError, match=r"Karras et al.'s noise levels for diffusion"):
        make_scheduler("unipc-karras", MODELS["flow"])
    with pytest.raises(InputError, match="LTXEulerAncestralRFScheduler has no shift"):
        make_scheduler("LTXEulerAncestralRFScheduler", MODELS["flow solver"])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_edm_models_keep_their_preconditioning_with_the_other_solver(prediction_type):
    values = {
        "sigma_min": 0.01,
        "sigma_max": 30.0,
        "sigma_data": 0.7,
        "rho": 5.0,
        "num_train_timesteps": 500,
        "prediction_type": prediction_type,
        "sigma_schedule": "exponential",
    }
    classes = diffusers.EDMEulerScheduler, diffusers.EDMDPMSolverMultistepScheduler
    for source, target in (classes, classes[::-1]):
        table = TableCompiler(config(source, **values)).table(f"{target.__name__}:9")
        assert_samples_as_diffusers_does(table, target(**values), 9)


@pytest.mark.parametrize("source", ["flow", "flow heun", "flow solver"])
@pytest.mark.parametrize("name", FITTING[FLOW])
def test_flow_models_keep_their_shift_with_another_solver(source, name):
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    model = {
        "flow": config(diffusers.FlowMatchEulerDiscreteScheduler, shift=3.0, num_train_timesteps=500),
        "flow heun": config(diffusers.FlowMatchHeunDiscreteScheduler, shift=3.0, num_train_timesteps=500),
        "flow solver": config(diffusers.DEISMultistepScheduler, **flow, flow_shift=3.0, num_train_timesteps=500),
    }[source]
    class_name, options = SOLVERS.get(name, (name, {}))
    values = {**flow, "flow_shift": 3.0} if name in FLOW_SOLVERS else {"shift": 3.0}
    target = getattr(diffusers, class_name)(**values, **options, num_train_timesteps=500)
    assert_samples_as_diffusers_does(TableCompiler(model).table(f"{name}:9"), target, 9)


@pytest.mark.parametrize("name", [*(n for n in FITTING[FLOW] if "LCM" not in n), "LTXEulerAncestralRFScheduler"])
def test_every_flow_solver_approaches_the_exact_solution(name):
    """Clean samples from N(0, 0.25): the velocity is known, and the solution is half the initial noise."""
    variance, sde = 0.25, name in ("dpmpp-2m-sde", "sa-solver", "LTXEulerAncestralRFScheduler")
    shift = {} if name.startswith("LTX") else {"shift": 2.0}
    table = TableCompiler(config(diffusers.FlowMatchEulerDiscreteScheduler, **shift)).table(f"{name}:200")

    def velocity(x, timestep):
        s = float(timestep[0]) / 1000
        return (s - (1 - s) * variance) / ((1 - s) ** 2 * variance + s**2) * x

    seeds = list(range(40))
    x = normal(seeds, 0, (1, 8, 8)).astype(np.float32)
    out = sample(velocity, table, x, (), seeds=seeds)
    assert out.std() == pytest.approx(0.5, rel=0.05)
    if not sde:
        assert np.abs(out - x / 2).max() < 0.1


def test_cogvideox_shift_is_neither_lost_nor_added():
    with pytest.raises(InputError, match=r"DDIMScheduler has no snr_shift_scale.*3\.0"):
        make_scheduler("ddim", MODELS["shifted SNR"])
    plain = config(diffusers.CogVideoXDDIMScheduler, snr_shift_scale=1.0, rescale_betas_zero_snr=False)
    for name, model in (("ddim", plain), ("CogVideoXDDIMScheduler", config(**SD))):
        made = make_scheduler(name, model)
        torch.testing.assert_close(made.alphas_cumprod.float(), diffusers.DDIMScheduler(**SD).alphas_cumprod)


@pytest.mark.parametrize(
    "cls", ["EDMEulerScheduler", "FlowMatchEulerDiscreteScheduler", "CMStochasticIterativeScheduler"]
)
def test_common_tables_of_other_processes_are_the_models_own_at_every_number_of_steps(cls):
    skipped: dict[str, InputError] = {}
    model = config(getattr(diffusers, cls), num_train_timesteps=1000)
    tables = dict(TableCompiler(model).common(skipped.__setitem__))
    own = {f"{default_name(model)}:{steps}" for steps in solver.COMMON_STEPS}
    assert own <= set(tables)
    assert all("cannot sample this model" in str(e) for k, e in skipped.items() if not k.startswith("pndm-prk"))
    assert {"ddim:50", "ddpm:1000"} <= set(skipped)
    assert cls.startswith("Flow") or set(tables) == own


# Late starts


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("CMStochasticIterativeScheduler", {}),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("FlowMapEulerDiscreteScheduler", {}),
        ("MiniMaxH3Scheduler", {}),
        (
            "UniPCMultistepScheduler",
            {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        ),
        (
            "EulerDiscreteScheduler",
            {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True, **SD},
        ),
    ],
)
def test_a_late_start_stands_at_the_noise_level_of_its_first_row(cls, options):
    model = config(getattr(diffusers, cls), **options)
    table = TableCompiler(model).table(f"{default_name(model)}:10:4")
    scheduler = getattr(diffusers, cls)(**options)
    scheduler.set_timesteps(10)
    first = len(scheduler.timesteps) - len(table)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps[first:].double().numpy())
    begin = scheduler.sigmas[first].item()
    in_flow = "Flow" in cls or cls.startswith("MiniMax") or options.get("use_flow_sigmas")
    assert table.init_sigma == pytest.approx(begin, rel=1e-5)
    assert table.init_alpha == pytest.approx(1 - begin if in_flow else 1.0, rel=1e-5)


def test_a_late_start_of_more_steps_than_the_schedule_has_is_refused():
    with pytest.raises(InputError, match="10 noise steps, but its schedule has 9"):
        TableCompiler(config(diffusers.MiniMaxH3Scheduler)).table("MiniMaxH3Scheduler:10:10")


def test_negative_timesteps_are_refused_where_they_index_training_timesteps_only():
    v = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "use_exponential_sigmas": True, **SD}
    model = config(diffusers.EulerDiscreteScheduler, timestep_type="continuous", **v)
    assert continuous(model)
    assert TableCompiler(model).table("euler:8").timesteps.min() < 0
    with pytest.raises(InputError, match="ends at timestep -1"):
        TableCompiler(config(diffusers.DDIMScheduler, timestep_spacing="trailing")).table("ddim:61")


# Learned variance


@pytest.mark.parametrize(
    "cls", ["DDPMScheduler", "DDPMParallelScheduler", "DPMSolverMultistepScheduler", "UnCLIPScheduler"]
)
@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_a_learned_variance_becomes_the_fixed_one_of_the_mean_channels(cls, variance_type, tmp_path):
    cls = getattr(diffusers, cls)
    model = saved(cls, tmp_path, variance_type=variance_type)
    assert learned_variance(model)
    assert not learned_variance(saved(cls, tmp_path))
    fixed = {"variance_type": "fixed_small"} if "DDPM" in cls.__name__ else {}

    def doubled(x, timestep):  # what the network says: means, then variances
        return torch.cat([network(x, timestep), torch.full_like(x, 7.0)], dim=1)

    table = TableCompiler(model).table(f"{default_name(model)}:12")
    x = table.init_sigma * torch.from_numpy(normal(SEEDS, 0, SHAPE)).double()
    scheduler = cls(**fixed)
    scheduler.set_timesteps(12)
    expected = run_diffusers(scheduler, scheduler.timesteps, lambda x, t: doubled(x, t)[:, :2], x, seeds=SEEDS)
    ours = sample(lambda x, t: doubled(x, t[0])[:, :2], table, x, (), seeds=SEEDS)
    assert float((ours - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert make_scheduler("ddim", config(variance_type=variance_type)).config.prediction_type == "epsilon"


# Configs that are wrong


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (config() | {"beta_start": "0.1"}, "beta_start is '0.1', but DDPMScheduler expects a number"),
        (config() | {"clip_sample": "false"}, "clip_sample is 'false', but DDPMScheduler expects true or false"),
        (config() | {"beta_schedule": 3}, "beta_schedule is 3, but DDPMScheduler expects a text"),
        (config() | {"num_train_timesteps": 0}, "num_train_timesteps is 0, but DDPMScheduler expects 1 to"),
        (config() | {"num_train_timesteps": 10**12}, "num_train_timesteps is 1000000000000, but"),
        (config() | {"trained_betas": "abc"}, "DDPMScheduler refuses the model's scheduler config"),
        (config() | {"beta_strat": 0.1}, "DDPMScheduler has no option 'beta_strat' .here 0.1., nor has any class"),
        (config() | {"predict_epsilon": False}, None),
        ({"_class_name": "DDPMScheduler", "predict_epsilon": False}, "prediction_type 'sample'"),
        (config() | {"sigma_data": 0.5}, "DDPMScheduler has no sigma_data, but .*sigma_data=0.5"),
        (config(diffusers.IPNDMScheduler) | {"prediction_type": "v_prediction"}, "IPNDMScheduler has no prediction_type"),
        (config(diffusers.PNDMScheduler) | {"rescale_betas_zero_snr": True}, "PNDMScheduler has no rescale_betas"),
        (config(diffusers.FlowMatchEulerDiscreteScheduler, use_dynamic_shifting=True), "use_dynamic_shifting=True"),
        (
            config(diffusers.UniPCMultistepScheduler) | {"use_dynamic_shifting": True, "use_flow_sigmas": True}
            | {"prediction_type": "flow_prediction"},
            "use_dynamic_shifting=True",
        ),
        (config(diffusers.FlowMatchLCMScheduler, scale_factors=[1.0, 2.0]), "scale_factors changes the size"),
        (config(diffusers.LCMScheduler, original_inference_steps=4), "original_steps"),
        ({"_class_name": "FlaxDDIMScheduler"}, "no longer has Flax classes; DDIMScheduler is its PyTorch"),
        ({"_class_name": "AmusedScheduler"}, "AmusedScheduler samples discrete tokens"),
        # harmless: private keys, empty values, options of other classes that from_config passes on
        (config() | {"_x": 3, "unheard_of": None, "also": False, "tensor_format": "pt", "set_alpha_to_one": True}, None),
        (config(diffusers.EulerDiscreteScheduler) | {"skip_prk_steps": True, "sample_max_value": 1.0}, None),
        (config(diffusers.EulerAncestralDiscreteScheduler) | {"use_karras_sigmas": True}, None),
    ],
)  # fmt: skip
def test_a_config_that_its_class_does_not_understand_is_refused_by_key(model, message):
    def compile_it():
        return TableCompiler(model).table(f"{default_name(model)}:12")

    if message is None:
        compile_it()
        return
    with pytest.raises(InputError, match=message) as caught:
        compile_it()
    assert "\n" not in str(caught.value)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2000), st.floats(), st.text(max_size=5), st.just([]), st.just([0.1, 0.2]),
    st.just({"a": 1}), st.just("v_prediction"), st.just("trailing"), st.just([[1]]),
)  # fmt: skip
FUZZED = [name for name in scheduler_names() if name not in REFUSED]
KEYS = sorted({key for name in FUZZED for key in config(getattr(diffusers, name)) if key != "_class_name"})


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from([*FUZZED, *sorted(REFUSED)]),
    changes=st.dictionaries(st.one_of(st.sampled_from(KEYS), st.text(max_size=4)), VALUES, max_size=3),
    own=st.booleans(),
    key=st.sampled_from(["ddim:4", "dpmpp-2m:4:2", "flow-match-euler:4", "EDMEulerScheduler:4", "euler-karras:4"]),
)
def test_no_config_is_a_traceback(name, changes, own, key):
    model = {**(config(getattr(diffusers, name)) if name in FUZZED else {"_class_name": name}), **changes}
    attempt(lambda: TableCompiler(model).table(f"{default_name(model)}:4" if own else key))


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("EDMEulerScheduler", {}),
        ("IPNDMScheduler", {}),
        ("MiniMaxH3Scheduler", {}),
        ("CMStochasticIterativeScheduler", {}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction", **SD}),
    ],
)
def test_a_strip_needs_training_timesteps(cls, options):
    from fastgen.generate.strips import StripPlan

    model = config(getattr(diffusers, cls), **options)
    table = TableCompiler(model).table(f"{default_name(model)}:8")
    with pytest.raises(InputError, match="has no training timesteps"):
        StripPlan.of(table, [500, 0], 1000)
    for other in ("FlowMatchEulerDiscreteScheduler", "KDPM2DiscreteScheduler"):
        model = config(getattr(diffusers, other))
        for steps in (1, 8):
            StripPlan.of(TableCompiler(model).table(f"{default_name(model)}:{steps}"), [500, 0], 1000)
