"""Networks of a model -> ONNX files (fp32, dynamic batch)."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from export.rewrite import attention, fuse_attention, subpixel_upsampling
from fastgen.engines.ort import FUSED
from fastgen.errors import FastgenError
from fastgen.signatures import BATCH, Signature

TRACED_BATCH = 2  # 1 would be specialised: the batch axis frozen


def export_onnx(module: nn.Module, signature: Signature, path: Path) -> None:
    """Trace `module` with the inputs of its signature and write `path`, its weights in `path`.data, and beside them the graph
    with fused attention that engine ort runs, if there is any to fuse.

    Raises FastgenError when torch cannot export it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = signature.sample_inputs(TRACED_BATCH, np.random.default_rng(0))
    tensors = tuple(torch.from_numpy(inputs[t.name]) for t in signature.inputs)
    try:
        with _quiet(), subpixel_upsampling(module):
            program = torch.onnx.export(
                module,
                tensors,
                input_names=[t.name for t in signature.inputs],
                output_names=[t.name for t in signature.outputs],
                dynamic_shapes=tuple({0: torch.export.Dim(BATCH, min=1)} for _ in signature.inputs),
                dynamo=True,
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
                optimize=True,
                verbose=False,
            )
            assert program is not None
            _strip(program.model)
            program.save(path, external_data=True)
            model = ir.load(path)
            if fuse_attention(model):
                ir.save(model, path.with_name(FUSED))
    except OSError as error:
        raise FastgenError(f"{path}: cannot be written: {error.strerror or error}") from None
    except torch.onnx.OnnxExporterError as error:
        raise FastgenError(f"{path.parent.name}: torch {torch.__version__} cannot export it: {error}") from error


def _strip(model: Any) -> None:
    """Drop the exporter's notes (source lines, paths of this machine): they double the file and differ between machines."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            value.doc_string = None
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.doc_string = model.doc_string = None


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter's progress prints and deprecation warnings are not the user's concern."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)
