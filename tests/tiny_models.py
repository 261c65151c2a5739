"""Tiny random models of every architecture that is supported, with every kind of attention that each has.

A variant is a configuration class of transformers, by its `model_type`, and what it is given; the weights are drawn at
random, large enough that an error in one layer shows in the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCABULARY = 259  # a token per byte, and three of its own
WINDOW = 7

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_ALTERNATING = ["sliding_attention", "full_attention"]
_OLD_FALCON = {"new_decoder_architecture": False, "num_ln_in_parallel_attn": None}
_SMALL_WEIGHTS = {"initializer_range": 0.2}  # as rounding grows with what experts add
_EXPERTS = {**_SMALL_WEIGHTS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# What an architecture calls otherwise, or needs besides.
_OWN: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**_GPT, "rotary_dim": 4},
    "cohere2": {"sliding_window": WINDOW, "layer_types": _ALTERNATING, "logit_scale": 1.0},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 2},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": _ALTERNATING},
    "gpt2": _GPT,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_oss": {**_SMALL_WEIGHTS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    "gptj": {**_GPT, "rotary_dim": 4},
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {**_SMALL_WEIGHTS, "num_local_experts": 4, "num_experts_per_tok": 2},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2, "max_seq_len": 256},
    "olmoe": {**_SMALL_WEIGHTS, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.4},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": _EXPERTS,
}
_WITHOUT_HEAD_SIZE = {"falcon"}  # whose configuration computes it


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        architecture: `model_type` of the configuration.
        name: What is special about it, for the table.
        changes: To the configuration.
        note: What to know about it.
    """

    architecture: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        return f"{self.architecture}: {self.name}"


def _rope(kind: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **options}}


VARIANTS = (
    Variant("llama", "Llama 2, Vicuna: a key head for each query head", {"num_key_value_heads": 4}),
    Variant("llama", "grouped queries, tied embeddings"),
    Variant(
        "llama",
        "Llama 3 rope scaling",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    Variant("llama", "biases, linear rope scaling", {"attention_bias": True, **_rope("linear", factor=2.0)}),
    Variant("mistral", "sliding window"),
    Variant("mistral", "no window", {"sliding_window": None}),
    Variant("mixtral", "experts", note="an expert runs for the tokens that chose it"),
    Variant("opt", "norm before"),
    Variant("opt", "norm after, projected embeddings", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    Variant("gptj", "interleaved partial rotary, parallel layers"),
    Variant("codegen", "interleaved partial rotary, fused projections"),
    Variant("gpt2", "learned positions"),
    Variant("gpt2", "scaled by layer", {"scale_attn_by_inverse_layer_idx": True}),
    Variant("gpt_neox", "partial rotary, parallel residual"),
    Variant("gpt_neox", "sequential residual", {"use_parallel_residual": False}),
    Variant("gpt_neo", "global and local layers, no scale"),
    Variant("phi", "partial rotary, parallel layers"),
    Variant("phi", "norms of queries and keys", {"qk_layernorm": True}),
    Variant("phi3", "fused projections"),
    Variant("phi3", "sliding window", {"sliding_window": WINDOW}),
    Variant(
        "phi3",
        "longrope, partial rotary",
        {
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 64,
            **_rope(
                "longrope",
                factor=4.0,
                short_factor=[1.0, 1.1],
                long_factor=[2.0, 3.0],
                original_max_position_embeddings=64,
                partial_rotary_factor=0.5,
            ),
        },
    ),
    Variant("qwen2", "biases of queries, keys, values"),
    Variant(
        "qwen2",
        "sliding window in upper layers, YaRN",
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 1,
            **_rope("yarn", factor=4.0, original_max_position_embeddings=64),
        },
    ),
    Variant("qwen2_moe", "experts, and one that all share"),
    Variant("qwen3", "norms of queries and keys"),
    Variant("qwen3_moe", "experts, norms of queries and keys"),
    Variant("olmoe", "experts"),
    Variant("gemma2", "soft caps, alternating windows"),
    Variant("gemma3_text", "alternating windows, two rotary bases, norms of queries and keys"),
    Variant("gpt_oss", "learned sink logits, alternating windows, experts"),
    Variant("olmo2", "norms over all heads"),
    Variant("starcoder2", "biases"),
    Variant("starcoder2", "sliding window", {"sliding_window": WINDOW}),
    Variant("granite", "multipliers", {"attention_multiplier": 0.3, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    Variant("stablelm", "partial rotary"),
    Variant(
        "stablelm",
        "parallel residual, a norm for each head",
        {"use_parallel_residual": True, "qk_layernorm": True, "use_qkv_bias": True},
    ),
    Variant("smollm3", "layers without positions", {"no_rope_layers": [1, 0]}),
    Variant("cohere2", "windows with rotary, full layers without positions"),
    Variant("falcon", "new decoder: grouped queries"),
    Variant("falcon", "one key head", {**_OLD_FALCON, "multi_query": True}),
    Variant(
        "falcon", "ALiBi", {**_OLD_FALCON, "num_kv_heads": 4, "multi_query": False, "alibi": True}, "in a key dimension"
    ),
    Variant("bloom", "ALiBi", note="in a key dimension"),
    Variant("mpt", "ALiBi", note="in a key dimension"),
)


def variant_model(variant: Variant) -> PreTrainedModel:
    """A random model of a row of the table, with biases and norms that aren't the zeros and ones they begin as."""
    model = tiny_model(variant.architecture, **variant.changes)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tiny_config(architecture: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model: 2 layers of 4 heads of size 8."""
    common = {
        name: value for name, value in COMMON.items() if name != "head_dim" or architecture not in _WITHOUT_HEAD_SIZE
    }
    return AutoConfig.for_model(architecture, **{**common, **_OWN.get(architecture, {}), **changes})


def tiny_model(architecture: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random model of an architecture, in evaluation mode."""
    config = tiny_config(architecture, **changes)
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval().requires_grad_(False)
