"""Scheduler names -> diffusers schedulers that keep the noise schedule the model was trained on."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from fastgen.errors import InputError, first_line, unknown
from fastgen.files.installing import hint
from fastgen.files.jsonfiles import brief
from fastgen.files.records import named_value

SOLVERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("DDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "pndm-prk": ("PNDMScheduler", {"skip_prk_steps": False}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp-3m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 3}),
    "dpmpp-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpmpp-2s": ("DPMSolverSinglestepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "tcd": ("TCDScheduler", {}),
    "sa-solver": ("SASolverScheduler", {}),
    "flow-match-euler": ("FlowMatchEulerDiscreteScheduler", {}),
}
# What diffusers' classes assume where a config says nothing, for the options that tell names apart.
CLASS_DEFAULTS = {"skip_prk_steps": False, "algorithm_type": "dpmsolver++", "solver_order": 2}

# Those of SOLVERS' classes that have no use_karras_sigmas. diffusers saves the option with them if the config that they were
# made from had it, and ignores it.
WITHOUT_KARRAS: tuple[str, ...] = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerAncestralDiscreteScheduler",
    "LCMScheduler",
)
WITHOUT_KARRAS += ("TCDScheduler",)

_TOKENS = "samples discrete tokens, which are no numbers that a solver table could add up"
_BROWNIAN = (
    "needs the Brownian noise of torchsde, which joins the noise of several rows; a solver table's rows are apart"
)
_INVERSE = "runs the other way, from a picture to noise"
_STAGES = "samples in stages of growing size, a schedule for each"
# Classes that cannot become a solver table, whatever their options, and why. Others are refused where probing them fails.
REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CosineDPMSolverMultistepScheduler": _BROWNIAN,
    "DPMSolverSDEScheduler": _BROWNIAN,
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "HeliosScheduler": _STAGES,
    "HeliosDMDScheduler": _STAGES,
    "CogVideoXDPMScheduler": "takes two timesteps and the last clean sample, which only CogVideoX's pipeline passes",
    "DDPMWuerstchenScheduler": "takes ratios from 1 to 0, one per picture, as timesteps, which only Wuerstchen's networks know",
    "KarrasVeScheduler": "evaluates the network again within a step, at a state that its own pipeline passes on",
    "PiflowScheduler": "takes a network that predicts a grid of velocities, and is not linear in them",
    "RePaintScheduler": "paints into a given picture: its step needs original_image and mask",
    "RFD4ProteinaScheduler": "samples the coordinates of proteins",
    "SCMScheduler": "takes angles as timesteps, and its pipeline converts what the network gets and gives",
    "ScoreSdeVeScheduler": "corrects the state in steps whose size comes from norms of the prediction: not linear",
}

# How the training pictures were noised, and what the network is told of it: `noise_process`. A network can be sampled by
# classes of its own process only.
DIFFUSION = "diffusion"
FLOW = "flow matching"
EDM = "EDM preconditioning"
LOG_SIGMA = "diffusion whose timesteps are a quarter of log sigma"
OWN = "noise levels that no other class has"
CONSISTENCY = "the boundary conditions of consistency models"
FLOW_CLASSES: tuple[str, ...] = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
)
FLOW_CLASSES += ("LTXEulerAncestralRFScheduler",)
EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
# diffusion classes with the options use_flow_sigmas, flow_shift and prediction_type="flow_prediction"
FLOW_SOLVERS = ("dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde", "dpmpp-2s", "unipc", "deis", "sa-solver")
# What --scheduler may be for a process, beside the model's own class.
FITTING: dict[str, tuple[str, ...]] = {
    DIFFUSION: tuple(name for name, (class_name, _) in SOLVERS.items() if class_name not in FLOW_CLASSES),
    FLOW: ("flow-match-euler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", *FLOW_SOLVERS),
    EDM: EDM_CLASSES,
    LOG_SIGMA: ("euler",),
}

# How the model was trained: always kept. diffusers' from_config drops the values that the config leaves at their
# defaults, and the defaults differ: Heun's and LCM's betas are Stable Diffusion's, not DDPM's.
TRAINED: dict[str, tuple[str, ...]] = {
    DIFFUSION: (
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
        "snr_shift_scale",
    ),
    FLOW: ("num_train_timesteps", "prediction_type"),
    EDM: ("num_train_timesteps", "prediction_type", "sigma_min", "sigma_max", "sigma_data", "rho"),
}
# What a class without the option does.
WITHOUT = {"snr_shift_scale": 1.0}
# How it is sampled: kept if the config says so, as diffusers' from_config does; all others are the solver's defaults.
CARRIED = (
    "timestep_spacing",
    "steps_offset",
    "set_alpha_to_one",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "sigma_schedule",
    "shift_terminal",
)
# Keys of a config that neither its class nor any other has any more, and that change nothing.
OBSOLETE = ("noise_sampler_seed", "predict_epsilon", "tensor_format", "timestep_values")
MOST_TRAIN_TIMESTEPS = 1_000_000


def make_scheduler(name: str, config: Mapping[str, Any], *, timestep_spacing: str | None = None) -> Any:
    """The diffusers scheduler called `name`, with the noise schedule of `config`, a model folder's scheduler config.

    `name`: one of SOLVERS, with `-karras` appended for Karras et al.'s noise levels, or a diffusers class name.
    `config`: must hold `_class_name`. A learned variance becomes the class's fixed one: the network's variance channels are
    expected to be dropped. Raises InputError for an unknown name, a missing package, a class that cannot become a solver
    table, a config that its class does not understand, and a noise process or schedule that the class cannot express.
    """
    cls, options = _target(name)
    source, trained = _source(config)
    process = noise_process(source, trained)
    if process == FLOW and trained.get("use_dynamic_shifting"):
        raise InputError(
            f"scheduler {name!r}: use_dynamic_shifting=True shifts the noise levels by mu, which pipelines compute from the "
            f"size of the picture and {source.__name__}'s config does not hold; set it to false and shift to a number"
        )
    if cls is source:
        values = {key: value for key, value in trained.items() if key in _parameters(cls)}
    else:
        defaulted = config.get("_use_default_values")
        explicit = [key for key in config if not (isinstance(defaulted, list) and key in defaulted)]
        values = _carry(name, cls, source, trained, explicit)
    if learned_variance(values):
        del values["variance_type"]
    if timestep_spacing is not None:
        options = {**options, "timestep_spacing": timestep_spacing}
    for key in options:
        if key not in _parameters(cls):
            raise InputError(f"scheduler {name!r}: {cls.__name__} has no option {key}")
    if options.get("use_karras_sigmas") and values.get("use_flow_sigmas"):
        raise InputError(
            f"scheduler {name!r}: {cls.__name__} has Karras et al.'s noise levels for {DIFFUSION}, but this model was trained "
            f"with {FLOW}"
        )
    try:
        return cls(**{**values, **options})
    except Exception as error:  # of any type: a value may be wrong in any way
        words = " ".join(str(error).split()) or first_line(error)
        problem = f"{named_value(config, words)}{cls.__name__} refuses the model's scheduler config"
        raise InputError(f"scheduler {name!r}: {problem}: {words}") from error


def check_name(name: str) -> None:
    """InputError for a name that `make_scheduler` does not know."""
    _target(name)


def noise_process(cls: type, config: Mapping[str, Any]) -> str:
    """How a model with this scheduler was trained to see noise: DIFFUSION, FLOW, EDM, LOG_SIGMA, CONSISTENCY, or OWN if the
    class shares its process with no other.

    `config`: with the defaults of the class filled in. DIFFUSION: x_t = sqrt(a) x0 + sqrt(1 - a) noise with a the
    alphas_cumprod of the betas, or that divided by sqrt(a), and the network gets t. FLOW: x_t = (1 - s) x0 + s noise, and the
    network gets s times num_train_timesteps. EDM: x0 + sigma noise, scaled by functions of sigma_data, and log(sigma) / 4.
    """
    name = cls.__name__
    flow_predicted = config.get("prediction_type", "flow_prediction") == "flow_prediction"
    if REFUSED.get(name) == _STAGES:
        return OWN
    if name in FLOW_CLASSES or config.get("use_flow_sigmas"):
        return FLOW if flow_predicted and not config.get("invert_sigmas") else OWN
    if name in EDM_CLASSES:
        return EDM
    if name == "CMStochasticIterativeScheduler":
        return CONSISTENCY
    if "beta_schedule" not in config or config.get("prediction_type") == "flow_prediction":
        return OWN
    if config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction":
        return LOG_SIGMA
    return DIFFUSION


def learned_variance(config: Mapping[str, Any]) -> bool:
    """Whether the network predicts a variance too, in as many channels again. Tables are made for the others alone."""
    return config.get("variance_type") in ("learned", "learned_range")


def default_name(config: Mapping[str, Any]) -> str:
    """The scheduler name that samples as `config` says: a name of SOLVERS, `-karras` if set, else its `_class_name`."""
    class_name = _class_name(config)
    suffix = "-karras" if config.get("use_karras_sigmas") and class_name not in WITHOUT_KARRAS else ""
    for name, (solver_class, options) in SOLVERS.items():
        if solver_class == class_name and all(config.get(k, CLASS_DEFAULTS[k]) == v for k, v in options.items()):
            return name + suffix
    return class_name + suffix


def import_diffusers() -> Any:
    """The diffusers module. Raises InputError with the install command if it or torch is missing."""
    try:
        import diffusers
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(f"solver tables are compiled with diffusers and torch ({error}); {hint('train')}") from error
    return diffusers


def _target(name: str) -> tuple[Any, dict[str, Any]]:
    """The class a name stands for, and the options the name forces."""
    base = name.removesuffix("-karras")
    class_name, options = SOLVERS.get(base, (base, {}))
    if class_name in REFUSED:
        raise InputError(f"scheduler {name!r} cannot become a solver table: {class_name} {REFUSED[class_name]}")
    cls = _scheduler_class(class_name)
    torch_name = class_name.removeprefix("Flax")
    if cls is None and torch_name != class_name and _scheduler_class(torch_name):
        raise InputError(f"scheduler {name!r}: diffusers no longer has Flax classes; {torch_name} is its PyTorch class")
    if cls is None:
        raise unknown("scheduler", name, [*SOLVERS, "NAME-karras", "a diffusers scheduler class"])
    return cls, {**options, "use_karras_sigmas": True} if base != name else dict(options)


def _source(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of the model's own scheduler, and its config with the defaults of that class filled in."""
    class_name = _class_name(config)
    cls = _scheduler_class(class_name)
    if cls is None:
        raise InputError(f"scheduler config: _class_name is {class_name!r}, expected a diffusers scheduler class")
    parameters = _parameters(cls)
    filled = {key: config.get(key, parameter.default) for key, parameter in parameters.items()}
    for key, value in filled.items():
        if value is inspect.Parameter.empty:
            raise InputError(f"scheduler config: {key} is missing, without which there is no {class_name}")
        _check_type(class_name, key, value, parameters[key].default)
    _check_leftovers(cls, config, noise_process(cls, filled))
    return cls, filled


def _class_name(config: Mapping[str, Any]) -> str:
    class_name = config.get("_class_name")
    if not isinstance(class_name, str):
        raise InputError(f"scheduler config: _class_name is {class_name!r}, expected a diffusers scheduler class")
    return class_name


def _scheduler_class(class_name: str) -> Any:
    """A diffusers scheduler class by name, None if there is none. Raises InputError if it needs a missing package."""
    diffusers = import_diffusers()
    cls = getattr(diffusers, class_name, None) if class_name.isidentifier() else None
    if isinstance(cls, type) and hasattr(cls, "_backends"):  # diffusers' stand-in for a class it cannot import
        missing = ", ".join(package for package in cls._backends if package != "torch")
        raise InputError(f"{class_name} needs packages that are not installed: pip install {missing}")
    return cls if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin) else None


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """The options of a scheduler class by name."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {p.name: p for p in parameters if p.name != "self" and p.kind not in variadic}


def _check_type(class_name: str, key: str, value: Any, default: Any) -> None:
    """A value has the type of the option's default. Those whose default is None are left to the class."""
    if value is None or value is default:
        return
    number = isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value
    fits, expected = True, ""
    if isinstance(default, bool):
        fits, expected = isinstance(value, bool) or (number and value in (0, 1)), "true or false"
    elif isinstance(default, (int, float)):
        fits, expected = number, "a number"
    elif isinstance(default, (str, list)):
        fits, expected = isinstance(value, type(default)), "a text" if isinstance(default, str) else "a list"
    if fits and key == "num_train_timesteps":
        fits, expected = 1 <= value <= MOST_TRAIN_TIMESTEPS and value % 1 == 0, f"1 to {MOST_TRAIN_TIMESTEPS}"
    if not fits:
        raise InputError(f"scheduler config: {key} is {brief(value)}, but {class_name} expects {expected}")


def _check_leftovers(cls: Any, config: Mapping[str, Any], process: str) -> None:
    """Raises InputError for keys that the class lacks: unknown ones, and those that say the model was trained otherwise.

    Options of other classes are common, as from_config passes them on; diffusers ignores them.
    """
    name, parameters = cls.__name__, _parameters(cls)
    if config.get("predict_epsilon") is False and "prediction_type" not in config:
        raise InputError(
            "scheduler config: predict_epsilon=False is how old diffusers said prediction_type 'sample'; say that"
        )
    for key, value in config.items():
        if key in parameters or key.startswith("_") or not value or key in OBSOLETE:
            continue
        if key not in _all_options():
            raise InputError(
                f"scheduler config: {name} has no option {brief(key)} (here {brief(value)}), nor has any class of diffusers"
            )
        predicts = value == "epsilon" or (process == FLOW and value == "flow_prediction")
        if key == "prediction_type" and not predicts:
            raise InputError(f"{name} has no {key}, but the model's scheduler config says {key}={brief(value)}")
        trained = ("trained_betas", "rescale_betas_zero_snr", "snr_shift_scale", "sigma_data")
        if key in trained and value != WITHOUT.get(key):
            raise InputError(f"{name} has no {key}, but the model's scheduler config says {key}={brief(value)}")


@functools.cache
def _all_options() -> frozenset[str]:
    """The options of all scheduler classes of diffusers."""
    diffusers = import_diffusers()
    classes = [getattr(diffusers, name) for name in dir(diffusers) if name.endswith("Scheduler")]
    classes = [cls for cls in classes if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)]
    return frozenset(key for cls in classes for key in _parameters(cls))


def _carry(name: str, cls: Any, source: Any, trained: Mapping[str, Any], explicit: Iterable[str]) -> dict[str, Any]:
    """The options of the model's own scheduler that another class takes over. Raises InputError if it cannot express them."""
    accepted, process = _parameters(cls), noise_process(source, trained)
    values: dict[str, Any] = {}
    if process == FLOW:
        values = _carry_flow(cls, trained, accepted)
    defaults = {key: parameter.default for key, parameter in accepted.items()}
    if process not in TRAINED or noise_process(cls, {**defaults, **values}) != process:
        fitting = [other for other in FITTING.get(process, (source.__name__,)) if other not in REFUSED]
        raise InputError(
            f"scheduler {name!r} ({cls.__name__}) cannot sample this model: it was trained with {process} ({source.__name__}); "
            f"use {' or '.join(filter(None, (', '.join(fitting[:-1]), *fitting[-1:]))) or 'another model'}"
        )
    for key in TRAINED[process]:
        inert = (key, trained.get(key)) in (("prediction_type", "epsilon"), ("prediction_type", "flow_prediction"))
        if trained.get(key) and key not in accepted and not inert and trained[key] != WITHOUT.get(key):
            raise InputError(
                f"{cls.__name__} has no {key}, but the model's scheduler config says {key}={brief(trained[key])}"
            )
    kept = [*TRAINED[process], *(key for key in CARRIED if key in explicit)]
    values |= {key: value for key, value in WITHOUT.items() if key in accepted}
    return values | {key: trained[key] for key in kept if key in trained and key in accepted}


def _carry_flow(cls: Any, trained: Mapping[str, Any], accepted: Mapping[str, Any]) -> dict[str, Any]:
    """The options that make a class flow matching with the model's shift, if it has them."""
    if cls.__name__ not in FLOW_CLASSES and "use_flow_sigmas" not in accepted:
        return {}
    shift = trained.get("shift", trained.get("flow_shift", 1.0))
    key = next((key for key in ("shift", "flow_shift") if key in accepted), None)
    if key is None and shift != 1:
        raise InputError(f"{cls.__name__} has no shift, but the model's scheduler config says shift={shift}")
    values = {} if key is None else {key: shift}
    if "use_flow_sigmas" in accepted:
        values |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return values
