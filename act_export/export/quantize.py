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
from act_export.runtime.providers import RuntimeNotInstalledError, import_onnxruntime

DOMAIN = "com.microsoft"
DOMAIN_VERSION = 1
BITS = {"int8": 8, "int4": 4}
DEFAULT_BLOCK_SIZE = 32
DEFAULT_ACCURACY_LEVEL = 4
ACCURACY_LEVELS = range(5)
_BLOCK_SIZES = (16, 32, 64, 128, 256)
_OUTPUTS_AT_A_TIME = 4096  # bounds the copy that is made of a large weight
_MODULE = "onnxruntime.quantization.matmul_nbits_quantizer"


class QuantizationError(ActExportError):
    """A quantization that isn't one, or a model that can't be quantized."""


@dataclass(frozen=True)
class Quantization:
    """How weights are stored.

    Attributes:
        bits: Of a weight, 4 or 8.
        block_size: Weights of an output that share a scale.
        accuracy_level: What MatMulNBits may round activations to: 0 and 1 float32, 2 float16, 3 bfloat16, 4 int8.
    """

    bits: int
    block_size: int = DEFAULT_BLOCK_SIZE
    accuracy_level: int = DEFAULT_ACCURACY_LEVEL

    def __post_init__(self) -> None:
        """Raises QuantizationError for values that the operators don't have."""
        if self.bits not in BITS.values():
            raise QuantizationError(f"weights of {self.bits} bits can't be stored; pass 4 or 8")
        if self.block_size not in _BLOCK_SIZES:
            raise QuantizationError(
                f"the block size is {self.block_size}; it must be one of {', '.join(map(str, _BLOCK_SIZES))}"
            )
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise QuantizationError(
                f"the accuracy level is {self.accuracy_level}; it must be 0 or 1 (float32), 2 (float16), 3 (bfloat16) "
                f"or 4 (int8)"
            )

    @property
    def dtype(self) -> str:
        """The name that `--dtype` has for it."""
        return f"int{self.bits}"


def quantization_of(
    dtype: str, accuracy_level: int | None = None, block_size: int | None = None
) -> Quantization | None:
    """The quantization that a `--dtype` stands for; None for a float type.

    Args:
        dtype: "int4", "int8" or a float type.
        accuracy_level: None for the default.
        block_size: None for the default.

    Raises:
        QuantizationError: If a value isn't one, or is given to a float type, which has no use for it.
    """
    if dtype in BITS:
        return Quantization(
            BITS[dtype],
            DEFAULT_BLOCK_SIZE if block_size is None else block_size,
            DEFAULT_ACCURACY_LEVEL if accuracy_level is None else accuracy_level,
        )
    for what, given in (("accuracy level", accuracy_level), ("block size", block_size)):
        if given is not None:
            raise QuantizationError(f"{dtype} has no {what}; leave it out, or pass {' or '.join(map(repr, BITS))}")
    return None


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
        RuntimeNotInstalledError: If ONNX Runtime isn't installed.
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
        raise RuntimeNotInstalledError(
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
