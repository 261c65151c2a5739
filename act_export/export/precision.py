"""The storage types that a model can be exported in."""

from __future__ import annotations

import onnx_ir as ir

from act_export.errors import ActExportError

PRECISIONS = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def element_type(dtype: str) -> ir.DataType:
    """The ONNX type of one of `PRECISIONS`.

    Raises:
        ActExportError: If it isn't one of them.
    """
    if dtype not in PRECISIONS:
        raise ActExportError(f"dtype is {dtype!r}; an export must be one of {', '.join(PRECISIONS)}")
    return PRECISIONS[dtype]
