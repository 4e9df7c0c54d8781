"""What holds for every class of UNet that takes labels: its ONNX graph, and bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fastgen.files.names import ICLEVR_OBJECTS
from fastgen.models.folder import load_model
from fastgen.models.precision import in_precision

LABELS = len(ICLEVR_OBJECTS)


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Samples (B, 3, 16, 16), timesteps (B,) from 0 to 999, multi-hot labels (B, LABELS)."""
    generator = torch.Generator().manual_seed(batch)
    labels = (torch.rand(batch, LABELS, generator=generator) < 0.1).float()
    return torch.randn(batch, 3, 16, 16, generator=generator), torch.linspace(0, 999, batch), labels


def check_onnx_graph(folder: Path, path: Path, batch: int) -> None:
    """The graph at `path`, exported if it is not there, computes what the model in `folder` does."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    from export.onnx import export_onnx

    model = load_model(folder)
    if not path.exists():
        export_onnx(model.networks()["unet"], model.signatures()["unet"], path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors = inputs(batch)
    names = [tensor.name for tensor in model.signatures()["unet"].inputs]
    found = session.run(None, {n: x.numpy() for n, x in zip(names, tensors, strict=True)})[0]
    with torch.no_grad():
        expected = model.networks()["unet"](*tensors)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-5)


def check_bf16(folder: Path) -> None:
    unet = load_model(folder).networks()["unet"]
    x, timesteps, labels = inputs(4)
    with torch.no_grad():
        exact, rounded = unet(x, timesteps, labels), in_precision(unet, "bf16")(x, timesteps, labels)
    assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.999
