"""The quantized weights of an ONNX file, whoever wrote it, read one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from act_export.errors import ActExportError
from act_export.onnx_file.load import load_graph
from act_export.onnx_file.precision import MICROSOFT

PRODUCT, LOOKUP = "MatMulNBits", "GatherBlockQuantized"
_BITS = (4, 8)
_INT8 = 4  # the accuracy level
_BYTE = 8


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (outputs, inputs), or a table (tokens, width), in blocks along the second axis.

    Attributes:
        name: Of the node that uses it.
        operator: `PRODUCT` or `LOOKUP`.
        bits: Of a value.
        block_size: Values that share a scale.
        outputs: Number of rows.
        inputs: Number of columns.
        accuracy_level: Of a product, as MatMulNBits has it; 0 of a lookup.
        packed: The values, in bytes or in a type of four bits.
        scales: One of each block.
        zero_points: One of each block, packed as the values are, or in the type of the scales; None for the middle.
    """

    name: str
    operator: str
    bits: int
    block_size: int
    outputs: int
    inputs: int
    accuracy_level: int
    packed: ir.TensorProtocol
    scales: ir.TensorProtocol
    zero_points: ir.TensorProtocol | None

    @property
    def rounds_inputs(self) -> bool:
        """Whether activations may be rounded to int8, in the weight's blocks."""
        return self.accuracy_level == _INT8

    def dequantize(self) -> NDArray[np.float32]:
        """(outputs, inputs): (value - zero point) * scale. Nothing of the file stays in memory."""
        scales = self.scales.numpy().astype(np.float32).reshape(self.outputs, -1)
        blocks = scales.shape[1]
        in_bytes = self.packed.dtype == ir.DataType.UINT8
        values = self._values(self.packed, blocks * self.block_size).astype(np.float32)
        zero_points: NDArray[np.float32] | float = 2.0 ** (self.bits - 1) if in_bytes else 0.0
        if self.zero_points is not None:
            zero_points = self._values(self.zero_points, blocks).astype(np.float32)[..., None]
        values = values.reshape(self.outputs, blocks, self.block_size)
        values -= zero_points
        values *= scales[..., None]
        return values.reshape(self.outputs, -1)[:, : self.inputs]

    def _values(self, tensor: ir.TensorProtocol, count: int) -> NDArray[np.generic]:
        """(outputs, count) of a tensor that may hold several in a byte, the first in the lowest bits."""
        rows = tensor.numpy().reshape(self.outputs, -1)
        if tensor.dtype == ir.DataType.UINT8:
            shifts = np.arange(0, _BYTE, self.bits, dtype=np.uint8)
            mask = np.uint8((1 << self.bits) - 1)
            rows = ((rows[..., None] >> shifts) & mask).reshape(self.outputs, -1)
        values: NDArray[np.generic] = rows[:, :count]
        return values


def quantized_weights(path: str | os.PathLike[str]) -> list[QuantizedWeight]:
    """The quantized weights of a file, none where it has none; their values stay on the disk.

    Raises:
        ActExportError: If the file can't be read, or quantizes in a way that isn't known here.
    """
    graph = load_graph(Path(path), ActExportError).graph
    return [weight for node in graph for weight in _weight(node)]


def _weight(node: ir.Node) -> Iterator[QuantizedWeight]:
    if node.domain != MICROSOFT or node.op_type not in (PRODUCT, LOOKUP):
        return
    of_product = node.op_type == PRODUCT
    attributes = node.attributes
    bits, block_size = attributes.get_int("bits", 4), attributes.get_int("block_size", 128)
    packed = _tensor(node, 1 if of_product else 0)
    scales, zero_points = _tensor(node, 2), _tensor(node, 3)
    name = str(node.name or node.outputs[0].name)
    unknown = (
        "it reorders its inputs (g_idx)"
        if of_product and _tensor(node, 4) is not None
        else "its weight is laid out for one kind of GPU (weight_prepacked)"
        if attributes.get_int("weight_prepacked", 0)
        else f"its values have {bits} bits"
        if bits not in _BITS
        else "its weight isn't stored in the file"
        if packed is None or scales is None
        else ""
    )
    if unknown or packed is None or scales is None:
        raise ActExportError(f"{name} can't be compared with PyTorch: {unknown}; quantize it in blocks of 4 or 8 bits")
    if of_product:
        shape = attributes.get_int("N", 0), attributes.get_int("K", 0)
    else:
        rows, blocks = (int(size) for size in scales.shape.numpy())
        shape = rows, blocks * block_size
    level = attributes.get_int("accuracy_level", 0) if of_product else 0
    yield QuantizedWeight(name, node.op_type, bits, block_size, *shape, level, packed, scales, zero_points)


def _tensor(node: ir.Node, index: int) -> ir.TensorProtocol | None:
    """The stored tensor that an input is, as it is or through a Reshape, which leaves the order as it is."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None:
        return None
    producer = value.producer()
    if producer is not None and producer.op_type == "Reshape":
        value = producer.inputs[0]
    return ir.convenience.get_const_tensor(value) if value is not None else None
