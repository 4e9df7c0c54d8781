"""What a network sees while its model makes images: the inputs that quantisation is calibrated with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from export.reference import possible_steps, sample_requests
from fastgen.engines.eager.engine import Engine as Eager
from fastgen.errors import InputError
from fastgen.files.jsonfiles import located
from fastgen.generate.conditions import check_requests
from fastgen.generate.pipeline import Pipeline
from fastgen.generate.requests import Request, parse_requests
from fastgen.generate.run import Run
from fastgen.generate.settings import Settings
from fastgen.models.signatures import QUANTISED

if TYPE_CHECKING:
    from fastgen.models.condition import Condition
    from fastgen.models.folder import Model

# Of the model's own solver, over its whole schedule, as what layers see changes with the noise: the first number it can do.
STEPS = (8, 16, 32)
LEAST, MOST = 8, 16  # requests
Span = tuple[float, float]  # the smallest and the largest number, not above and not below 0
Rows = list[tuple[np.ndarray, ...]]  # one row of every input of a network, (1, ...), in the order of its signature


def calibration_requests(path: Path | None, condition: Condition) -> list[Request]:
    """The requests whose images quantisation is calibrated with: of a request file at most `MOST`, evenly spread over it; by
    default those of the certificate. Raises InputError for a file of another kind of model, or with fewer than `LEAST`."""
    if path is None:
        return sample_requests(condition)
    with located(f"--calibration {path}"):
        requests = parse_requests(path).known(condition.names)
        check_requests(requests, condition)
        if len(requests) < LEAST:
            raise InputError(f"holds {len(requests)} requests; calibration needs at least {LEAST}")
    places = np.linspace(0, len(requests) - 1, min(MOST, len(requests))).round().astype(int)
    return [requests[i] for i in places]


@dataclass(frozen=True)
class Calibration:
    """What networks see while their model makes images: network -> `rows`, inputs; network -> layer -> `spans`, the smallest
    and the largest number of the layer's own inputs, for convolutions and linear layers in the order in which they run."""

    rows: Mapping[str, Rows]
    spans: Mapping[str, Mapping[str, Span]]


def calibrate(model: Model, requests: Sequence[Request]) -> Calibration:
    """Make images for these requests with eager fp32 and the model's own solver and guidance, in `STEPS` steps. The UNet sees
    every step with and without the condition, the VAE decoder the final latents."""
    recorder = Recorder(model)
    sampling = model.spec.sampling
    run = Run(
        Pipeline(model, recorder),
        requests,
        Settings(sampling.scheduler, possible_steps(model, STEPS), sampling.guidance_scale),
    )
    with ExitStack() as stack:
        spans = {name: stack.enter_context(input_spans(model.networks()[name])) for name in recorder.rows}
        for batch in run.batches(len(requests)):
            run.images(batch)
    return Calibration(recorder.rows, spans)


@contextmanager
def input_spans(module: nn.Module) -> Iterator[dict[str, Span]]:
    """Layer -> the span of its inputs: of those that run within the block, in the order in which they run."""
    spans: dict[str, Span] = {}

    def hook(name: str) -> Any:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            low, high = spans.get(name, (0.0, 0.0))
            least, most = inputs[0].detach().aminmax()
            spans[name] = min(low, float(least)), max(high, float(most))

        return keep

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers(module).items()]
    try:
        yield spans
    finally:
        for handle in handles:
            handle.remove()


def layers(module: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """What eight bits are for: a network's convolutions and linear layers, by their names."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Conv2d | nn.Linear)}


class Recorder(Eager):
    """Engine `eager` in fp32 on a CPU, which keeps what the networks that are quantised get."""

    def __init__(self, model: Model) -> None:
        super().__init__(model, device="cpu", dtype="fp32")
        self.rows: dict[str, Rows] = {name: [] for name in QUANTISED if name in model.spec.signatures}

    def run(self, network: str, *inputs: Any) -> tuple[Any, ...]:
        if network in self.rows:
            arrays = [self.numpy(x).copy() for x in inputs]
            self.rows[network] += [tuple(x[i : i + 1] for x in arrays) for i in range(len(arrays[0]))]
        return super().run(network, *inputs)


def stratified(rows: Rows, count: int) -> Rows:
    """`count` of the rows, evenly spread over the order in which they came: over the steps, and over both conditions."""
    places = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[i] for i in places]


def cropped(rows: Rows, most: int) -> Rows:
    """Latents (1, C, h, w) cut to the middle `most` x `most`: the decoder's memory grows with their area."""
    cut: Rows = []
    for (latent,) in rows:
        top, left = (max(0, (size - most) // 2) for size in latent.shape[2:])
        cut.append((np.ascontiguousarray(latent[:, :, top : top + most, left : left + most]),))
    return cut
