"""Which parameter each tensor of a GGUF file is, and what its numbers go through on the way, for each architecture.

A table of our own, from llama.cpp's converter (https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py)
read backwards; it shares nothing with transformers' loader, so that each can be checked by the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Change = Callable[[np.ndarray, "Heads"], np.ndarray]


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model: of queries, and of keys and values."""

    queries: int
    keys: int


def same(values: np.ndarray, heads: Heads) -> np.ndarray:
    """The numbers as they are stored."""
    return values


def less_one(values: np.ndarray, heads: Heads) -> np.ndarray:
    """Weights of norms that are stored with the 1 added that the model adds itself."""
    return np.asarray(values - np.float32(1))


def transposed(values: np.ndarray, heads: Heads) -> np.ndarray:
    """[out, in] to the [in, out] of GPT-2's layers."""
    return np.asarray(values.T)


def as_row(values: np.ndarray, heads: Heads) -> np.ndarray:
    """[n] to [1, n]."""
    return np.asarray(values.reshape(1, -1))


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head's rotated pairs, stored one pair after the other, to all first and then all second halves."""
    size = values.shape[0] // heads
    order = np.concatenate([np.arange(0, size, 2), np.arange(1, size, 2)])
    return np.asarray(values[(np.arange(heads)[:, None] * size + order).ravel()])


def query_halves(values: np.ndarray, heads: Heads) -> np.ndarray:
    """As `_halves`, of queries: [heads * size, ...]."""
    return _halves(values, heads.queries)


def key_halves(values: np.ndarray, heads: Heads) -> np.ndarray:
    """As `_halves`, of keys."""
    return _halves(values, heads.keys)


@dataclass(frozen=True)
class Target:
    """What a tensor is in the model.

    Attributes:
        parameter: Its name; {n} stands for the layer.
        change: What makes its numbers the parameter's.
        part: Which part it is of `parts` equal ones along the parameter's second dimension.
        parts: Tensors that the parameter is made of.
    """

    parameter: str
    change: Change = same
    part: int = 0
    parts: int = 1

    def slice_of(self, parameter: np.ndarray) -> np.ndarray:
        """The part of the whole parameter that this tensor is."""
        if self.parts == 1:
            return parameter
        width = parameter.shape[1] // self.parts
        return parameter[:, self.part * width : (self.part + 1) * width]


def _with_bias(stored: str, parameter: str, change: Change = same) -> dict[str, Target]:
    return {f"{stored}.{each}": Target(f"{parameter}.{each}", change) for each in ("weight", "bias")}


_ENDS = {
    "token_embd.weight": Target("model.embed_tokens.weight"),
    "output.weight": Target("lm_head.weight"),
    **_with_bias("output_norm", "model.norm"),
}
_ATTENTION = {
    **_with_bias("attn_q", "self_attn.q_proj"),
    **_with_bias("attn_k", "self_attn.k_proj"),
    **_with_bias("attn_v", "self_attn.v_proj"),
    **_with_bias("attn_output", "self_attn.o_proj"),
}
_GATED = {
    name: target
    for part in ("gate", "up", "down")
    for name, target in _with_bias(f"ffn_{part}", f"mlp.{part}_proj").items()
}
_TWO_NORMS = {**_with_bias("attn_norm", "input_layernorm"), **_with_bias("ffn_norm", "post_attention_layernorm")}
_HEAD_NORMS = {
    "attn_q_norm.weight": Target("self_attn.q_norm.weight"),
    "attn_k_norm.weight": Target("self_attn.k_norm.weight"),
}
_INTERLEAVED = {
    **_with_bias("attn_q", "self_attn.q_proj", query_halves),
    **_with_bias("attn_k", "self_attn.k_proj", key_halves),
}
_FOUR_NORMS = {
    "attn_norm.weight": Target("input_layernorm.weight", less_one),
    "post_attention_norm.weight": Target("post_attention_layernorm.weight", less_one),
    "ffn_norm.weight": Target("pre_feedforward_layernorm.weight", less_one),
    "post_ffw_norm.weight": Target("post_feedforward_layernorm.weight", less_one),
}
_EXPERTS = {
    "ffn_gate_inp.weight": Target("mlp.gate.weight"),
    "ffn_gate_exps.weight": Target("mlp.experts.gate_up_proj", part=0, parts=2),
    "ffn_up_exps.weight": Target("mlp.experts.gate_up_proj", part=1, parts=2),
    "ffn_down_exps.weight": Target("mlp.experts.down_proj"),
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp.weight": Target("mlp.shared_expert_gate.weight", as_row),
    **{f"ffn_{part}_shexp.weight": Target(f"mlp.shared_expert.{part}_proj.weight") for part in ("gate", "up", "down")},
}


def _layers(*tables: Mapping[str, Target], prefix: str = "model.layers.{n}.") -> dict[str, Target]:
    """Tables of one layer's tensors as a table of all; later tables have the last word."""
    found: dict[str, Target] = {}
    for table in tables:
        for name, target in table.items():
            found[f"blk.{{n}}.{name}"] = Target(prefix + target.parameter, target.change, target.part, target.parts)
    return found


_LESS_ONE_END = {"output_norm.weight": Target("model.norm.weight", less_one)}
_GPT2 = {
    "token_embd.weight": Target("transformer.wte.weight"),
    "position_embd.weight": Target("transformer.wpe.weight"),
    "output.weight": Target("lm_head.weight"),
    **_with_bias("output_norm", "transformer.ln_f"),
    **_layers(
        {
            **_with_bias("attn_norm", "ln_1"),
            **_with_bias("ffn_norm", "ln_2"),
            **{
                f"{stored}.{each}": Target(f"{name}.{each}", transposed if each == "weight" else same)
                for stored, name in {
                    "attn_qkv": "attn.c_attn",
                    "attn_output": "attn.c_proj",
                    "ffn_up": "mlp.c_fc",
                    "ffn_down": "mlp.c_proj",
                }.items()
                for each in ("weight", "bias")
            },
        },
        prefix="transformer.h.{n}.",
    ),
}
_PLAIN_FEED_FORWARD = {**_with_bias("ffn_up", "mlp.c_fc"), **_with_bias("ffn_down", "mlp.c_proj")}

NAMES: dict[str, dict[str, Target]] = {
    "llama": _ENDS | _layers(_ATTENTION, _INTERLEAVED, _GATED, _TWO_NORMS),
    "qwen2": _ENDS | _layers(_ATTENTION, _GATED, _TWO_NORMS),
    "qwen3": _ENDS | _layers(_ATTENTION, _HEAD_NORMS, _GATED, _TWO_NORMS),
    "qwen2moe": _ENDS | _layers(_ATTENTION, _EXPERTS, _SHARED_EXPERT, _TWO_NORMS),
    "qwen3moe": _ENDS | _layers(_ATTENTION, _HEAD_NORMS, _EXPERTS, _TWO_NORMS),
    "gemma2": _ENDS | _LESS_ONE_END | _layers(_ATTENTION, _GATED, _FOUR_NORMS),
    "gemma3": _ENDS
    | _LESS_ONE_END
    | _layers(
        _ATTENTION,
        {name: Target(target.parameter, less_one) for name, target in _HEAD_NORMS.items()},
        _GATED,
        _FOUR_NORMS,
    ),
    "phi3": _ENDS
    | _layers(
        {
            "attn_qkv.weight": Target("self_attn.qkv_proj.weight"),
            "attn_output.weight": Target("self_attn.o_proj.weight"),
            "ffn_up.weight": Target("mlp.gate_up_proj.weight"),
            "ffn_down.weight": Target("mlp.down_proj.weight"),
        },
        _TWO_NORMS,
    ),
    "starcoder2": _ENDS | _layers(_ATTENTION, _PLAIN_FEED_FORWARD, _TWO_NORMS),
    "stablelm": _ENDS | _layers(_ATTENTION, _GATED, _TWO_NORMS),
    "nemotron": _ENDS
    | _LESS_ONE_END
    | _layers(
        _ATTENTION,
        _GATED,
        _TWO_NORMS,
        {
            "attn_norm.weight": Target("input_layernorm.weight", less_one),
            "ffn_norm.weight": Target("post_attention_layernorm.weight", less_one),
        },
    ),
    "gpt2": _GPT2,
}

_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,8})\.(.+)")


def layer_of(name: str) -> int | None:
    """The layer that a tensor is of; None for one that is of none."""
    found = _LAYER.fullmatch(name)
    return int(found[1]) if found else None


def target_of(architecture: str, name: str) -> Target | None:
    """What a tensor is in models of this architecture; None if that isn't known."""
    table = NAMES[architecture]
    found = _LAYER.fullmatch(name)
    if found is None:
        return table.get(name)
    target = table.get(f"blk.{{n}}.{found[2]}")
    if target is None:
        return None
    return Target(target.parameter.replace("{n}", found[1]), target.change, target.part, target.parts)


def tensors_of(architecture: str, parameter: str) -> list[str]:
    """The tensors that a parameter is made of; none if that isn't known."""
    layer = re.search(r"\.(\d+)\.", parameter)
    found = []
    for name, target in NAMES[architecture].items():
        number = layer[1] if layer and "{n}" in name else ""
        if target.parameter.replace("{n}", number) == parameter:
            found.append(name.replace("{n}", number))
    return found
