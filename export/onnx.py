"""Networks of a model -> ONNX files with a dynamic batch, in fp32, fp16 or bf16."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from export.rewrite import attention, fuse_attention, quick_slices, subpixel_upsampling
from export.shapes import fix_shapes
from fastgen.engines.ort.session import fused_name
from fastgen.errors import FastgenError
from fastgen.models.precision import in_precision
from fastgen.models.signatures import BATCH, Signature

OPSETS = {"fp32": 20, "fp16": 20, "bf16": 22}  # the first with convolutions in bf16 is 22; older readers know 20
TRACED_BATCH = 2  # 1 would be specialised: the batch axis frozen


def export_onnx(module: nn.Module, signature: Signature, path: Path, dtype: str = "fp32") -> None:
    """Trace `module` with the inputs of its signature; write the graph to `path`, its weights to `path`.data, and, where there
    is attention to fuse, the graph with fused attention that engine ort runs beside them.

    `dtype`: the precision it computes in, see `in_precision`; inputs and outputs are float32. Raises FastgenError when torch
    cannot export it, or the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = signature.sample_inputs(TRACED_BATCH, np.random.default_rng(0))
    tensors = tuple(torch.from_numpy(inputs[t.name]) for t in signature.inputs)
    try:
        with _quiet(), quick_slices(), subpixel_upsampling(module):
            traced = in_precision(module, dtype)  # after the rewrite, so that its sums of weights are rounded once
            program = torch.onnx.export(
                traced,
                tensors,
                input_names=[t.name for t in signature.inputs],
                output_names=[t.name for t in signature.outputs],
                dynamic_shapes=_dynamic_shapes(traced, len(tensors)),
                opset_version=OPSETS[dtype],
                dynamo=True,
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: attention},
                optimize=True,
                verbose=False,
            )
            assert program is not None
            fix_shapes(program.model)
            _strip(program.model)
            program.save(path, external_data=True)
            model = ir.load(path)
            if fuse_attention(model):
                ir.save(model, path.with_name(fused_name(path.name)))
    except OSError as error:
        raise FastgenError(f"{path}: cannot be written: {error.strerror or error}") from None
    except torch.onnx.OnnxExporterError as error:
        raise FastgenError(f"{path.parent.name}: torch {torch.__version__} cannot export it: {error}") from error


def _dynamic_shapes(module: nn.Module, inputs: int) -> Any:
    """The batch axis of every input; for torch.export the inputs that `*rest` takes are one parameter, the last.

    The axis has a name and no bounds: diffusers' upsampling branches at 64 rows, and torch traces a network a second time when
    a bound contradicts such a branch.
    """
    shapes = tuple({0: BATCH} for _ in range(inputs))
    parameters = list(inspect.signature(module.forward).parameters.values())
    if parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return shapes
    named = len(parameters) - 1
    return (*shapes[:named], shapes[named:]) if inputs > named else shapes


def _strip(model: Any) -> None:
    """Drop the exporter's notes (source lines, local paths): they double the file and differ between machines."""
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
    """Silence the exporter's progress prints and deprecation warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
