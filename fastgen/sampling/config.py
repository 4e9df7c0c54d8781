"""The scheduler_config.json of a model: types and bounds of the fields that diffusers' scheduler classes share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta

from fastgen.files.records import MAX_STEPS, Name, Record, Steps, to_record

Beta = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[float, Meta(gt=0, le=1)]


class NoiseSchedule(Record, frozen=True, forbid_unknown_fields=False):
    """How the training pictures were noised. The scheduler's own class checks the names, and the fields that are not here."""

    _class_name: Name | None = None
    num_train_timesteps: Steps = 1000
    beta_start: Positive = 0.0001
    beta_end: Positive = 0.02
    beta_schedule: Name | None = None
    trained_betas: Annotated[tuple[Beta, ...], Meta(min_length=1, max_length=MAX_STEPS)] | None = None
    prediction_type: Name | None = None
    timestep_spacing: Literal["linspace", "leading", "trailing"] | None = None
    steps_offset: Annotated[int, Meta(ge=0, le=MAX_STEPS)] = 0
    solver_order: Annotated[int, Meta(ge=1, le=16)] = 1

    def __post_init__(self) -> None:
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            found = f"found {len(self.trained_betas)} numbers"
            raise ValueError(f"trained_betas: {found}, expected num_train_timesteps = {self.num_train_timesteps}")


def check_schedule(config: Any, place: object) -> dict[str, Any]:
    """`config`, where it is a scheduler config within the bounds. Raises InputError, which begins with `place`."""
    to_record(config, NoiseSchedule, place)
    return dict(config)
