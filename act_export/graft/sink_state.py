"""How the sink state travels between calls: in inputs of its own, or disguised as more layers of the cache.

`SCORES` is what act-export's exports have: `past_sink_scores.N`, running column sums in float32.

`CACHE_LAYERS` is for hosts that know no state but a key-value cache, as onnxruntime-genai: each calibrated layer has
another layer of the cache, numbered after the model's own, (batch, calibrated heads, tokens, size). Its type is the
cache's, so that a half type holds each number in several parts that add up. What it keeps is the mean of a column over
the rows that saw it, not their sum: when a host takes tokens back (rewinds), the means of the columns that remain stay
what they were, and weigh as many rows as remain.

`PACKED` is for hosts that make every layer of the cache alike, as optimum; see
`act_export.onnx_file.pack_sink_state`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import onnx
import onnx.parser
from onnx import TensorProto, helper

from act_export.graft.graph import Graph
from act_export.graft.site import CacheNames
from act_export.onnx_file.names import BATCH, PAST_LENGTH, PAST_SINKS, PRESENT_SINKS, TOTAL_LENGTH
from act_export.onnx_file.node_builder import NodeBuilder
from act_export.ops import schema

COUNT, LOAD, STORE = "CountRows", "LoadSinkScores", "StoreSinkScores"
_PARTS: dict[int, tuple[int, int]] = {
    TensorProto.FLOAT: (1, 1),
    TensorProto.FLOAT16: (2, 1),
    TensorProto.BFLOAT16: (3, 2),
}
"""Parts that add up to a float32 number, and the size of a cache layer that has room for them in key and value."""


class StateLayout(Enum):
    """Where the sink state is among a model's inputs and outputs."""

    SCORES = "scores"
    CACHE_LAYERS = "cache layers"
    PACKED = "packed"


@dataclass(frozen=True)
class StateNames:
    """A layer's sink state among the inputs and outputs.

    Attributes:
        past: Inputs.
        present: Outputs, which the next call gets as the inputs.
        infos: Inputs, then outputs, as the graph declares them.
    """

    past: tuple[str, ...]
    present: tuple[str, ...]
    infos: tuple[onnx.ValueInfoProto, ...]


@dataclass(frozen=True)
class Dimensions:
    """What a graph calls the dimensions of its cache: its own names, where it has some.

    Attributes:
        batch: Rows.
        past: Tokens before a call.
        total: Tokens after it.
    """

    batch: str = BATCH
    past: str = PAST_LENGTH
    total: str = TOTAL_LENGTH

    @classmethod
    def of(cls, graph: Graph, cache: CacheNames) -> Dimensions:
        """Those of a layer's cache."""
        return cls(
            graph.dimension_name(cache.past_key, 0) or BATCH,
            graph.dimension_name(cache.past_key, 2) or PAST_LENGTH,
            graph.dimension_name(cache.present_key, 2) or TOTAL_LENGTH,
        )


def score_names(layer: int, heads: int, dimensions: Dimensions) -> StateNames:
    """The state of a layer in inputs of its own."""
    past, present = f"{PAST_SINKS}{layer}", f"{PRESENT_SINKS}{layer}"
    return StateNames(
        (past,),
        (present,),
        (
            _info(past, TensorProto.FLOAT, heads, dimensions.batch, dimensions.past, 1),
            _info(present, TensorProto.FLOAT, heads, dimensions.batch, dimensions.total, 1),
        ),
    )


def cache_layer_names(
    templates: tuple[str, str, str, str], index: int, heads: int, element_type: int, dimensions: Dimensions
) -> StateNames:
    """The state of a layer as layer `index` of the cache.

    Args:
        templates: Names of a layer's past key and value, present key and value, with %d for its number.
        index: Its number.
        heads: Calibrated heads.
        element_type: The cache's.
        dimensions: Their names.
    """
    _, size = _PARTS[element_type]
    past_key, past_value, present_key, present_value = (template.replace("%d", str(index)) for template in templates)
    past, present = (past_key, past_value), (present_key, present_value)
    infos = [_info(name, element_type, heads, dimensions.batch, dimensions.past, size) for name in past]
    infos += [_info(name, element_type, heads, dimensions.batch, dimensions.total, size) for name in present]
    return StateNames(past, present, tuple(infos))


def count_rows(build: NodeBuilder, mask: str, layer_state: str, tokens: str, window: int, name: str) -> tuple[str, str]:
    """Adds a node that counts the rows that saw each column, before this call and after it.

    Args:
        build: Where to.
        mask: (batch, past + sequence), int64.
        layer_state: Any state input of a layer: how long the buffers are.
        tokens: (batch, sequence, ...): how many are new.
        window: Keys that a row sees; -1 for all.
        name: Of the node.

    Returns:
        Two values, (batch, 1, length of the buffers, 1), float32, at least 1.
    """
    outputs = [build.prefix + f"{name}_before", build.prefix + f"{name}_after"]
    before, after = build.add_many(
        COUNT, [mask, layer_state, tokens], name, outputs, domain=schema.DOMAIN, sliding_window=window
    )
    return before, after


def load_scores(build: NodeBuilder, names: StateNames, rows_before: str, element_type: int) -> str:
    """Adds a node that makes column sums of the means in a layer of the cache."""
    parts, _ = _PARTS[element_type]
    return build.add(f"{LOAD}{parts}", [*names.past, rows_before], "past_sink_scores", domain=schema.DOMAIN)


def store_scores(build: NodeBuilder, sums: str, names: StateNames, rows_after: str, element_type: int) -> None:
    """Adds a node that makes a layer of the cache of column sums."""
    parts, _ = _PARTS[element_type]
    build.add_many(
        f"{STORE}{parts}", [sums, rows_after, names.past[0]], "present_sink_scores", names.present, domain=schema.DOMAIN
    )


def functions_of(nodes: Iterable[onnx.NodeProto], opset: int) -> list[onnx.FunctionProto]:
    """The functions that such nodes call, each once."""
    used = {node.op_type for node in nodes if node.domain == schema.DOMAIN}
    texts = {COUNT: _COUNT}
    for name, by_parts in ((LOAD, _LOAD), (STORE, _STORE)):
        texts |= {f"{name}{parts}": text for parts, text in by_parts.items()}
    header = f'<opset_import: ["" : {opset}], domain: "{schema.DOMAIN}">\n'
    return [onnx.parser.parse_function(header + texts[name]) for name in sorted(used & texts.keys())]


def _info(name: str, element_type: int, heads: int, batch: str, length: str, size: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, element_type, [batch, heads, length, size])


_COUNT = f"""
{COUNT} <sliding_window> (attention_mask, state, tokens) => (before, after) {{
  i0 = Constant <value_ints: ints = [0]> ()
  i1 = Constant <value_ints: ints = [1]> ()
  far = Constant <value_ints: ints = [{2**31 - 1}]> ()
  one = Constant <value_int: int = 1> ()
  zero = Constant <value_int: int = 0> ()
  f1 = Constant <value_float: float = 1.0> ()
  total = Shape <start: int = 1, end: int = 2> (attention_mask)
  sequence = Shape <start: int = 1, end: int = 2> (tokens)
  past = Sub (total, sequence)
  buffer = Shape <start: int = 2, end: int = 3> (state)
  length = Max (total, buffer)
  real = Cast <to: int = 9> (attention_mask)
  real_f = Cast <to: int = 1> (real)
  missing = Sub (length, total)
  after_padding = Concat <axis: int = 0> (i0, i0, i0, missing)
  real_after = Pad (real_f, after_padding)
  real_past = Slice (real_f, i0, past, i1)
  new_and_missing = Sub (length, past)
  before_padding = Concat <axis: int = 0> (i0, i0, i0, new_and_missing)
  real_before = Pad (real_past, before_padding)
  window_given = Constant <value_int: int = @sliding_window> ()
  no_window = Less (window_given, zero)
  window_any = Where (no_window, length, window_given)
  window = Min (window_any, length)
  beyond_padding = Concat <axis: int = 0> (i0, i0, i0, window)
  rows_after = CumSum <reverse: int = 1> (real_after, one)
  rows_after_beyond = Slice (rows_after, window, far, i1)
  rows_after_beyond_padded = Pad (rows_after_beyond, beyond_padding)
  seen_after = Sub (rows_after, rows_after_beyond_padded)
  seen_after_safe = Max (seen_after, f1)
  axes = Constant <value_ints: ints = [1, 3]> ()
  after = Unsqueeze (seen_after_safe, axes)
  rows_before = CumSum <reverse: int = 1> (real_before, one)
  rows_before_beyond = Slice (rows_before, window, far, i1)
  rows_before_beyond_padded = Pad (rows_before_beyond, beyond_padding)
  seen_before = Sub (rows_before, rows_before_beyond_padded)
  before_all = Unsqueeze (seen_before, axes)
  i2 = Constant <value_ints: ints = [2]> ()
  before = Slice (before_all, i0, buffer, i2)
}}
"""

_LOAD = {
    1: f"""
{LOAD}1 (high, low, rows) => (sums) {{ sums = Mul (high, rows) }}
""",
    2: f"""
{LOAD}2 (high, low, rows) => (sums) {{
  high_f = Cast <to: int = 1> (high)
  low_f = Cast <to: int = 1> (low)
  means = Add (high_f, low_f)
  sums = Mul (means, rows)
}}
""",
    3: f"""
{LOAD}3 (high, low, rows) => (sums) {{
  last = Constant <value_ints: ints = [-1]> ()
  high_f = Cast <to: int = 1> (high)
  low_f = Cast <to: int = 1> (low)
  parts = Add (high_f, low_f)
  means = ReduceSum <keepdims: int = 1> (parts, last)
  sums = Mul (means, rows)
}}
""",
}

_STORE = {
    1: f"""
{STORE}1 (sums, rows, like) => (high, low) {{
  high = Div (sums, rows)
  low = Sub (high, high)
}}
""",
    2: f"""
{STORE}2 (sums, rows, like) => (high, low) {{
  means = Div (sums, rows)
  high = CastLike (means, like)
  high_f = Cast <to: int = 1> (high)
  rest = Sub (means, high_f)
  low = CastLike (rest, like)
}}
""",
    3: f"""
{STORE}3 (sums, rows, like) => (high, low) {{
  means = Div (sums, rows)
  first = CastLike (means, like)
  first_f = Cast <to: int = 1> (first)
  rest = Sub (means, first_f)
  second = CastLike (rest, like)
  second_f = Cast <to: int = 1> (second)
  third_f = Sub (rest, second_f)
  f0 = Constant <value_float: float = 0.0> ()
  none = Mul (third_f, f0)
  both = Concat <axis: int = -1> (first_f, second_f)
  high = CastLike (both, like)
  remainder = Concat <axis: int = -1> (third_f, none)
  low = CastLike (remainder, like)
}}
""",
}
