"""The noise schedule of an imported model: the user or the preset names it; it is never guessed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastgen.errors import InputError, unknown
from fastgen.files.jsonfiles import read_json
from fastgen.sampling.config import check_schedule

SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
CHOICES = (
    "linear[:BETA_START:BETA_END], scaled_linear:BETA_START:BETA_END, squaredcos_cap_v2, sigmoid:BETA_START:BETA_END, "
    "KEY=VALUE,... of a DDPMScheduler, or a scheduler_config.json"
)


def choose_schedule(
    text: str | None,
    preset: Mapping[str, Any] | None,
    *,
    latents: bool,
    num_train_timesteps: int | None = None,
    prediction_type: str | None = None,
) -> dict[str, Any]:
    """The scheduler config of a model that was trained elsewhere: that of `text`, else the preset's.

    `text`: `linear`, `scaled_linear:0.00085:0.012`, `squaredcos_cap_v2`, `beta_schedule=linear,clip_sample=false`, or the path
    of a scheduler_config.json (or of its folder). `latents`: of a model that works on latents. Raises InputError where both are
    missing: weights do not tell the schedule that they were trained on, and with another one sampling gives worse images
    without an error."""
    if text is not None:
        config = _read(text, latents)
    elif preset:
        config = dict(preset)
    else:
        raise InputError(
            "the noise schedule that the model was trained on is not in its weights, and another one samples without an "
            f"error, only worse: name it with --schedule ({CHOICES}) or take a preset's with --as"
        )
    if num_train_timesteps is not None:
        config["num_train_timesteps"] = num_train_timesteps
    if prediction_type is not None:
        if prediction_type not in PREDICTIONS:
            raise unknown("prediction type", prediction_type, PREDICTIONS)
        config["prediction_type"] = prediction_type
    return config


def describe(config: Mapping[str, Any]) -> str:
    """One line: `DDPMScheduler, linear betas 0.0001 to 0.02, 1000 timesteps, epsilon`."""
    from fastgen.sampling.schedulers import make_scheduler

    full = make_scheduler(str(config["_class_name"]), config).config
    name, betas, count = full.get("beta_schedule"), "", full.get("num_train_timesteps")
    if name not in (None, "squaredcos_cap_v2"):
        betas = f" betas {full['beta_start']:g} to {full['beta_end']:g}"
    words = [config["_class_name"], f"{name}{betas}" if name else None, f"{count} timesteps" if count else None]
    words += [full.get("prediction_type"), "clip_sample" if full.get("clip_sample") else None]
    return ", ".join(str(word) for word in words if word)


def _read(text: str, latents: bool) -> dict[str, Any]:
    path = Path(text)
    if path.is_dir():
        inside = [path / part for part in ("scheduler_config.json", "scheduler/scheduler_config.json")]
        path = next((file for file in inside if file.is_file()), inside[0])
    if path.suffix == ".json":
        config = check_schedule(read_json(path, infinity=True), path)
        if not isinstance(config.get("_class_name"), str):
            raise InputError(f"{path}: expected a scheduler_config.json with _class_name")
        return config
    values = _pairs(text) if "=" in text else _betas(text)
    clip = {"clip_sample": False} if latents else {}  # by default DDPMScheduler clips, as is right for pixels
    return {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, **clip, **values}


def _betas(text: str) -> dict[str, Any]:
    """`SCHEDULE[:BETA_START:BETA_END]` -> arguments of DDPMScheduler."""
    name, *betas = text.split(":")
    if name not in SCHEDULES:
        raise unknown("schedule", text, [*SCHEDULES, "KEY=VALUE,...", "a scheduler_config.json"])
    values: dict[str, Any] = {"beta_schedule": name}
    if name == "squaredcos_cap_v2" and not betas:
        return values
    if name != "linear" and not betas:
        both = "SD's are scaled_linear:0.00085:0.012, diffusers' defaults " if name == "scaled_linear" else ""
        raise InputError(f"--schedule {text}: its betas differ between projects; name them: {both}{name}:0.0001:0.02")
    start, end = (_number(beta, text) for beta in betas or ("0.0001", "0.02")) if len(betas) in (0, 2) else (0.0, 0.0)
    if not 0 < start <= end < 1:
        raise InputError(f"--schedule {text}: expected {name}:BETA_START:BETA_END, 0 < start <= end < 1")
    return values | {"beta_start": start, "beta_end": end}


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--schedule {where}: {text!r} is not a number") from None


def _pairs(text: str) -> dict[str, Any]:
    """`KEY=VALUE,...` -> arguments of DDPMScheduler."""
    import inspect

    from fastgen.sampling.schedulers import import_diffusers

    known = set(inspect.signature(import_diffusers().DDPMScheduler.__init__).parameters) - {"self"}
    values: dict[str, Any] = {}
    for pair in text.split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or not value:
            raise InputError(f"--schedule {text}: {pair!r} is not KEY=VALUE")
        if key not in known:
            raise unknown("key of --schedule", key, sorted(known))
        values[key] = _value(value)
    if "beta_schedule" not in values:
        raise InputError(f"--schedule {text}: beta_schedule is missing, such as beta_schedule=linear")
    return values


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
