"""Engines that run plans built beforehand: why this machine can neither build nor run them, and what it can do instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fastgen.engines import built_by, bundle_engines, missing_packages
from fastgen.engines.trt import platform
from fastgen.engines.trt.product import PRODUCTS, RTX
from fastgen.errors import NotReadyError

if TYPE_CHECKING:
    from fastgen.engines.doctor import MachineReport
    from fastgen.engines.doctor.diagnosis import Problem


@dataclass(frozen=True)
class Obstacle:
    """What is in the way of an engine. `problems`: what `fastgen doctor` says, the decisive one first; `gpu`: whether a GPU is
    here that its plans would run on; `rtx`: what TensorRT for RTX can do here instead."""

    engine: str
    problems: list[Problem]
    gpu: bool
    rtx: Literal["runs", "builds"] | None = None

    @property
    def reasons(self) -> str:
        """All problems, each with what helps."""
        return "; ".join(map(str, self.problems))

    def refusal(self, model: str) -> NotReadyError:
        """The error of a command that wants to run the engine on `model`, the words that name it to `fastgen export`."""
        option = built_by(self.engine)
        parts = [f"engine {self.engine} is not ready: {self.reasons}"]
        if self.gpu:
            parts.append(f"then `{export_command(model, option)}` builds its plans")
        elif self.engine != RTX.engine:  # whose plans are built anywhere: the doctor has said so
            parts.append(f"there `{export_command(model, option)}` builds its plans")
        if self.rtx == "runs":
            parts.append(f"or `{export_command(model, RTX.option)}` and --engine {RTX.engine}, which is ready here")
        elif self.rtx == "builds":
            parts.append(
                f"`{export_command(model, RTX.option)}` here builds plans for RTX cards (--engine {RTX.engine})"
            )
        return NotReadyError("; ".join(parts) + ready_now())


def obstacle(name: str) -> Obstacle | None:
    """Why an engine that runs plans of a TensorRT product is not ready here, as `fastgen doctor` finds it; None where it is
    ready, and for other engines. Takes as long as importing torch."""
    from fastgen.engines.doctor import examine
    from fastgen.engines.trt.problems import hardware_problem

    product = next((product for product in PRODUCTS.values() if product.engine == name), None)
    if product is None:
        return None
    other = [] if product is RTX or missing_packages(RTX.engine) else [RTX.engine]
    report = examine([name, *other])
    problems = [problem for problem in report.verdicts[0].problems if problem.scope == "engine"]
    if not problems:
        return None
    gpu = hardware_problem(product, report.machine) is None
    return Obstacle(name, problems, gpu, _rtx(report) if other else None)


def check_ready(name: str | None, model: str) -> None:
    """NotReadyError, as `Obstacle.refusal` words it, for an engine whose plans cannot run here at all. Takes no time where the
    driver and the packages are there: what else is in the way is found when the engine is opened. `model`: see `refusal`."""
    if name is None or built_by(name) is None:
        return
    if (missing_packages(name) or platform.driver_cuda() is None) and (found := obstacle(name)):
        raise found.refusal(model)


def export_command(model: str, option: str | None) -> str:
    """The `fastgen export` of `model`, or where it is empty of the latest run, that builds plans."""
    return " ".join(filter(None, ["fastgen export", model, option]))


def ready_now() -> str:
    """The engines for bundles that need no plans and are installed, as the end of a sentence; empty where there is none."""
    names = [f"--engine {engine.name}" for engine in bundle_engines() if engine.built_by is None]
    return f"; {' or '.join(names)} runs here now" if names else ""


def _rtx(report: MachineReport) -> Literal["runs", "builds"] | None:
    """What TensorRT for RTX, which is installed, can do on this machine: without any GPU it still builds."""
    if report.verdicts[1].ready:
        return "runs"
    builds = not report.machine.gpus and report.machine.library(RTX.module).works
    return "builds" if builds else None
