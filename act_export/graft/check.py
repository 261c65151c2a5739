"""Each rewritten layer against what was there before: the same numbers in ONNX Runtime, on random queries and caches.

With beta and gamma of 1 the operator changes nothing, so both must agree to rounding: this shows that scale, window,
rotary embedding, grouping of heads, mask and cache were read rightly, without loading the model's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from act_export.errors import VerificationError
from act_export.graft.graph import Graph, UnsupportedPatternError, describe
from act_export.graft.rewrite import RewrittenLayer
from act_export.graft.site import AttentionSite, Dimension
from act_export.onnx_file.external_data import ExternalTensor
from act_export.onnx_file.names import CALIBRATION, EMBEDDINGS, IDS, MASK, POSITIONS
from act_export.ops.library import LibraryNotFoundError, library_path
from act_export.runtime.device import import_onnxruntime

TOLERANCE: dict[int, float] = {TensorProto.FLOAT: 1e-4, TensorProto.FLOAT16: 2e-2}
"""Largest difference of an attention's output, whose numbers are about 1; ONNX Runtime has no bfloat16 on a CPU."""

_DEFAULT_HEAD_SIZE = 64
_DEFAULT_HIDDEN_SIZE = 8


@dataclass(frozen=True)
class _Case:
    """A call: a mask of past and new tokens, (batch, total), and how many are new."""

    mask: tuple[tuple[int, ...], ...]
    sequence: int

    @property
    def sizes(self) -> dict[str, int]:
        total = len(self.mask[0])
        return {"batch": len(self.mask), "sequence": self.sequence, "past": total - self.sequence, "total": total}

    @property
    def is_chunk(self) -> bool:
        return 1 < self.sequence < len(self.mask[0])

    @property
    def is_padded(self) -> bool:
        return not np.all(self.mask)


# A ragged prompt, a token after it, and a chunk: what every attention operator can do; padding comes last.
_CASES = (
    _Case(((1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0)), 6),
    _Case(((1, 1, 1, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0, 1)), 1),
    _Case(((1, 1, 1, 1, 1, 1, 1, 1),), 3),
)
_SHORT_CACHE = "sliding_window_cache"
_LONGEST = 8192  # tokens of a case


def _cases(window: int) -> tuple[_Case, ...]:
    """The calls to compare; with a window one that goes beyond it, and none with padding in it, which it counts."""
    if window < 0:
        return _CASES
    first, _, chunk = _CASES
    return first, chunk, *([_Case(((1,) * (window + 2),), 1)] if window + 2 <= _LONGEST else [])


def check_layer(before: onnx.ModelProto, after: onnx.ModelProto, folder: Path, layer: RewrittenLayer) -> float | None:
    """Runs a layer's attention as it was and as it is.

    Args:
        before: The model as it was.
        after: The model with the operator.
        folder: Where tables of the rotary embedding may lie in files.
        layer: What was rewritten.

    Returns:
        The largest difference; None where ONNX Runtime can't run the type or the attention on a CPU.

    Raises:
        VerificationError: If it is more than rounding.
        UnsupportedPatternError: If the attention depends on something that it shouldn't.
    """
    site = layer.site
    element_type = Graph(before.graph).element_type(site.cache.past_key)
    if element_type not in TOLERANCE or not site.runs_on_cpu:
        return None
    wanted = [site.output, site.cache.present_key, site.cache.present_value]
    sides = [_Side(model, folder, site, wanted, element_type) for model in (before, after)]
    random = np.random.default_rng(site.layer)
    assert site.terms is not None
    differences = []
    for case in _cases(site.terms.sliding_window):
        if case.is_chunk and not site.takes_chunks:
            continue
        feeds: dict[str, NDArray[Any]] = {}
        for side in sides:
            side.extend(feeds, case, random)
        differences.append(_difference(site, case, *(side.run(feeds) for side in sides)))
    largest = float(np.max(differences))  # which Python's own would lose a NaN of
    if not largest <= TOLERANCE[element_type]:
        raise VerificationError(
            f"layer {site.layer}: the operator differs from {site.nodes[-1].op_type} {site.nodes[-1].name!r} by "
            f"{largest:.1e} on random numbers, where {TOLERANCE[element_type]:.0e} is allowed; this attention isn't "
            f"what act-export takes it for, and nothing was written"
        )
    return largest


class _Side:
    """The nodes of one layer's attention, cut out of a model."""

    def __init__(
        self, model: onnx.ModelProto, folder: Path, site: AttentionSite, wanted: Sequence[str], element_type: int
    ) -> None:
        assert site.terms is not None
        graph = Graph(model.graph)
        self._site, self._graph = site, graph
        self._head_size = site.terms.head_size or _DEFAULT_HEAD_SIZE
        cuts = site.cuts(self._head_size)
        nodes, needed = graph.between(wanted, list(cuts))
        self._inputs = [name for name in needed if name in graph.inputs]
        self._shapes: dict[str, Sequence[Dimension]] = dict(cuts)
        self._types = dict.fromkeys(cuts, element_type)
        self._wanted = list(wanted)
        weights = [_loaded(graph.initializers[name], folder) for name in needed if name in graph.initializers]
        infos = [helper.make_tensor_value_info(name, kind, None) for name, kind in self._types.items()]
        infos += [graph.inputs[name] for name in self._inputs]
        outputs = [helper.make_tensor_value_info(name, element_type, None) for name in wanted]
        part = helper.make_model(
            helper.make_graph([_without_effect(node) for node in nodes], "attention", infos, outputs, weights),
            opset_imports=model.opset_import,
            functions=model.functions,
            ir_version=model.ir_version,
        )
        with self._errors():
            self._session = _session(part)

    def extend(self, feeds: dict[str, NDArray[Any]], case: _Case, random: np.random.Generator) -> None:
        """Adds the inputs that aren't there yet."""
        for name, shape in self._shapes.items():
            if name not in feeds:
                feeds[name] = _numbers(random, [_size(dim, case) for dim in shape], self._types[name])
        for name in self._inputs:
            if name not in feeds:
                feeds[name] = self._graph_input(name, case, random)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        names = [*self._shapes, *self._inputs]
        with self._errors():
            found: list[NDArray[Any]] = self._session.run(self._wanted, {name: feeds[name] for name in names})
        return found

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # ONNX Runtime's errors have no common base
            raise UnsupportedPatternError(
                f"layer {self._site.layer} can't be compared with what was there, because ONNX Runtime can't run "
                f"{describe(self._site.nodes[-1])} by itself on a CPU: {error}; --no-check leaves the comparison out"
            ) from error

    def _graph_input(self, name: str, case: _Case, random: np.random.Generator) -> NDArray[Any]:
        sizes, mask = case.sizes, np.array(case.mask)
        kind = self._graph.element_type(name)
        assert kind is not None
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        if name == MASK:
            return np.asarray(mask, dtype)
        if name == POSITIONS:
            return np.asarray(np.maximum(mask.cumsum(-1) - 1, 0)[:, -case.sequence :], dtype)
        if name == IDS:
            return np.ones((sizes["batch"], case.sequence), dtype)
        shape = self._graph.shape(name)
        if name == EMBEDDINGS and shape is not None:
            return np.zeros((sizes["batch"], case.sequence, shape[-1] or _DEFAULT_HIDDEN_SIZE), dtype)
        if shape is None or len(shape) != 4 or not name.startswith("past"):
            raise UnsupportedPatternError(
                f"the attention of layer {self._site.layer} depends on the model's input {name!r}, of which act-export "
                f"doesn't know what it means"
            )
        terms = self._site.terms
        assert terms is not None
        heads, size = shape[1] or terms.kv_num_heads, shape[3] or self._head_size
        if name not in (self._site.cache.past_key, self._site.cache.past_value):  # only its length can matter
            return np.zeros((sizes["batch"], heads, sizes["past"], size), dtype)
        return _numbers(random, [sizes["batch"], heads, sizes["past"], size], kind)


def _difference(
    site: AttentionSite, case: _Case, before: Sequence[NDArray[Any]], after: Sequence[NDArray[Any]]
) -> float:
    """Over real tokens; caches only where there is no padding, which other operators leave out of them."""
    real = np.array(case.mask, bool)[:, -case.sequence :]
    axis = 1 if before[0].ndim == 3 else 2
    rows = [np.moveaxis(side[0], axis, 1)[real].astype(np.float64) for side in (before, after)]
    differences = [np.abs(rows[0] - rows[1]).max()]
    if not case.is_padded:
        differences += [
            np.abs(mine.astype(np.float64) - theirs[:, :, : mine.shape[2]]).max()
            for mine, theirs in zip(before[1:], after[1:], strict=True)
        ]
    return float(np.max(differences))


def _numbers(random: np.random.Generator, shape: Sequence[int], kind: int) -> NDArray[Any]:
    return np.asarray(random.standard_normal(shape), helper.tensor_dtype_to_np_dtype(kind))


def _size(dimension: Dimension, case: _Case) -> int:
    return case.sizes[dimension] if isinstance(dimension, str) else dimension


def _without_effect(node: onnx.NodeProto) -> onnx.NodeProto:
    """A copy; one that keeps only a window of its cache keeps all."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    for given in copy.attribute:
        if given.name == _SHORT_CACHE:
            given.i = 0
    return copy


def _loaded(tensor: onnx.TensorProto, folder: Path) -> onnx.TensorProto:
    if tensor.name == CALIBRATION:  # beta and gamma of 1 change nothing
        return numpy_helper.from_array(np.ones(tensor.dims, np.float32), CALIBRATION)
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    if copy.data_location == TensorProto.EXTERNAL:
        place = {entry.key: entry.value for entry in copy.external_data}
        stored = ExternalTensor(copy.name, tuple(copy.dims), copy.data_type, place)
        begin, length = stored.begin_and_length()
        with (folder / place["location"]).open("rb") as file:
            file.seek(begin)
            copy.raw_data = file.read(length)
        copy.data_location = TensorProto.DEFAULT
        del copy.external_data[:]
    return copy


def _session(model: onnx.ModelProto) -> Any:
    onnxruntime = import_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is in the error
    options.intra_op_num_threads = 1
    with suppress(LibraryNotFoundError):  # the portable functions run then
        options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
