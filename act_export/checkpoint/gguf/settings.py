"""GGUF keys -> the settings of a transformers configuration, for each architecture whose files are verified.

What llama.cpp computes is what counts, where a key is missing too:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp (load_hparams) and its src/models.
With one exception: llama.cpp switches the sliding window of Phi-3 off, for want of support. Here it is applied, as
transformers does with the original checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from act_export.checkpoint.gguf.keys import Keys, special_tokens
from act_export.checkpoint.gguf.names import NAMES, Heads, layer_of
from act_export.checkpoint.gguf.rope import Rotary, read_rotary
from act_export.errors import CheckpointError

TIED_OUTPUT = "output.weight"


@dataclass(frozen=True)
class Settings:
    """What a file says of its model.

    Attributes:
        model_type: As transformers calls it.
        values: Of the configuration.
        heads: Of the attention.
        rotary: Of each kind of layer; "" where all are alike; empty for none.
        remarks: On keys that nothing was made of.
    """

    model_type: str
    values: dict[str, Any]
    heads: Heads
    rotary: dict[str, Rotary]
    remarks: tuple[str, ...] = ()


class _Shape:
    """The sizes that all architectures have, compared with the tensors before anything is made by them."""

    def __init__(self, keys: Keys) -> None:
        tensors = keys.gguf.tensors
        embedding = tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise CheckpointError(f"can't load {keys.gguf.path}: it has no tensor token_embd.weight, [tokens, width]")
        self.vocabulary, width = embedding.shape
        self.width = keys.count("embedding_length")
        if self.width != width:
            raise keys.refused(keys.full("embedding_length"), self.width, f"token_embd.weight has {width} columns")
        if keys.count("vocab_size", self.vocabulary) != self.vocabulary:
            raise keys.refused(
                keys.full("vocab_size"), keys.take("vocab_size"), f"token_embd.weight has {self.vocabulary} rows"
            )
        self.layers = keys.count("block_count")
        found = {layer for name in tensors if (layer := layer_of(name)) is not None}
        if len(found) != self.layers or max(found, default=-1) != self.layers - 1:
            raise keys.refused(
                keys.full("block_count"),
                self.layers,
                f"the tensors are of {len(found)} layers, up to {max(found, default='none')}",
            )
        self.heads = keys.count("attention.head_count")
        self.key_heads = keys.count("attention.head_count_kv", self.heads)
        if self.heads > self.width or self.heads % self.key_heads:
            raise keys.refused(
                keys.full("attention.head_count_kv"),
                self.key_heads,
                f"there are {self.heads} heads and {self.width} columns",
            )
        self.head_size = keys.count("attention.key_length", max(1, self.width // self.heads))
        keys.must_be("attention.value_length", self.head_size, f"keys have {self.head_size} numbers and values as many")
        keys.must_be("attention.scale", self.head_size**-0.5, "the model divides by the root of the heads' size")
        self._check_heads(keys)
        self.context = keys.count("context_length")

    def _check_heads(self, keys: Keys) -> None:
        """Raises CheckpointError if rows of queries and keys aren't what the heads make."""
        for name, heads in {
            "attn_q": self.heads,
            "attn_k": self.key_heads,
            "attn_qkv": self.heads + 2 * self.key_heads,
        }.items():
            tensor = keys.gguf.tensors.get(f"blk.0.{name}.weight")
            if tensor is not None and tensor.shape[0] != heads * self.head_size:
                raise keys.refused(
                    keys.full("attention.head_count"),
                    self.heads,
                    f"with {self.key_heads} heads of keys and {self.head_size} numbers in each, {name} has "
                    f"{heads * self.head_size} rows, not the {tensor.shape[0]} of blk.0.{name}.weight",
                )

    def rotary_size(self, keys: Keys) -> int:
        return keys.count("rope.dimension_count", self.head_size)


def read_settings(keys: Keys) -> Settings:
    """A file's settings.

    Raises:
        CheckpointError: If the architecture isn't verified, or a key can't be applied, with the key.
    """
    made = _SETTINGS.get(keys.architecture)
    if made is None:
        raise CheckpointError(
            f"can't load {keys.gguf.path}: GGUF files of the architecture {keys.architecture!r} aren't verified, only "
            f"those of {', '.join(sorted(_SETTINGS))}; convert the original checkpoint to safetensors and pass that"
        )
    shape = _Shape(keys)
    model_type, own, rotary = made(keys, shape)
    values: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        **({} if model_type == "gpt2" else {"num_key_value_heads": shape.key_heads}),
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": TIED_OUTPUT not in keys.gguf.tensors,
        **{f"{name}_token_id": token for name, token in special_tokens(keys.gguf).items() if name != "unk"},
        **own,
    }
    if "" in rotary:
        values["rope_parameters"] = rotary[""].parameters()
    elif rotary:
        values["rope_parameters"] = {kind: each.parameters() for kind, each in rotary.items()}
    heads = Heads(shape.heads, shape.key_heads)
    return Settings(model_type, values, heads, rotary, tuple(keys.check_all_taken()))


_Made = tuple[str, dict[str, Any], dict[str, Rotary]]


def _gated(keys: Keys, shape: _Shape, *, factors: bool = False) -> tuple[dict[str, Any], dict[str, Rotary]]:
    """The settings that models like Llama share."""
    values = {
        "intermediate_size": keys.count("feed_forward_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "head_dim": shape.head_size,
    }
    return values, _one_rotary(keys, shape, factors=factors)


def _one_rotary(keys: Keys, shape: _Shape, *, factors: bool = False, partial: bool = False) -> dict[str, Rotary]:
    size = shape.rotary_size(keys)
    if size != shape.head_size and not partial:
        raise keys.refused(
            keys.full("rope.dimension_count"),
            size,
            f"heads have {shape.head_size} numbers, and all of them are rotated",
        )
    rotary = read_rotary(
        keys, size=size, head_size=shape.head_size, context=shape.context, factors=factors, partial=partial
    )
    return {"": rotary}


def _has_bias(keys: Keys, *names: str) -> bool:
    return any(f"blk.0.{name}.bias" in keys.gguf.tensors for name in names)


def _llama(keys: Keys, shape: _Shape) -> _Made:
    values, rotary = _gated(keys, shape, factors=True)
    values["attention_bias"] = _has_bias(keys, "attn_q", "attn_output")
    values["mlp_bias"] = _has_bias(keys, "ffn_up")
    window = keys.count("attention.sliding_window", 0, least=0)
    if 0 < window < shape.context:
        raise keys.refused(
            keys.full("attention.sliding_window"),
            window,
            f"the model sees all of its {shape.context} tokens; convert the original checkpoint to safetensors and "
            f"pass that",
        )
    return "llama", values, rotary


def _qwen2(keys: Keys, shape: _Shape) -> _Made:
    return "qwen2", *_gated(keys, shape)


def _qwen3(keys: Keys, shape: _Shape) -> _Made:
    return "qwen3", *_gated(keys, shape)


def _experts(keys: Keys, *, normalised: bool) -> dict[str, Any]:
    count = keys.count("expert_count")
    router = keys.gguf.tensors.get("blk.0.ffn_gate_inp.weight")
    if router is None or router.shape[0] != count:
        raise keys.refused(keys.full("expert_count"), count, "blk.0.ffn_gate_inp.weight has another number of rows")
    used = keys.count("expert_used_count")
    if used > count:
        raise keys.refused(keys.full("expert_used_count"), used, f"there are {count} experts")
    keys.must_be("expert_weights_norm", float(normalised), "weights of experts are of another kind")
    if keys.take("expert_gating_func") not in (None, 0, 1):
        raise keys.refused(keys.full("expert_gating_func"), keys.take("expert_gating_func"), "softmax (1) is known")
    return {
        "num_experts": count,
        "num_experts_per_tok": used,
        "moe_intermediate_size": _columns(keys, "ffn_down_exps", "expert_feed_forward_length"),
        "norm_topk_prob": normalised,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _columns(keys: Keys, tensor: str, key: str) -> int:
    """A size that files needn't state, from a tensor; and what they state must agree."""
    found = keys.gguf.tensors.get(f"blk.0.{tensor}.weight")
    if found is None:
        raise CheckpointError(f"can't load {keys.gguf.path}: it has no tensor blk.0.{tensor}.weight")
    keys.must_be(key, found.shape[-1], f"{tensor} has {found.shape[-1]} columns")
    return found.shape[-1]


def _qwen2moe(keys: Keys, shape: _Shape) -> _Made:
    values, rotary = _gated(keys, shape)
    values |= _experts(keys, normalised=False)
    values["shared_expert_intermediate_size"] = _columns(keys, "ffn_down_shexp", "expert_shared_feed_forward_length")
    return "qwen2_moe", values, rotary


def _qwen3moe(keys: Keys, shape: _Shape) -> _Made:
    values, rotary = _gated(keys, shape)
    return "qwen3_moe", values | _experts(keys, normalised=True), rotary


def _scale_of_27b(shape: _Shape, layers: int) -> int:
    """Gemma's query_pre_attn_scalar; llama.cpp knows the one that differs by its layers."""
    return shape.width // shape.heads if shape.layers == layers else shape.head_size


def _window_pattern(keys: Keys, default: int) -> int:
    found = keys.take("attention.sliding_window_pattern")
    if isinstance(found, list):
        expected = [bool((layer + 1) % default) for layer in range(len(found))]
        if [bool(each) for each in found] == expected:
            return default
    elif found is None or (type(found) is int and 0 < found <= 1024):
        return found or default
    raise keys.refused(keys.full("attention.sliding_window_pattern"), found, f"one full layer in {default} is known")


def _gemma2(keys: Keys, shape: _Shape) -> _Made:
    values, rotary = _gated(keys, shape)
    if (pattern := _window_pattern(keys, 2)) != 2:
        raise keys.refused(keys.full("attention.sliding_window_pattern"), pattern, "one full layer in 2 is known")
    values |= {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 50.0, positive=False) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 30.0, positive=False) or None,
        "sliding_window": keys.count("attention.sliding_window", 4096),
        "query_pre_attn_scalar": _scale_of_27b(shape, 46),
        "layer_types": _layer_types(shape.layers, 2),
        "hidden_activation": "gelu_pytorch_tanh",
    }
    return "gemma2", values, rotary


def _layer_types(layers: int, pattern: int) -> list[str]:
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(layers)]


def _gemma3(keys: Keys, shape: _Shape) -> _Made:
    why = f"heads have {shape.head_size} numbers in every layer"
    for name in ("attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"):
        keys.must_be(name, shape.head_size, why)
    values, rotary = _gated(keys, shape)
    full = rotary[""]
    if full.kind not in ("default", "linear"):
        raise keys.refused(keys.full("rope.scaling.type"), full.kind, "linear scaling is known of Gemma 3")
    window = keys.count("attention.sliding_window", least=1)
    kinds = _layer_types(shape.layers, _window_pattern(keys, 6))
    values |= {
        "attn_logit_softcapping": keys.number("attn_logit_softcapping", 0.0, positive=False) or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0, positive=False) or None,
        "sliding_window": window,
        "query_pre_attn_scalar": _scale_of_27b(shape, 62),
        "layer_types": kinds,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    local = Rotary("default", keys.number("rope.freq_base_swa", 10000.0), full.size, full.share)
    return "gemma3_text", values, {"sliding_attention": local, "full_attention": full}


def _phi3(keys: Keys, shape: _Shape) -> _Made:
    window = keys.count("attention.sliding_window", 0, least=0)
    values = {
        "intermediate_size": keys.count("feed_forward_length"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "sliding_window": window or None,
        "head_dim": shape.head_size,
    }
    rotary = _one_rotary(keys, shape, factors=True, partial=True)
    if rotary[""].kind == "longrope":
        values["original_max_position_embeddings"] = rotary[""].original
    return "phi3", values, rotary


def _starcoder2(keys: Keys, shape: _Shape) -> _Made:
    values = {
        "intermediate_size": keys.count("feed_forward_length"),
        "norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "use_bias": _has_bias(keys, "attn_q", "attn_output", "ffn_up"),
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": keys.count("attention.sliding_window", 0, least=0) or None,
        "head_dim": shape.head_size,
    }
    return "starcoder2", values, _one_rotary(keys, shape)


def _stablelm(keys: Keys, shape: _Shape) -> _Made:
    parallel = "blk.0.ffn_norm.weight" not in keys.gguf.tensors
    if keys.has("use_parallel_residual") and bool(keys.take("use_parallel_residual")) != parallel:
        raise keys.refused(
            keys.full("use_parallel_residual"),
            keys.take("use_parallel_residual"),
            f"there is {'no ' if parallel else 'a '}tensor blk.0.ffn_norm.weight",
        )
    _head_size_is_plain(keys, shape)
    values = {
        "intermediate_size": keys.count("feed_forward_length"),
        "layer_norm_eps": keys.number("attention.layer_norm_epsilon"),
        "use_qkv_bias": _has_bias(keys, "attn_q", "attn_k", "attn_v"),
        "use_parallel_residual": parallel,
        "qk_layernorm": False,
    }
    return "stablelm", values, _one_rotary(keys, shape, partial=True)


def _head_size_is_plain(keys: Keys, shape: _Shape) -> None:
    if shape.head_size * shape.heads != shape.width:
        raise keys.refused(
            keys.full("attention.key_length"),
            shape.head_size,
            f"{shape.heads} heads of {shape.width} columns are expected",
        )


def _nemotron(keys: Keys, shape: _Shape) -> _Made:
    values = {
        "intermediate_size": keys.count("feed_forward_length"),
        "norm_eps": keys.number("attention.layer_norm_epsilon"),
        "head_dim": shape.head_size,
        "attention_bias": _has_bias(keys, "attn_q", "attn_output"),
        "mlp_bias": _has_bias(keys, "ffn_up"),
        "hidden_act": "relu2",
    }
    return "nemotron", values, _one_rotary(keys, shape, partial=True)


def _gpt2(keys: Keys, shape: _Shape) -> _Made:
    positions = keys.gguf.tensors.get("position_embd.weight")
    if positions is None or positions.shape[0] != shape.context:
        raise keys.refused(
            keys.full("context_length"), shape.context, "position_embd.weight isn't there, or has other rows"
        )
    if shape.key_heads != shape.heads:
        raise keys.refused(keys.full("attention.head_count_kv"), shape.key_heads, f"there are {shape.heads} heads")
    _head_size_is_plain(keys, shape)
    keys.must_be("rope.dimension_count", 0, "GPT-2 rotates nothing")
    values = {
        "n_inner": keys.count("feed_forward_length", 4 * shape.width),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
    }
    return "gpt2", values, {}


_SETTINGS: dict[str, Callable[[Keys, _Shape], _Made]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "llama": _llama,
    "nemotron": _nemotron,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen2moe": _qwen2moe,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3moe,
    "stablelm": _stablelm,
    "starcoder2": _starcoder2,
}
assert _SETTINGS.keys() == NAMES.keys()


def is_close(found: object, expected: object) -> bool:
    """Whether a configuration's value is the one that the keys give."""
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-9)
    return bool(found == expected)
