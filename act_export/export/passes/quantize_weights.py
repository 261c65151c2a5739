"""Matrix products by weights in blocks of int4 or int8."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from act_export.errors import ActExportError
from act_export.export.passes.convert_precision import routing_nodes
from act_export.export.passes.replace_node import replace_node
from act_export.export.quantize import QuantizedWeight, quantize_weight
from act_export.onnx_file.names import IDS
from act_export.onnx_file.precision import MICROSOFT, MICROSOFT_VERSION, Quantization

_BITS_OF_TOKENS = 8


class QuantizeWeightsPass(ir.passes.InPlacePass):
    """Turns matrix products by a weight into MatMulNBits, and the lookup of tokens into GatherBlockQuantized.

    Products are MatMul, and Gemm with its bias. The table of tokens and the output matrix, the last product, take 8
    bits in an int4 model too: the error of the output matrix goes into the logits as it is. Where the two are tied they
    are stored once. A table whose rows aren't whole blocks stays float32, and so do biases, norms, tables of positions,
    what chooses experts, and activations between operators.

    Weights are quantized when they are written, one at a time, so that neither they nor the results fill the memory.
    """

    def __init__(self, quantization: Quantization) -> None:
        """Takes how to store weights."""
        super().__init__()
        self.quantization = quantization

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrites the main graph, whose weights must be float32.

        Raises:
            ActExportError: If it has no matrix product by a weight; if ONNX Runtime isn't installed.
        """
        graph = model.graph
        routing = routing_nodes(graph)
        products = [product for node in graph if node not in routing for product in _product(node)]
        if not products:
            raise ActExportError(
                "the graph has no matrix product by a weight, so there is nothing to quantize; pass --dtype float32"
            )
        lookups = [lookup for node in graph for lookup in _lookup(node, self.quantization.block_size)]
        of_tokens = replace(self.quantization, bits=_BITS_OF_TOKENS)
        in_8_bits = {products[-1].matrix, *(lookup.table for lookup in lookups)}
        stored: dict[_Matrix, _Stored] = {}
        quantized = functools.lru_cache(maxsize=1)(_quantized)  # blocks and scales are written one after the other
        for matrix in [*(product.matrix for product in products), *(lookup.table for lookup in lookups)]:
            if matrix not in stored:
                quantization = of_tokens if matrix in in_8_bits else self.quantization
                stored[matrix] = _store(graph, matrix, quantization, quantized)
        for product in products:
            _replace_product(graph, product, stored[product.matrix])
        for lookup in lookups:
            _replace_lookup(graph, lookup, stored[lookup.table])
        for value in dict.fromkeys(matrix.value for matrix in stored):
            if not value.uses():
                del graph.initializers[str(value.name)]
        model.opset_imports[MICROSOFT] = MICROSOFT_VERSION
        return ir.passes.PassResult(model, modified=True)


@dataclass(frozen=True)
class _Matrix:
    """A weight: its initializer, and whether that is (outputs, inputs) rather than (inputs, outputs)."""

    value: ir.Value
    outputs_first: bool

    @property
    def sizes(self) -> tuple[int, int]:
        """Outputs and inputs."""
        assert self.value.const_value is not None  # by `_is_weight`
        first, second = (int(size) for size in self.value.const_value.shape.numpy())
        return (first, second) if self.outputs_first else (second, first)

    def by_outputs(self) -> np.ndarray:
        """(outputs, inputs)."""
        assert self.value.const_value is not None  # by `_is_weight`
        weight: np.ndarray = self.value.const_value.numpy()
        return weight if self.outputs_first else weight.T


@dataclass(frozen=True)
class _Product:
    """MatMul or Gemm by a weight, and the node that transposes the weight for it, if there is one."""

    node: ir.Node
    matrix: _Matrix
    transpose: ir.Node | None = None


@dataclass(frozen=True)
class _Lookup:
    """Gather of tokens' rows from a table (vocabulary, width)."""

    node: ir.Node
    table: _Matrix


@dataclass(frozen=True)
class _Stored:
    """A weight's blocks in the graph."""

    packed: ir.Value
    scales: ir.Value
    quantization: Quantization
    outputs: int
    inputs: int


def _is_weight(value: ir.Value | None) -> bool:
    return (
        value is not None
        and value.is_initializer()
        and not value.is_graph_input()
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.FLOAT
        and len(value.const_value.shape) == 2
    )


def _product(node: ir.Node) -> Iterator[_Product]:
    """The node as a product by a weight, if it is one."""
    if node.domain != "" or node.op_type not in ("MatMul", "Gemm"):
        return
    outputs_first = False
    if node.op_type == "Gemm":
        attributes = node.attributes
        if attributes.get_float("alpha", 1.0) != 1 or attributes.get_float("beta", 1.0) != 1:
            return
        if attributes.get_int("transA", 0):
            return
        outputs_first = bool(attributes.get_int("transB", 0))
    weight, transpose = node.inputs[1], None
    producer = weight.producer() if weight is not None else None
    if producer is not None and _swaps_axes(producer):
        weight, transpose, outputs_first = producer.inputs[0], producer, not outputs_first
    if weight is not None and _is_weight(weight):
        yield _Product(node, _Matrix(weight, outputs_first), transpose)


def _swaps_axes(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and node.domain == "" and node.attributes.get_ints("perm") in (None, (1, 0))


def _lookup(node: ir.Node, block_size: int) -> Iterator[_Lookup]:
    """The node as a lookup of tokens in a table of whole blocks, if it is one."""
    if node.domain != "" or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return
    table, indices = node.inputs
    if table is None or indices is None or indices.name != IDS or not _is_weight(table):
        return
    assert table.const_value is not None  # by `_is_weight`
    if int(table.const_value.shape.numpy()[1]) % block_size == 0:
        yield _Lookup(node, _Matrix(table, outputs_first=True))


_Quantize = Callable[[_Matrix, Quantization], QuantizedWeight]


def _quantized(matrix: _Matrix, quantization: Quantization) -> QuantizedWeight:
    return quantize_weight(matrix.by_outputs(), quantization)


def _store(graph: ir.Graph, matrix: _Matrix, quantization: Quantization, quantized: _Quantize) -> _Stored:
    outputs, inputs = matrix.sizes
    blocks = -(-inputs // quantization.block_size)
    block_bytes = quantization.block_size * quantization.bits // 8
    name = str(matrix.value.name).removesuffix("_transposed")

    def packed() -> ir.TensorProtocol:
        return ir.Tensor(quantized(matrix, quantization).packed)

    def scales() -> ir.TensorProtocol:
        return ir.Tensor(quantized(matrix, quantization).scales)

    return _Stored(
        _register_lazy(
            graph, f"{name}_Q{quantization.bits}", packed, ir.DataType.UINT8, (outputs, blocks, block_bytes)
        ),
        _register_lazy(graph, f"{name}_scales", scales, ir.DataType.FLOAT, (outputs, blocks)),
        quantization,
        outputs,
        inputs,
    )


def _register_lazy(
    graph: ir.Graph,
    name: str,
    values: Callable[[], ir.TensorProtocol],
    dtype: ir.DataType,
    shape: tuple[int, ...],
) -> ir.Value:
    tensor = ir.LazyTensor(values, dtype=dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _register(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _replace_product(graph: ir.Graph, product: _Product, stored: _Stored) -> None:
    node, quantization = product.node, stored.quantization
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    attributes = {
        "K": stored.inputs,
        "N": stored.outputs,
        "bits": quantization.bits,
        "block_size": quantization.block_size,
        "accuracy_level": quantization.accuracy_level,
    }
    inputs = [node.inputs[0], stored.packed, stored.scales]
    if bias is not None:
        inputs += [None, None, bias]  # between them zero points and an input of old
    replace_node(
        graph, node, ir.node("MatMulNBits", inputs, attributes, domain=MICROSOFT, name=_name(node, quantization))
    )
    if product.transpose is not None and not product.transpose.outputs[0].uses():
        graph.remove(product.transpose, safe=True)


def _replace_lookup(graph: ir.Graph, lookup: _Lookup, stored: _Stored) -> None:
    quantization = stored.quantization
    shape = np.array([stored.outputs, stored.inputs * quantization.bits // 8], np.int64)
    flat = ir.node(
        "Reshape",
        [stored.packed, _register(graph, f"{stored.packed.name}.shape", shape)],
        name=f"{lookup.node.name}_Reshape",
    )
    flat.outputs[0].name = f"{stored.packed.name}_flat"
    flat.outputs[0].type, flat.outputs[0].shape = stored.packed.type, ir.Shape(shape.tolist())
    attributes = {
        "bits": quantization.bits,
        "block_size": quantization.block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    inputs = [flat.outputs[0], lookup.node.inputs[1], stored.scales]
    graph.insert_before(lookup.node, flat)
    node = ir.node("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT, name=_name(lookup.node, quantization))
    replace_node(graph, lookup.node, node)


def _name(node: ir.Node, quantization: Quantization) -> str:
    return f"{node.name}_Q{quantization.bits}"
