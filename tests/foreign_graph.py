"""Nodes and weights of a decoder that somebody else exported."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from foreign_models import Decoder

VOCABULARY, HIDDEN, INNER, CONTEXT = 64, 32, 48, 192


PAD, STOP = 0, 1


EPSILON = 1e-5


DATA = "model.onnx.data"


Arrays = dict[str, NDArray[Any]]


class Graph:
    """Puts a decoder's graph together."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._nodes: list[onnx.NodeProto] = []
        self._weights = decoder.weights()
        self._used: dict[str, None] = {}

    def model(self) -> onnx.ModelProto:
        decoder = self._decoder
        self._lengths()
        hidden = self._add("Gather", [self._weight("embed"), "input_ids"], "embed_tokens")
        normed = self._norm(hidden, "layers.0.norm")
        for layer in range(decoder.layers):
            at = f"layers.{layer}."
            mixed = self._product(self._attention(normed, layer), at + "o")
            normed, hidden = self._skip_norm(hidden, mixed, at + "mlp_norm")
            last = layer + 1 == decoder.layers
            normed, hidden = self._skip_norm(
                hidden, self._mlp(normed, at), "norm" if last else f"layers.{layer + 1}.norm"
            )
        self._add("MatMul", [normed, self._weight("lm_head")], "lm_head", output="logits")
        graph = helper.make_graph(
            self._nodes,
            "main_graph",
            self._inputs(),
            self._outputs(),
            [numpy_helper.from_array(self._weights[name], name) for name in self._used],
        )
        opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="onnxruntime-genai")

    def _add(self, operator: str, inputs: list[str], name: str, *, output: str = "", **attributes: Any) -> str:
        outputs = [output or f"/model/{name}/output_0"]
        self._nodes.append(helper.make_node(operator, inputs, outputs, name=f"/model/{name}/{operator}", **attributes))
        return outputs[0]

    def _weight(self, name: str) -> str:
        self._used[name] = None
        return name

    def _constant(self, value: Any) -> str:
        output = f"/model/constants/{value}"
        tensor = numpy_helper.from_array(np.array(value, np.int64))
        self._nodes.append(
            helper.make_node("Constant", [], [output], name=f"/model/constant_nodes/{value}", value=tensor)
        )
        return output

    def _lengths(self) -> None:
        one, first = self._constant([1]), self._constant(1)
        count = self._add("ReduceSum", ["attention_mask", one], "mask/ReduceSum", keepdims=0)
        last = self._add("Sub", [count, one], "mask/Sub")
        self._seqlens = self._add("Cast", [last], "mask/Sub/Cast", to=TensorProto.INT32)
        shape = self._add("Shape", ["attention_mask"], "mask/Shape")
        total = self._add("Gather", [shape, first], "mask/Gather", axis=0)
        self._total = self._add("Cast", [total], "mask/Gather/Cast", to=TensorProto.INT32)

    def _norm(self, value: str, weight: str) -> str:
        attributes = {"axis": -1, "epsilon": EPSILON, "stash_type": 1}
        return self._add("SimplifiedLayerNormalization", [value, self._weight(weight)], weight, **attributes)

    def _skip_norm(self, value: str, skip: str, weight: str) -> tuple[str, str]:
        normed, summed = f"/model/{weight}/output_0", f"/model/{weight}/output_3"
        self._nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization",
                [value, skip, self._weight(weight)],
                [normed, "", "", summed],
                name=f"/model/{weight}/SkipLayerNorm",
                domain="com.microsoft",
                epsilon=EPSILON,
            )
        )
        return normed, summed

    def _product(self, value: str, weight: str) -> str:
        return self._add("MatMul", [value, self._weight(weight)], weight)

    def _mlp(self, normed: str, at: str) -> str:
        gate, up = self._product(normed, at + "gate"), self._product(normed, at + "up")
        squashed = self._add("Sigmoid", [gate], at + "sigmoid")
        active = self._add("Mul", [gate, squashed], at + "silu")
        return self._product(self._add("Mul", [active, up], at + "gated"), at + "down")

    def _attention(self, normed: str, layer: int) -> str:
        decoder, at = self._decoder, f"layers.{layer}."
        if decoder.packed:
            packed = np.concatenate([self._weights[at + name] for name in "qkv"], 1)
            self._weights[at + "qkv"] = packed
            operands = [self._product(normed, at + "qkv"), "", ""]
        else:
            operands = [self._product(normed, at + name) for name in "qkv"]
        rotary = [self._weight("cos_cache"), self._weight("sin_cache")] if decoder.rotary else ["", ""]
        inputs = [*operands, *_past(layer), self._seqlens, self._total, *rotary, "", "", ""]
        if decoder.norms:
            inputs += ["", "", self._weight(at + "q_norm"), self._weight(at + "k_norm")]
        attributes = {
            "num_heads": decoder.heads,
            "kv_num_heads": decoder.kv_heads,
            "local_window_size": decoder.window(layer),
            "softcap": decoder.softcap,
            "do_rotary": int(decoder.rotary),
            "rotary_interleaved": int(decoder.interleaved),
            **({"scale": decoder.scale} if decoder.scale else {}),
            **({"sliding_window_cache": 1} if decoder.short_caches and decoder.window(layer) > 0 else {}),
            **decoder.attention_attributes,
        }
        output = f"/model/{at}attn/output_0"
        self._nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                inputs,
                [output, *_present(layer)],
                name=f"/model/{at}attn/GroupQueryAttention",
                domain="com.microsoft",
                **attributes,
            )
        )
        return output

    def _inputs(self) -> list[onnx.ValueInfoProto]:
        whole = helper.make_tensor_value_info
        lengths = {"input_ids": "sequence_length", "attention_mask": "total_sequence_length"}
        found = [whole(name, TensorProto.INT64, ["batch_size", length]) for name, length in lengths.items()]
        for layer in range(self._decoder.layers):
            found += [self._cache(name, "past_sequence_length") for name in _past(layer)]
        return found

    def _outputs(self) -> list[onnx.ValueInfoProto]:
        kind = self._decoder.element_type
        found = [helper.make_tensor_value_info("logits", kind, ["batch_size", "sequence_length", VOCABULARY])]
        for layer in range(self._decoder.layers):
            found += [self._cache(name, "total_sequence_length") for name in _present(layer)]
        return found

    def _cache(self, name: str, length: str) -> onnx.ValueInfoProto:
        decoder = self._decoder
        size = decoder.head_size if decoder.says_head_size else "kv_cache_dim"
        return helper.make_tensor_value_info(name, decoder.element_type, ["batch_size", decoder.kv_heads, length, size])


def _past(layer: int) -> tuple[str, str]:
    return f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"


def _present(layer: int) -> tuple[str, str]:
    return f"present.{layer}.key", f"present.{layer}.value"


def turn(rows: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    first, second = (rows[..., ::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
    turned = first * cos - second * sin, second * cos + first * sin
    return torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)


def rms(values: torch.Tensor, weight: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon) * weight
