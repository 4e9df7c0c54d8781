"""The base class of the two engines on onnxruntime: the bundle's graphs, and the options of sessions on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastgen.engines import base, has_distribution
from fastgen.errors import FastgenError, InputError, one_line
from fastgen.files.installing import Install
from fastgen.files.quiet import verbose
from fastgen.models.bundle_record import AGAIN

if TYPE_CHECKING:
    from pathlib import Path

    from fastgen.engines.doctor.diagnosis import Machine, Problem
    from fastgen.models.bundle import Bundle


def fused_name(graph: str) -> str:
    """`model.onnx` -> `model.ort.onnx`: the same graph and weights with onnxruntime's MultiHeadAttention, instead of matrix
    products and a softmax over all pairs of pixels."""
    return graph.removesuffix(".onnx") + ".ort.onnx"


WARNING, FATAL = 2, 4  # onnxruntime's levels of messages; what ends in an error is raised too
FUSED = fused_name("model.onnx")


def failure(path: str, what: str, error: Exception) -> FastgenError:
    """The error of a graph that onnxruntime refuses to load, or to run: FastgenError where memory ran out, else InputError."""
    import onnxruntime as ort

    text = str(error)
    kind, help_ = (FastgenError, "") if "allocate memory" in text else (InputError, f"; {AGAIN}")
    return kind(f"{path}: onnxruntime {ort.__version__} cannot {what} it: {one_line(text, 120)}{help_}")


class OrtEngine(base.Engine):
    """Runs a bundle's ONNX graphs, those with onnxruntime's own attention operator where the bundle has them."""

    name = "ort"
    source_kind = "bundle"
    packages = ("onnxruntime",)
    install = Install("cpu")

    def set_source(self, source: Bundle, threads: int | None) -> None:
        self.signatures = source.spec.all_signatures if self.splits else source.spec.signatures
        self._bundle, self._threads = source, threads

    @classmethod
    def library_problems(cls, machine: Machine) -> Iterator[Problem]:
        from fastgen.engines.doctor.diagnosis import onnxruntime_problems

        return onnxruntime_problems(machine)

    @classmethod
    def priority(cls, folder: Path, device: str | None) -> int:
        """The first on a GPU that needs nothing built, the last on a CPU."""
        on_gpu = device.startswith("cuda") if device else has_distribution("onnxruntime-gpu")
        return 3 if on_gpu else 1

    def session_options(self) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = WARNING if verbose() else FATAL
        if self._threads:
            options.intra_op_num_threads = self._threads
        return options

    def graph(self, network: str) -> str:
        """Path of a network's ONNX graph in the precision that is executed, verified."""
        path = self._bundle.network(network, self.executed(network))  # verifies the weights, which both graphs share
        fused = f"{network}/{fused_name(path.name)}"
        return str(self._bundle.graph(fused) if fused in self._bundle.files else path)
