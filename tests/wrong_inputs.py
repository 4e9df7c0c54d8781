"""What every engine refuses to run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from fastgen.errors import InputError


def refuses_wrong_inputs(engine: Any) -> None:
    """Assert that `run` takes no tensor of another dtype or shape, and no other number of them, before anything runs."""
    signature = engine.signatures["unet"]
    sample, timestep, cond = signature.sample_inputs(3, np.random.default_rng(0)).values()
    shapes = [t.with_batch(3) for t in signature.inputs]
    wrong = {
        f"sample is float64 {shapes[0]}, expected float32 {shapes[0]}": (sample.astype(np.float64), timestep, cond),
        f"sample is float32 (3, 2, *), expected float32 {shapes[0]}": (sample[:, :2], timestep, cond),
        "timestep is float32 (1,), expected float32 (3,)": (sample, timestep[:1], cond),
        "timestep is int64 (3,), expected float32 (3,)": (sample, timestep.astype(np.int64), cond),
        f"is float32 {shapes[2][1:]}, expected float32 {shapes[2]}": (sample, timestep, cond[0]),
        "takes 3 inputs, not 2": (sample, timestep),
    }
    for words, inputs in wrong.items():
        with pytest.raises(InputError) as error:
            engine.run("unet", *map(engine.array, inputs))
        pattern = re.escape(words).replace(r"\*", r"[\d, ]+")
        assert re.fullmatch(rf"engine {engine.name}: unet:? .*?{pattern}", str(error.value)), str(error.value)
