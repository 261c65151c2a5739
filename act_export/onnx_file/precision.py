"""How numbers are stored in a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.errors import ActExportError

if TYPE_CHECKING:
    import onnx_ir as ir

MICROSOFT = "com.microsoft"  # domain of ONNX Runtime's own operators
MICROSOFT_VERSION = 1
BITS = {"int8": 8, "int4": 4}
DEFAULT_BLOCK_SIZE = 32
DEFAULT_ACCURACY_LEVEL = 4
ACCURACY_LEVELS = range(5)
_BLOCK_SIZES = (16, 32, 64, 128, 256)


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
        """Raises ActExportError for values that the operators don't have."""
        if self.bits not in BITS.values():
            raise ActExportError(f"weights of {self.bits} bits can't be stored; pass 4 or 8")
        if self.block_size not in _BLOCK_SIZES:
            raise ActExportError(
                f"the block size is {self.block_size}; it must be one of {', '.join(map(str, _BLOCK_SIZES))}"
            )
        if self.accuracy_level not in ACCURACY_LEVELS:
            raise ActExportError(
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
        ActExportError: If a value isn't one, or is given to a float type, which has no use for it.
    """
    if dtype in BITS:
        return Quantization(
            BITS[dtype],
            DEFAULT_BLOCK_SIZE if block_size is None else block_size,
            DEFAULT_ACCURACY_LEVEL if accuracy_level is None else accuracy_level,
        )
    for what, given in (("accuracy level", accuracy_level), ("block size", block_size)):
        if given is not None:
            raise ActExportError(f"{dtype} has no {what}; leave it out, or pass {' or '.join(map(repr, BITS))}")
    return None


PRECISIONS = ("float32", "float16", "bfloat16")


def check_dtype(dtype: str) -> None:
    """Raises ActExportError unless a `--dtype` of exports is one of `PRECISIONS`, "int4" or "int8"."""
    if dtype not in (*PRECISIONS, *BITS):
        raise ActExportError(f"dtype is {dtype!r}; an export must be one of {', '.join((*PRECISIONS, *BITS))}")


def element_type(dtype: str) -> ir.DataType:
    """The ONNX type of activations, cache, and weights that aren't quantized.

    Args:
        dtype: One of `PRECISIONS`, or "int4" or "int8", which are float32 but for the weights.

    Raises:
        ActExportError: If it isn't one of them.
    """
    import onnx_ir as ir

    check_dtype(dtype)
    return ir.DataType.FLOAT if dtype in BITS else ir.DataType[{"float32": "FLOAT"}.get(dtype, dtype.upper())]
