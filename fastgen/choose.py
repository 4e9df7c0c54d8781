"""Which engine runs a model when none was asked for."""

from __future__ import annotations

from pathlib import Path

from fastgen import artifacts, machine
from fastgen.bundle import is_bundle, read_bundle
from fastgen.engines import engine_class, has_distribution, missing_packages
from fastgen.engines.base_trt_product import RTX
from fastgen.errors import InputError


def default_engine(folder: Path, device: str | None = None) -> str:
    """For a model folder `eager`, the reference. For a bundle the fastest that is ready for it: `trt` where plans were built
    from it, `trt-rtx` where it holds plans and an RTX card is here, on a GPU `ort`, on a CPU `openvino`; of the latter two the
    one that is installed.

    The choice looks at what is here, installed and built, imports nothing, and tries nothing out: if the engine then cannot
    run, that is an error. Raises InputError when no engine for bundles is installed.
    """
    if not is_bundle(folder):
        return "eager"
    gpu = (device or "cuda").startswith("cuda")
    if gpu and not missing_packages("trt") and _has_plans(folder):
        return "trt"
    if gpu and not missing_packages("trt-rtx") and read_bundle(folder).artifacts("trt-rtx") and _rtx_card():
        return "trt-rtx"
    on_gpu = gpu if device else has_distribution("onnxruntime-gpu")
    order = ("ort", "openvino") if on_gpu else ("openvino", "ort")
    installed = [name for name in order if not missing_packages(name)]
    if not installed:
        raise InputError(f"no engine for bundles is installed: {engine_class('ort').install}")
    return installed[0]


def _rtx_card() -> bool:
    """Whether a card is here that plans of TensorRT for RTX can be built for."""
    return any(gpu.compute_capability in RTX.capabilities for gpu in machine.gpus()[0])


def _has_plans(folder: Path) -> bool:
    """Whether TensorRT plans were ever built from graphs of this bundle."""
    graphs = {file["sha256"] for file in read_bundle(folder).files.values()}
    return any(plan.recipe.fields.get("graph_sha256") in graphs for plan in artifacts.scan("trt")[0])
