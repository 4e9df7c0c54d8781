"""What a run is made of beside its pipeline, in plain values that can be sent to another process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fastgen.generate.requests import Request
from fastgen.generate.run import Run
from fastgen.generate.start import StartSource, late_start

if TYPE_CHECKING:
    from fastgen.generate.runner import ModelRunner


@dataclass(frozen=True)
class Recipe:
    """`sampling`: arguments of `ModelRunner.settings`; `late`: those of `start.late_start`; `strip`: its timesteps.
    `from_noise`: images start from noise also where there is an index."""

    requests: Sequence[Request]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    late: Mapping[str, Any] = field(default_factory=dict)
    strip: Sequence[int] | None = None
    from_noise: bool = False

    def run(self, pipeline: ModelRunner, source: StartSource | None) -> Run:
        """The run on a pipeline. `source`: gives images their start; None: they start from noise. Raises InputError as
        `late_start` and `Run` do."""
        settings = pipeline.settings(**self.sampling)
        source = None if self.from_noise else source
        settings, start = late_start(source, pipeline, self.requests, settings, **self.late)
        return Run(pipeline, self.requests, settings, start, strip=self.strip)
