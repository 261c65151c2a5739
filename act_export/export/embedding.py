"""The lookup of tokens as a model of its own, for exports that take embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from act_export.errors import ActExportError
from act_export.onnx_file.names import BATCH, SEQUENCE
from act_export.onnx_file.precision import element_type
from act_export.onnx_file.save import check_model, save_model
from act_export.ops.functions import OPSET
from act_export.version import __version__

if TYPE_CHECKING:
    from act_export.checkpoint.load import Checkpoint

_IR_VERSION = 10


def write_embedding(checkpoint: Checkpoint, path: Path, *, dtype: str = "float32") -> None:
    """Writes `input_ids` (batch, sequence) -> `inputs_embeds` (batch, sequence, hidden size), one Gather.

    Args:
        checkpoint: The model.
        path: The ONNX file; its weights go to `path` + ".data".
        dtype: Of the model that takes the embeddings; int8 and int4, which are of weights, take float32.

    Raises:
        ActExportError: If its embedding is more than a table, or a table and a scale; if the disk is too full.
    """
    stored = element_type(dtype)
    weight, scale = _weight_and_scale(checkpoint.model.get_input_embeddings(), checkpoint.model.config.model_type)
    ids = _value("input_ids", ir.DataType.INT64, [BATCH, SEQUENCE])
    table = _value("embed_tokens.weight", stored, list(weight.shape))
    table.const_value = _table(weight, scale, stored)
    lookup = ir.node("Gather", [table, ids])
    lookup.outputs[0].name = "inputs_embeds"
    lookup.outputs[0].type = ir.TensorType(stored)
    lookup.outputs[0].shape = ir.Shape([BATCH, SEQUENCE, weight.shape[1]])
    graph = ir.Graph(
        [ids], lookup.outputs, nodes=[lookup], initializers=[table], opset_imports={"": OPSET}, name="embedding"
    )
    model = ir.Model(graph, ir_version=_IR_VERSION, producer_name="act-export", producer_version=__version__)
    save_model(model, path)
    check_model(path)


def _weight_and_scale(module: nn.Module, architecture: str) -> tuple[Tensor, float]:
    """The table and what it is multiplied by, after a look at what the module makes of a few tokens."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.ndim == 2:
        scale = float(getattr(module, "embed_scale", 1.0))
        ids = torch.linspace(0, len(weight) - 1, 8, dtype=torch.float64).long()[None].to(weight.device)
        with torch.no_grad():
            if torch.allclose(module(ids), weight[ids] * scale, rtol=1e-5, atol=0):
                return weight, scale
    raise ActExportError(
        f"the embedding of {architecture} is more than a table of tokens, so it can't be written to a file of its own"
    )


def _table(weight: Tensor, scale: float, dtype: ir.DataType) -> ir.TensorProtocol:
    """(vocabulary, hidden size), rounded when it is written."""

    def values() -> ir.TensorProtocol:
        scaled = weight.detach().float().cpu().numpy() * np.float32(scale)
        return ir.Tensor(scaled.astype(dtype.numpy()), dtype=dtype, name="embed_tokens.weight")

    return ir.LazyTensor(values, dtype=dtype, shape=ir.Shape(list(weight.shape)), name="embed_tokens.weight")


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
