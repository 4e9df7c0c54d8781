"""Scheduler names -> diffusers schedulers that keep the noise schedule the model was trained on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from fastgen.errors import InputError, unknown
from fastgen.files.installing import hint

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

# How the model was trained: always kept. diffusers' from_config drops the values that the config leaves at their
# defaults, and the defaults differ: Heun's and LCM's betas are Stable Diffusion's, not DDPM's.
TRAINED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
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
)


def make_scheduler(name: str, config: Mapping[str, Any], *, timestep_spacing: str | None = None) -> Any:
    """The diffusers scheduler called `name`, with the noise schedule of `config`, a model folder's scheduler config.

    `name`: one of SOLVERS, with `-karras` appended for Karras et al.'s noise levels, or a diffusers class name.
    `config`: must hold `_class_name`. Raises InputError for an unknown name, a missing package, or a noise schedule
    that the class cannot express.
    """
    cls, options = _target(name)
    source, trained = _source(config)
    _check_same_process(name, cls.__name__, source.__name__, trained)
    accepted = set(inspect.signature(cls.__init__).parameters)
    explicit = set(config) - set(config.get("_use_default_values", ()))
    if cls is source:
        values = {key: value for key, value in trained.items() if key in accepted}
    else:
        values = _carry(cls, trained, accepted, explicit)
    if timestep_spacing is not None:
        options = {**options, "timestep_spacing": timestep_spacing}
    for key in options:
        if key not in accepted:
            raise InputError(f"scheduler {name!r}: {cls.__name__} has no option {key}")
    try:
        return cls(**{**values, **options})
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise InputError(f"scheduler {name!r}: {cls.__name__} refuses the model's scheduler config: {error}") from error


def default_name(config: Mapping[str, Any]) -> str:
    """The scheduler name that samples as `config` says: a name of SOLVERS, `-karras` if set, else its `_class_name`."""
    class_name = _class_name(config)
    suffix = "-karras" if config.get("use_karras_sigmas") else ""
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
    cls = _scheduler_class(class_name)
    if cls is None:
        raise unknown("scheduler", name, [*SOLVERS, "NAME-karras", "a diffusers scheduler class"])
    return cls, {**options, "use_karras_sigmas": True} if base != name else dict(options)


def _source(config: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class of the model's own scheduler, and its config with the defaults of that class filled in."""
    class_name = _class_name(config)
    cls = _scheduler_class(class_name)
    if cls is None:
        raise InputError(f"scheduler config: _class_name is {class_name!r}, expected a diffusers scheduler class")
    defaults = {k: v.default for k, v in inspect.signature(cls.__init__).parameters.items() if k != "self"}
    return cls, {key: config.get(key, default) for key, default in defaults.items()}


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


def _check_same_process(name: str, class_name: str, source_name: str, trained: Mapping[str, Any]) -> None:
    """A flow-matching model cannot be sampled with a diffusion scheduler, nor the reverse."""
    flow = "FlowMatch" in source_name or trained.get("prediction_type") == "flow_prediction"
    if class_name != source_name and flow != ("FlowMatch" in class_name):
        kind = "flow matching" if flow else "diffusion"
        raise InputError(f"scheduler {name!r} ({class_name}) cannot sample this model: it was trained with {kind}")


def _carry(cls: Any, trained: Mapping[str, Any], accepted: set[str], explicit: set[str]) -> dict[str, Any]:
    """The options of the model's own scheduler that another class takes over."""
    for key in TRAINED:
        inert = key == "prediction_type" and trained.get(key) == "epsilon"
        if trained.get(key) and key not in accepted and not inert:
            raise InputError(f"{cls.__name__} has no {key}, but the model's scheduler config says {key}={trained[key]}")
    keys = [*TRAINED, *(key for key in CARRIED if key in explicit)]
    if str(trained.get("variance_type")).startswith("learned"):
        keys.append("variance_type")
    return {key: trained[key] for key in keys if key in trained and key in accepted}
