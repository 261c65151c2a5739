"""The types that a model can be exported in."""

from __future__ import annotations

import onnx_ir as ir

from act_export.errors import ActExportError
from act_export.export.quantize import BITS

PRECISIONS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def element_type(dtype: str) -> ir.DataType:
    """The ONNX type of activations, cache, and weights that aren't quantized.

    Args:
        dtype: One of `PRECISIONS`, or "int4" or "int8", which are float32 but for the weights.

    Raises:
        ActExportError: If it isn't one of them.
    """
    if dtype in BITS:
        return ir.DataType.FLOAT
    if dtype not in PRECISIONS:
        raise ActExportError(f"dtype is {dtype!r}; an export must be one of {', '.join((*PRECISIONS, *BITS))}")
    return PRECISIONS[dtype]
