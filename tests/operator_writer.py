"""Writes a model of one attention operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from act_export.onnx_file.node_builder import NodeBuilder
from act_export.ops import functions

VOCABULARY = 13


LOWEST = float(np.finfo(np.float32).min)


Array = NDArray[Any]


@dataclass(frozen=True)
class Operator:
    """A decoder whose layers read the token embeddings, and put their outputs side by side.

    Attributes:
        kind: "multi head", "onnx" or "act".
        heads: Query heads.
        kv_heads: Heads of the cache.
        size: Of a head.
        scale: 0 leaves it to the operator.
        softcap: 0 for none.
        window: Keys that a row sees; -1 for all.
        own_cache: The node has the cache; otherwise the graph joins it, and repeats heads.
        apart: Heads are apart in query, key and value.
        mask: "float", "bool", "padding" (a boolean mask of padding; the operator is causal), "keys" (an integer mask of
            padding; the operator is causal), "squares" (as "float", and it has no shape for chunks) or "none".
        causal: The operator is causal, whatever the mask says.
        bias: Of query, key and value, inside the node.
        layers: Their number.
        opset: Of ONNX.
        attributes: More of them, of the node.
        says_size: The graph declares the head size.
        sees: A defect of the mask: "later", "padding", "a position more" or "distance".
    """

    kind: str
    heads: int = 4
    kv_heads: int = 2
    size: int = 8
    scale: float = 0.3
    softcap: float = 0.0
    window: int = -1
    own_cache: bool = True
    apart: bool = False
    mask: str = "float"
    causal: bool = False
    bias: bool = False
    layers: int = 1
    opset: int = 23
    attributes: tuple[tuple[str, Any], ...] = ()
    says_size: bool = True
    sees: str = ""

    @property
    def hidden(self) -> int:
        return self.heads * self.size

    @cached_property
    def weights(self) -> dict[str, Array]:
        random = np.random.default_rng(self.heads * 31 + self.size)
        found = {"embed": random.standard_normal((VOCABULARY, self.hidden))}
        for layer in range(self.layers):
            for name, heads in zip("qkv", (self.heads, self.kv_heads, self.kv_heads), strict=True):
                matrix = random.standard_normal((self.hidden, heads * self.size))
                found[f"{layer}.{name}"] = matrix * 1.5 / self.hidden**0.5
                if self.bias:
                    found[f"{layer}.{name}.bias"] = random.standard_normal(heads * self.size)
        return {name: values.astype(np.float32) for name, values in found.items()}

    @cached_property
    def model(self) -> onnx.ModelProto:
        return _Writer(self).model()

    def projected(self, layer: int, ids: Array) -> list[Array]:
        """Query, key and value of tokens."""
        embedded, weights = self.weights["embed"][ids], self.weights
        return [embedded @ weights[f"{layer}.{n}"] + weights.get(f"{layer}.{n}.bias", np.float32(0)) for n in "qkv"]


class _Writer:
    """Writes the graph of an operator."""

    def __init__(self, operator: Operator) -> None:
        self.operator, self.build = operator, NodeBuilder("/model/")
        self.weights = {name: values for name, values in operator.weights.items() if not name.endswith(".bias")}

    def model(self) -> onnx.ModelProto:
        operator, build = self.operator, self.build
        embedded = build.add("Gather", ["embed", "input_ids"], "embedded")
        masks = write_mask(build, operator.mask, operator.window, operator.sees, operator.heads)
        outputs = [self._layer(layer, embedded, masks) for layer in range(operator.layers)]
        build.add("Concat", outputs, "outputs", output="logits", axis=-1)
        width = operator.layers * operator.hidden
        inputs, results = inputs_of_tokens(), [_info("logits", ["batch", "sequence", width])]
        shape = ["batch", operator.kv_heads, "past", operator.size if operator.says_size else "size"]
        for layer in range(operator.layers):
            for part in ("key", "value"):
                inputs.append(_info(f"past_key_values.{layer}.{part}", shape))
                results.append(_info(f"present.{layer}.{part}", [*shape[:2], "total", shape[3]]))
        tables = [numpy_helper.from_array(values, name) for name, values in self.weights.items()]
        known = []
        if operator.apart:
            known = [_info(f"/model/{n}/query", ["batch", operator.heads, None, None]) for n in range(operator.layers)]
        graph = helper.make_graph(build.nodes, "main", inputs, results, tables, value_info=known)
        domains = {"": operator.opset, "com.microsoft": 1, "act": 1}
        used = {node.domain for node in build.nodes}
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid(name, version) for name, version in domains.items() if name in used],
            functions=[functions.function_body("Attention", operator.opset)] if operator.kind == "act" else [],
            ir_version=10,
        )

    def _layer(self, layer: int, embedded: str, masks: dict[str, str]) -> str:
        operator, build = self.operator, self.build
        query, key, value = (
            build.add("MatMul", [embedded, f"{layer}.{name}"], f"{layer}/{name}_proj") for name in "qkv"
        )
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        if operator.apart:
            query = build.split_heads(query, operator.heads, f"{layer}/query")
        if operator.own_cache and operator.apart:
            key, value = (
                build.split_heads(each, operator.kv_heads, f"{layer}/{name}")
                for each, name in ((key, "k"), (value, "v"))
            )
        if not operator.own_cache:
            key, value = (self._joined(*each) for each in zip((key, value), past, present, strict=True))
        cache = (past, present) if operator.own_cache else (["", ""], [])
        attended = getattr(self, "_" + operator.kind.replace(" ", "_"))(layer, [query, key, value], masks, *cache)
        return build.flatten_heads(attended, f"{layer}/flat") if operator.apart else attended

    def _joined(self, flat: str, past: str, present: str) -> str:
        """Puts new keys behind the cache, and repeats its heads as onnxruntime-genai's builder does."""
        operator, build = self.operator, self.build
        at = present.replace(".", "/")
        new = build.split_heads(flat, operator.kv_heads, f"{at}/new")
        used = build.add("Concat", [past, new], f"{at}/joined", output=present, axis=2)
        group = operator.heads // operator.kv_heads
        if operator.kind == "multi head" and group > 1:
            wide = build.add("Unsqueeze", [used, build.constant([2], f"{at}/axis")], f"{at}/wide")
            repeats = build.constant([1, 1, group, 1, 1], f"{at}/repeats")
            used = build.add("Tile" if operator.size % 2 else "Expand", [wide, repeats], f"{at}/repeated")
            used = build.add("Reshape", [used, build.constant([0, operator.heads, -1, operator.size], f"{at}/s")], at)
        return used if operator.apart else build.flatten_heads(used, f"{at}/flat")

    def _attributes(self, named: dict[str, Any]) -> dict[str, Any]:
        return {**{name: value for name, value in named.items() if value}, **dict(self.operator.attributes)}

    def _multi_head(
        self, layer: int, operands: Sequence[str], masks: dict[str, str], past: list[str], present: list[str]
    ) -> str:
        operator = self.operator
        bias = ""
        if operator.bias:
            bias = f"{layer}.bias"
            self.weights[bias] = np.concatenate([operator.weights[f"{layer}.{name}.bias"] for name in "qkv"])
        output = f"/model/{layer}/attention"
        self.build.add_many(
            "MultiHeadAttention",
            [*operands, bias, masks.get("keys", ""), masks.get("added", ""), *past],
            f"{layer}/attention",
            [output, *present],
            domain="com.microsoft",
            num_heads=operator.heads,
            **self._attributes(
                {"scale": operator.scale, "unidirectional": int(operator.causal or operator.mask == "keys")}
            ),
        )
        return output

    def _onnx(
        self, layer: int, operands: Sequence[str], masks: dict[str, str], past: list[str], present: list[str]
    ) -> str:
        operator = self.operator
        output = f"/model/{layer}/attention"
        counts = {} if operator.apart else {"q_num_heads": operator.heads, "kv_num_heads": operator.kv_heads}
        named = {
            **counts,
            "scale": operator.scale,
            "softcap": operator.softcap,
            "is_causal": int(operator.causal or operator.mask == "padding"),
        }
        inputs = [*operands, masks.get("added", ""), *past]
        self.build.add_many("Attention", inputs, f"{layer}/attention", [output, *present], **self._attributes(named))
        return output

    def _act(
        self, layer: int, operands: Sequence[str], masks: dict[str, str], past: list[str], present: list[str]
    ) -> str:
        operator = self.operator
        output = f"/model/{layer}/attention"
        self.build.add_many(
            "Attention",
            [*operands, *past, "attention_mask"],
            f"{layer}/attention",
            [output, *present],
            domain="act",
            num_heads=operator.heads,
            kv_num_heads=operator.kv_heads,
            scale=operator.scale,
            softcap=operator.softcap,
            sliding_window=operator.window,
            **dict(operator.attributes),
        )
        return output


def _info(name: str, shape: Sequence[int | str | None], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def inputs_of_tokens() -> list[onnx.ValueInfoProto]:
    """Those that every decoder has."""
    return [
        _info("input_ids", ["batch", "sequence"], TensorProto.INT64),
        _info("attention_mask", ["batch", "total"], TensorProto.INT64),
    ]


def write_mask(build: NodeBuilder, mask: str, window: int, sees: str = "", heads: int = 1) -> dict[str, str]:
    """Adds the nodes of a mask; see `Operator.mask`.

    Returns:
        Names of the values: "added" to logits, or of "keys".
    """
    if mask == "none":
        return {}
    if mask == "keys":
        return {"keys": build.add("Cast", ["attention_mask"], "keys", to=TensorProto.INT32)}
    real = build.add("Cast", ["attention_mask"], "real", to=TensorProto.BOOL)
    real = build.add("Unsqueeze", [real, build.constant([1, 2], "real_axes")], "real_4d")
    sequence = build.add("Shape", ["input_ids"], "sequence", start=1, end=2)
    if mask == "padding":
        one = build.constant([1], "one")
        shape = build.add("Concat", [one, one, sequence, one], "padding_shape", axis=0)
        return {"added": build.add("Expand", [real, shape], "padding")}
    total = build.add("Shape", ["attention_mask"], "total", start=1, end=2)
    zero, one = build.constant(np.array(0), "zero"), build.constant(np.array(1), "step")
    ends = [build.add("Squeeze", [each], f"{name}_0") for each, name in ((sequence, "sequence"), (total, "total"))]
    first = zero if mask == "squares" else build.add("Sub", [ends[1], ends[0]], "past")
    rows = build.add("Range", [first, ends[0] if mask == "squares" else ends[1], one], "rows_1d")
    rows = build.add("Unsqueeze", [rows, build.constant([1], "rows_axis")], "rows")
    columns = build.add("Range", [zero, ends[0] if mask == "squares" else ends[1], one], "columns")
    newest = build.add("Add", [rows, one], "newest") if sees == "a position more" else rows
    seen = build.add("LessOrEqual", [columns, newest], "causal")
    if sees == "later":
        seen = build.add("Or", [seen, build.add("Not", [seen], "later")], "everything")
    if window >= 0:
        oldest = build.add("Sub", [rows, build.constant(np.array(window), "window")], "oldest")
        seen = build.add("And", [seen, build.add("Greater", [columns, oldest], "near")], "causal_in_window")
    if mask == "squares":
        return {"added": _of_squares(build, seen, real, heads)}
    if sees != "padding":
        seen = build.add("And", [seen, real], "seen")
    if mask == "bool":
        return {"added": seen}
    lowest, nothing = (
        build.constant(np.array(n, np.float32), name) for n, name in ((LOWEST, "lowest"), (0, "nothing"))
    )
    added = build.add("Where", [seen, nothing, lowest], "added")
    if sees == "distance":
        far = build.add("Cast", [build.add("Sub", [columns, rows], "far")], "far_f", to=TensorProto.FLOAT)
        slopes = build.constant(np.linspace(0.1, 1, heads, dtype=np.float32).reshape(1, -1, 1, 1), "slopes")
        added = build.add("Add", [added, build.add("Mul", [far, slopes], "distance")], "biased")
    if sees == "padding":  # still for each sequence, as operators want it
        ones = build.constant([1, 1, 1, 1], "ones")
        added = build.add("Expand", [added, ones], "seen_4d")
    return {"added": added}


def _of_squares(build: NodeBuilder, seen: str, real: str, heads: int) -> str:
    """A causal part of new tokens only, which can't be added to padding of more tokens, for every head."""
    lowest, nothing = (
        build.constant(np.array(n, np.float32), name) for n, name in ((LOWEST, "lowest"), (0, "nothing"))
    )
    causal = build.add("Where", [seen, nothing, lowest], "causal_f")
    padding = build.add("Where", [real, nothing, lowest], "padding_f")
    both = build.add("Add", [padding, causal], "both")
    return build.add("Tile", [both, build.constant([1, heads, 1, 1], "repeats")], "tiled")
