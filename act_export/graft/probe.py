"""Running a small part of a graph by itself, to see what it computes instead of guessing it from its operators."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper

from act_export.graft.graph import Graph, UnsupportedPatternError, reads
from act_export.onnx_file.names import IDS, MASK, POSITIONS
from act_export.runtime.device import import_onnxruntime

Arrays = Mapping[str, NDArray[Any]]
_LARGEST_BYTES = 16 << 20  # masks in tables may be large; weights, which nothing here may depend on, mostly are larger
_LONG = 4096  # tokens of a cache, of which no memory is touched if all are 0
_MATRIX = 2  # axes
_SESSIONS = 256
_IR_VERSION = 10


@dataclass(frozen=True)
class Call:
    """A call of a decoder, as the mask sees it.

    Attributes:
        mask: (batch, past + sequence), 1 for real tokens.
        sequence: How many of the tokens are new.
    """

    mask: NDArray[np.int64]
    sequence: int

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return int(self.mask.shape[0])

    @property
    def past(self) -> int:
        """Tokens in the cache."""
        return int(self.mask.shape[1]) - self.sequence

    @property
    def is_chunk(self) -> bool:
        """Whether several tokens follow others in the cache."""
        return self.past > 0 and self.sequence > 1


class Part:
    """The nodes that compute one value from others that are given, and from the graph's inputs.

    Where the part asks for the shape of token embeddings, the embeddings are given as well: not numbers, so that a part
    that depends on more than their shape shows it.

    Attributes:
        output: The value.
        inputs: Graph inputs that it depends on.
        embeddings: Width of each table of embeddings, by the name of what is looked up.
    """

    def __init__(self, graph: Graph, output: str, given: Iterable[str]) -> None:
        """Cuts the part out.

        Args:
            graph: The graph.
            output: The value to compute.
            given: Values that the walk back stops at.

        Raises:
            UnsupportedPatternError: If it depends on weights.
        """
        self.output = output
        self.embeddings: dict[str, int] = {}
        self._graph, self._given = graph, set(given)
        nodes: dict[int, onnx.NodeProto] = {}
        leaves: dict[str, None] = {}
        waiting = [output]
        while waiting:
            name = waiting.pop()
            node = graph.producer(name)
            if name in self._given or node is None:
                leaves[name] = None
            elif (width := _embedding_width(graph, node)) is not None:
                leaves[name] = None
                self.embeddings[name] = width
            elif graph.position(node) not in nodes:
                nodes[graph.position(node)] = node
                waiting.extend(reads(node))
        self._nodes = [nodes[position] for position in sorted(nodes)]
        self._leaves = [name for name in leaves if name not in graph.initializers]
        self._weights = [_small(graph.initializers[name], output) for name in leaves if name in graph.initializers]
        self.inputs = tuple(name for name in self._leaves if name in graph.inputs)

    def run(self, arrays: Arrays, call: Call | None = None) -> NDArray[Any]:
        """Computes the value.

        Args:
            arrays: The given values.
            call: Of the decoder; for parts that depend on the graph's inputs.

        Raises:
            UnsupportedPatternError: If it depends on something else, or ONNX Runtime can't compute it.
        """
        feeds = {name: arrays[name] if name in arrays else self._of_call(name, call) for name in self._leaves}
        if self.output in feeds:
            return feeds[self.output]
        model, names = self._model(feeds)
        try:
            (found,) = _session(model).run(None, {names[name]: array for name, array in feeds.items()})
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise UnsupportedPatternError(f"can't compute {self.output!r} by itself: {error}") from error
        result: NDArray[Any] = found
        return result

    def _of_call(self, name: str, call: Call | None) -> NDArray[Any]:
        if call is None or (name not in self.inputs and name not in self.embeddings):
            raise UnsupportedPatternError(f"{self.output!r} depends on {name!r}, which it shouldn't")
        if name in self.embeddings:
            return np.full((call.batch, call.sequence, self.embeddings[name]), np.nan, np.float32)
        dtype = helper.tensor_dtype_to_np_dtype(self._graph.element_type(name) or TensorProto.FLOAT)
        if name == MASK:
            return np.asarray(call.mask, dtype)
        if name == POSITIONS:
            return np.asarray(np.maximum(call.mask.cumsum(-1) - 1, 0)[:, -call.sequence :], dtype)
        if name == IDS:
            return np.ones((call.batch, call.sequence), dtype)
        shape = self._graph.shape(name)
        if shape is None or len(shape) != 4 or not name.startswith("past"):
            raise UnsupportedPatternError(f"{self.output!r} depends on the model's input {name!r}, of unknown meaning")
        sizes = (call.batch, shape[1] or 1, call.past, shape[3] or 1)
        return np.zeros(sizes, dtype) if call.past > _LONG else np.full(sizes, np.nan, dtype)

    def _model(self, feeds: Arrays) -> tuple[bytes, dict[str, str]]:
        """The part as a model, with names that are the same for the same part of every layer."""
        names: dict[str, str] = {"": ""}
        for name in [*feeds, *(tensor.name for tensor in self._weights)]:
            names[name] = f"v{len(names)}"
        nodes = []
        for node in self._nodes:
            copy = onnx.NodeProto.FromString(node.SerializeToString())
            for name in copy.output:
                names.setdefault(name, f"v{len(names)}")
            copy.name, copy.doc_string = "", ""
            copy.input[:] = [names[name] for name in copy.input]
            copy.output[:] = [names[name] for name in copy.output]
            nodes.append(copy)
        weights = []
        for tensor in self._weights:
            weights.append(onnx.TensorProto.FromString(tensor.SerializeToString()))
            weights[-1].name = names[tensor.name]
        inputs = [
            helper.make_tensor_value_info(
                names[name], helper.np_dtype_to_tensor_dtype(array.dtype), [None] * array.ndim
            )
            for name, array in feeds.items()
        ]
        output = onnx.ValueInfoProto(name=names[self.output])
        model = helper.make_model(
            helper.make_graph(nodes, "part", inputs, [output], weights),
            opset_imports=self._graph.opsets,
            ir_version=_IR_VERSION,
        )
        return model.SerializeToString(deterministic=True), names


def _embedding_width(graph: Graph, node: onnx.NodeProto) -> int | None:
    """Columns of a table of embeddings, if the node looks tokens or positions up in one."""
    table = graph.initializers.get(node.input[0]) if node.op_type == "Gather" else None
    if table is None or len(table.dims) != _MATRIX or table.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        return None
    return int(table.dims[1])


def _small(tensor: onnx.TensorProto, output: str) -> onnx.TensorProto:
    bytes_of_element = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    is_large = np.prod(tensor.dims, dtype=np.int64) * bytes_of_element > _LARGEST_BYTES
    if is_large or external_data_helper.uses_external_data(tensor):
        raise UnsupportedPatternError(f"{output!r} depends on the weights {tensor.name!r}")
    return tensor


@lru_cache(_SESSIONS)
def _session(model: bytes) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
