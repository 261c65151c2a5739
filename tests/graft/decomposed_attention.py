"""Attention in single operators, as exporters spell it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from act_export.onnx_file.node_builder import NodeBuilder

VOCABULARY = 13


FAR = np.iinfo(np.int64).max


OPSET = 18


@dataclass(frozen=True)
class Style:
    """How a graph is written.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads.
        size: Head size.
        scaled: Where the scale is: "both" (root of it on query and key), "query", "logits" (a division) or "shape" (as
            "both", computed from the query's shape).
        mask: "where" (0 or -inf by a boolean), "added" (the lowest number times 0 or 1), "chosen" (a logit or the
            lowest number).
        softcap: 0 for none.
        window: -1 for none.
        guarded: Rows without keys become 0 after the softmax.
        joined: Heads are put side by side after the product.
        fault: Something that the operator can't do.
    """

    heads: int = 4
    kv_heads: int = 2
    size: int = 8
    scaled: str = "both"
    mask: str = "where"
    softcap: float = 0.0
    window: int = -1
    guarded: bool = True
    joined: bool = True
    fault: str = ""

    @property
    def scale(self) -> float:
        return float(self.size**-0.5)


STYLES = {
    "optimum's llama": Style(),
    "optimum's gpt2": Style(kv_heads=4, scaled="shape"),
    "optimum's mistral": Style(window=5),
    "eager gemma2": Style(scaled="logits", mask="added", softcap=3.0, window=4, guarded=False),
    "scale on the query": Style(scaled="query", mask="added", guarded=False),
    "masked logits": Style(kv_heads=1, scaled="logits", mask="chosen", guarded=False),
    "heads not joined": Style(joined=False),
}


class Exporter:
    """Writes a model of attention layers, each of which reads the token embeddings."""

    def __init__(self, style: Style, layers: int = 1, dtype: type = np.float32) -> None:
        self.style, self.layers, self.dtype = style, layers, dtype
        self.build = NodeBuilder("/model/")
        random = np.random.default_rng(3)
        hidden = style.heads * style.size
        widths = {"q": style.heads, "k": style.kv_heads, "v": style.kv_heads}
        self.embeddings = random.standard_normal((VOCABULARY, hidden)).astype(dtype)
        self.weights = {
            f"{layer}.{name}": (random.standard_normal((hidden, heads * style.size)) / hidden**0.5).astype(dtype)
            for layer in range(layers)
            for name, heads in widths.items()
        }

    def model(self) -> onnx.ModelProto:
        style, build = self.style, self.build
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        embedded = build.add("Gather", ["embed.weight", "input_ids"], "embed")
        seen = self._seen(embedded)
        last = embedded
        for layer in range(self.layers):
            last = self._layer(layer, embedded, seen)
        build.add("Identity", [last], "logits", output="logits")
        cache = ["batch", style.kv_heads, "past", style.size]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", kind, ["batch", "sequence", style.heads * style.size])]
        for layer in range(self.layers):
            for part in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", kind, cache))
                outputs.append(
                    helper.make_tensor_value_info(f"present.{layer}.{part}", kind, [*cache[:2], "t", cache[3]])
                )
        tables = {"embed.weight": self.embeddings, **self.weights}
        graph = helper.make_graph(
            build.nodes, "main", inputs, outputs, [numpy_helper.from_array(w, name) for name, w in tables.items()]
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)

    def _length(self, value: str, axis: int, name: str) -> str:
        """A dimension, as a vector of one number."""
        shape = self.build.add("Shape", [value], f"{name}_shape")
        return self.build.add("Gather", [shape, self.build.constant([axis], f"{name}_axis")], name)

    def _scalar(self, vector: str, name: str) -> str:
        return self.build.add("Squeeze", [vector, self.build.constant([0], f"{name}_axis")], name)

    def _seen(self, embedded: str) -> str:
        """Which keys a row sees, (batch, 1, sequence, total)."""
        build, style = self.build, self.style
        sequence = self._scalar(self._length(embedded, 1, "sequence"), "sequence_0")
        past = self._scalar(self._length("past_key_values.0.key", 2, "past"), "past_0")
        total = build.add("Add", [past, sequence], "total_0")
        zero, one = build.constant(np.array(0), "zero"), build.constant(np.array(1), "one")
        rows = build.add("Range", [past, total, one], "rows_1d")
        rows = build.add("Unsqueeze", [rows, build.constant([1], "rows_axis")], "rows")
        columns = build.add("Range", [zero, total, one], "columns")
        seen = build.add("LessOrEqual", [columns, rows], "causal")
        if style.fault == "bidirectional":
            seen = build.add("Or", [seen, build.add("Not", [seen], "later")], "everything")
        if style.window >= 0:
            oldest = build.add("Sub", [rows, build.constant(np.array(style.window), "window")], "oldest")
            seen = build.add("And", [seen, build.add("Greater", [columns, oldest], "in_window")], "causal_in_window")
        real = build.add("Cast", ["attention_mask"], "real", to=TensorProto.BOOL)
        real = build.add("Unsqueeze", [real, build.constant([1, 2], "real_axes")], "real_4d")
        return seen if style.fault == "padding is seen" else build.add("And", [seen, real], "seen")

    def _layer(self, layer: int, embedded: str, seen: str) -> str:
        style, build = self.style, self.build
        heads = {"q": style.heads, "k": style.kv_heads, "v": style.kv_heads}
        new = {}
        for name, count in heads.items():
            flat = build.add("MatMul", [embedded, f"{layer}.{name}"], f"{layer}/{name}_proj")
            new[name] = build.split_heads(flat, count, f"{layer}/{name}")
        present = {
            part: build.add(
                "Concat", [f"past_key_values.{layer}.{part}", new[part[0]]], f"{layer}/{part}",
                output=f"present.{layer}.{part}", axis=-2,
            )
            for part in ("key", "value")
        }  # fmt: skip
        keys, values = (self._repeated(present[part], f"{layer}/{part}_used") for part in ("key", "value"))
        if style.fault == "scaled values":
            values = build.add("Mul", [values, self._number(2.0, f"{layer}/two")], f"{layer}/values_scaled")
        total = self._length(keys, 2, f"{layer}/total")
        logits = self._logits(layer, new["q"], keys)
        masked = self._masked(layer, logits, self._sliced(layer, seen, total))
        soft = build.add("Softmax", [masked], f"{layer}/softmax", axis=-1)
        if style.guarded:
            empty = build.add("IsNaN", [soft], f"{layer}/empty")
            soft = build.add("Where", [empty, self._number(0.0, f"{layer}/nothing"), soft], f"{layer}/guarded")
        if style.fault == "changed probabilities":
            soft = build.add("Mul", [soft, soft], f"{layer}/squared")
        mixed = build.add("MatMul", [soft, values], f"{layer}/mixed")
        rows = build.add("Transpose", [mixed], f"{layer}/mixed_rows", perm=[0, 2, 1, 3])
        if not style.joined:
            rows = build.add("Mul", [rows, self._number(1.0, f"{layer}/gate")], f"{layer}/gated")
        lengths = [self._length(embedded, axis, f"{layer}/length_{axis}") for axis in (0, 1)]
        shape = build.add("Concat", [*lengths, build.constant([-1], f"{layer}/rest")], f"{layer}/joined_shape", axis=0)
        return build.add("Reshape", [rows, shape], f"{layer}/joined")

    def _number(self, value: float, name: str) -> str:
        return self.build.constant(np.array(value, self.dtype), name)

    def _repeated(self, present: str, name: str) -> str:
        style, build = self.style, self.build
        if style.heads == style.kv_heads:
            return present
        lengths = [self._length(present, axis, f"{name}_{axis}") for axis in range(4)]
        group = build.constant([style.heads // style.kv_heads], f"{name}_group")
        apart = build.add("Unsqueeze", [present, build.constant([2], f"{name}_axis")], f"{name}_apart")
        wide = build.add("Concat", [*lengths[:2], group, *lengths[2:]], f"{name}_wide", axis=0)
        expanded = build.add("Expand", [apart, wide], f"{name}_expanded")
        count = build.add("Mul", [lengths[1], group], f"{name}_heads")
        if style.fault == "other order of heads":
            expanded = build.add("Transpose", [expanded], f"{name}_turned", perm=[0, 2, 1, 3, 4])
        shape = build.add("Concat", [lengths[0], count, *lengths[2:]], f"{name}_flat", axis=0)
        return build.add("Reshape", [expanded, shape], name)

    def _logits(self, layer: int, query: str, keys: str) -> str:
        style, build = self.style, self.build
        turned = build.add("Transpose", [keys], f"{layer}/keys_turned", perm=[0, 1, 3, 2])
        root = ""
        if style.scaled == "both":
            root = self._number(style.scale**0.5, f"{layer}/root")
        elif style.scaled == "query":
            query = build.add("Mul", [query, self._number(style.scale, f"{layer}/scale")], f"{layer}/query_scaled")
        elif style.scaled == "shape":
            size = build.add("Cast", [self._length(query, 3, f"{layer}/size")], f"{layer}/size_f", to=TensorProto.FLOAT)
            fourth = build.add("Sqrt", [build.add("Sqrt", [size], f"{layer}/size_root")], f"{layer}/size_fourth")
            root = build.add("Reciprocal", [fourth], f"{layer}/root")
        if root:
            query = build.add("Mul", [query, root], f"{layer}/query_scaled")
            turned = build.add("Mul", [turned, root], f"{layer}/keys_scaled")
        logits = build.add("MatMul", [query, turned], f"{layer}/product")
        if style.scaled == "logits":
            logits = build.add("Div", [logits, self._number(style.size**0.5, f"{layer}/divisor")], f"{layer}/divided")
        if style.softcap:
            cap = self._number(style.softcap, f"{layer}/cap")
            squashed = build.add("Tanh", [build.add("Div", [logits, cap], f"{layer}/ratio")], f"{layer}/tanh")
            logits = build.add("Mul", [squashed, cap], f"{layer}/capped")
        if style.fault == "bias":
            columns = build.add("Cast", ["/model/columns"], f"{layer}/columns_f", to=TensorProto.FLOAT)
            logits = build.add("Add", [logits, columns], f"{layer}/biased")
        return logits

    def _sliced(self, layer: int, seen: str, total: str) -> str:
        bounds = [self.build.constant([0], f"{layer}/from"), total, self.build.constant([-1], f"{layer}/axis")]
        return self.build.add("Slice", [seen, *bounds], f"{layer}/seen")

    def _masked(self, layer: int, logits: str, seen: str) -> str:
        build = self.build
        lowest = self._number(float(np.finfo(self.dtype).min), f"{layer}/lowest")
        if self.style.mask == "chosen":
            return build.add("Where", [seen, logits, lowest], f"{layer}/masked")
        if self.style.mask == "added":
            unseen = build.add("Cast", [build.add("Not", [seen], f"{layer}/unseen")], f"{layer}/unseen_f", to=1)
            return build.add("Add", [logits, build.add("Mul", [unseen, lowest], f"{layer}/bias")], f"{layer}/masked")
        infinite = self._number(-np.inf, f"{layer}/infinite")
        bias = build.add("Where", [seen, self._number(0.0, f"{layer}/none"), infinite], f"{layer}/bias")
        return build.add("Add", [logits, bias], f"{layer}/masked")
