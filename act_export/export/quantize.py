"""Weights in blocks of int4 or int8, for ONNX Runtime's operators MatMulNBits and GatherBlockQuantized."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError
from act_export.onnx_file.precision import Quantization
from act_export.runtime.device import import_onnxruntime

_OUTPUTS_AT_A_TIME = 4096  # bounds the copy that is made of a large weight
_MODULE = "onnxruntime.quantization.matmul_nbits_quantizer"


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight matrix in symmetric blocks, as MatMulNBits takes it.

    Attributes:
        packed: (outputs, blocks, block size * bits / 8), uint8, the first of the values of a byte in its lowest bits.
        scales: (outputs, blocks), float32; a weight is (value - 2 ** (bits - 1)) * scale.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]


def quantize_weight(weight: NDArray[np.float32], quantization: Quantization) -> QuantizedWeight:
    """Rounds a weight (outputs, inputs) to the nearest values of its blocks, by ONNX Runtime's quantizer.

    Inputs that don't fill the last block are followed by zeros.

    Raises:
        ActExportError: If ONNX Runtime isn't installed.
    """
    quantizer = _quantizer(quantization)
    parts = []
    for start in range(0, len(weight), _OUTPUTS_AT_A_TIME):
        columns = np.ascontiguousarray(weight[start : start + _OUTPUTS_AT_A_TIME].T, np.float32)
        parts.append(quantizer.qbits_block_quant(columns)[:2])
    packed, scales = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return QuantizedWeight(packed, scales)


def _quantizer(quantization: Quantization) -> Any:
    import_onnxruntime()
    try:
        module = _import_quietly(_MODULE)
    except ImportError as error:
        raise ActExportError(
            f"ONNX Runtime's quantizer can't be imported: {error}; it is part of onnxruntime from 1.24 on"
        ) from error
    config = module.DefaultWeightOnlyQuantConfig(
        block_size=quantization.block_size, is_symmetric=True, bits=quantization.bits
    )
    return module.DefaultWeightOnlyQuantizer(config)


def _import_quietly(name: str) -> ModuleType:
    """Imports a module that configures logging for the whole process, unless that is done already."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        return importlib.import_module(name)
    finally:
        root.removeHandler(handler)
