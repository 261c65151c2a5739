"""GGUF files whose right answer is known: written from tiny random transformers models, which are the truth.

Names and layouts are those of llama.cpp's converter, written here once more, from the model to the file.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 260,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}  # for blocks of 256

# Architecture as GGUF calls it -> as transformers does, and what makes its tiny model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rms_norm_eps": 1e-5}),
    "qwen2": ("qwen2", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen2moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64, "norm_topk_prob": False}),
    "qwen3moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32, "norm_topk_prob": True}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7},
    ),
    "phi3": ("phi3", {"sliding_window": 16}),
    "starcoder2": ("starcoder2", {"tie_word_embeddings": False}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "nemotron": ("nemotron", {"partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", {"n_inner": 96}),
}


def tiny_model(architecture: str = "llama", **changes: Any) -> PreTrainedModel:
    """A random model, with norms and biases that aren't 1 and 0."""
    model_type, own = MODELS[architecture]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**COMMON, **own, **changes})
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logits_of(model: PreTrainedModel, length: int = 40) -> torch.Tensor:
    """Logits of a fixed text, [1, length, tokens]."""
    ids = torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(ids).logits


def _pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head's two halves, as llama.cpp has them: one pair after the other."""
    first, second = rows.reshape(heads, 2, -1, *rows.shape[1:]).unbind(1)
    return torch.stack([first, second], 2).reshape(rows.shape)


def _names(architecture: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The file's tensors by name."""
    weights = dict(model.named_parameters())
    found: dict[str, torch.Tensor] = {}
    if architecture == "gpt2":
        ends = {"token_embd": "wte", "position_embd": "wpe", "output_norm": "ln_f"}
        layers = {"attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj"}
        layers |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
        prefix, layer_prefix = "transformer.", "transformer.h."
    else:
        ends = {"token_embd": "embed_tokens", "output_norm": "norm"}
        layers = {"attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
        layers |= {f"attn_{name}": f"self_attn.{name}_proj" for name in ("q", "k", "v", "qkv")}
        layers |= {f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        layers |= {f"ffn_{name}_shexp": f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
        layers |= {"attn_output": "self_attn.o_proj", "ffn_gate_inp": "mlp.gate"}
        layers["ffn_gate_inp_shexp"] = "mlp.shared_expert_gate"
        if architecture in ("gemma2", "gemma3"):
            layers |= {"post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
            layers["post_ffw_norm"] = "post_feedforward_layernorm"
        else:
            layers["ffn_norm"] = "post_attention_layernorm"
        if architecture == "phi3":
            layers["ffn_up"] = "mlp.gate_up_proj"
        if architecture == "starcoder2":
            layers |= {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}
        prefix, layer_prefix = "model.", "model.layers."
    for stored, name in ends.items():
        for kind in ("weight", "bias"):
            if (value := weights.pop(f"{prefix}{name}.{kind}", None)) is not None:
                found[f"{stored}.{kind}"] = value
    if (value := weights.pop("lm_head.weight", None)) is not None:
        found["output.weight"] = value
    for layer in range(model.config.num_hidden_layers):
        for stored, name in layers.items():
            for kind in ("weight", "bias"):
                if (value := weights.pop(f"{layer_prefix}{layer}.{name}.{kind}", None)) is not None:
                    found[f"blk.{layer}.{stored}.{kind}"] = value
        gate_up = weights.pop(f"{layer_prefix}{layer}.mlp.experts.gate_up_proj", None)
        if gate_up is not None:
            gate, up = gate_up.chunk(2, 1)
            down = weights.pop(f"{layer_prefix}{layer}.mlp.experts.down_proj")
            found |= {
                f"blk.{layer}.ffn_{name}_exps.weight": value
                for name, value in zip(("gate", "up", "down"), (gate, up, down), strict=True)
            }
    assert not weights, f"the writer doesn't know {sorted(weights)}"
    return found


def _as_stored(architecture: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The numbers as llama.cpp's converter writes them."""
    config, stored = model.config, {}
    for name, value in _names(architecture, model).items():
        kind = name.split(".")[-2]
        if architecture == "llama" and kind in ("attn_q", "attn_k"):
            value = _pairs(value, config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads)
        if architecture in ("gemma2", "gemma3", "nemotron") and name.endswith("norm.weight"):
            value = value + 1
        if (
            architecture == "gpt2"
            and name.endswith("weight")
            and kind in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")
        ):
            value = value.T
        if kind == "ffn_gate_inp_shexp":
            value = value.reshape(-1)
        stored[name] = np.ascontiguousarray(value.numpy(), np.float32)
    return stored


def _keys(architecture: str, model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "feed_forward_length": config.n_inner if architecture == "gpt2" else config.intermediate_size,
    }
    epsilons = ("rms_norm_eps", "norm_epsilon", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    epsilon = next(name for name in epsilons if hasattr(config, name))
    name = "layer_norm_rms_epsilon" if epsilon == "rms_norm_eps" else "layer_norm_epsilon"
    keys[f"attention.{name}"] = float(getattr(config, epsilon))
    if architecture == "gpt2":
        return keys
    keys["attention.head_count_kv"] = config.num_key_value_heads
    rotary = config.rope_parameters.get("full_attention", config.rope_parameters)
    keys["rope.freq_base"] = float(rotary["rope_theta"])
    keys["rope.dimension_count"] = int(head_size * rotary.get("partial_rotary_factor", 1.0))
    if head_size * config.num_attention_heads != config.hidden_size or architecture in ("gemma2", "gemma3", "qwen3"):
        keys |= {"attention.key_length": head_size, "attention.value_length": head_size}
    if architecture.startswith("gemma") or (architecture == "phi3" and config.sliding_window):
        keys["attention.sliding_window"] = config.sliding_window
    if architecture == "gemma2":
        keys |= {name: float(getattr(config, name)) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if architecture in ("qwen2moe", "qwen3moe"):
        keys |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        keys["expert_feed_forward_length"] = config.moe_intermediate_size
    if architecture == "qwen2moe":
        keys["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if architecture == "stablelm":
        keys["use_parallel_residual"] = config.use_parallel_residual
    return {f"{name}": value for name, value in keys.items()}


def tokens() -> list[str]:
    """The tokens of the byte-level vocabulary."""
    return ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord), "\u0120t"]


BYTE_LEVEL: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "llama-bpe",
    "tokenizer.ggml.tokens": tokens(),
    "tokenizer.ggml.token_type": [3, 3, 3] + [1] * 257,
    "tokenizer.ggml.merges": ["\u0120 t"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.padding_token_id": 0,
}


def pieces() -> dict[str, Any]:
    """A vocabulary as SentencePiece has it, of the same number of tokens."""
    words = ["\u2581", "t", "h", "e", "a", "\u2581t", "he", "\u2581the", "\u2581a"]
    letters = [chr(each) for each in range(ord("A"), ord("A") + 260)]
    names = [*words, *(letter for letter in letters if letter not in words)][: 260 - 3 - 256 + 256]
    bytes_ = [f"<0x{each:02X}>" for each in range(256)]
    listed = ["<unk>", "<s>", "</s>", *bytes_, *names][: 3 + 256 + 9]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": listed,
        "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -14.0, -1.0, -2.0, -0.5, -3.0],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 9,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


PIECES_VOCABULARY = 268

Quantise = Callable[[str, np.ndarray], tuple[np.ndarray, gguf.GGMLQuantizationType]]


def as_kind(kind: gguf.GGMLQuantizationType) -> Quantise:
    """Matrices in a quantisation that the package gguf can write; vectors stay float32."""

    def quantise(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        if values.ndim < 2:
            return values, gguf.GGMLQuantizationType.F32
        return gguf.quants.quantize(values, kind), kind

    return quantise


def random_blocks(kind: gguf.GGMLQuantizationType, seed: int = 0) -> Quantise:
    """Matrices of random blocks in any quantisation, whose scales (float16) are small."""
    generator = np.random.default_rng(seed)
    elements, width = gguf.GGML_QUANT_SIZES[kind]

    def quantise(name: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
        if values.ndim < 2:
            return values, gguf.GGMLQuantizationType.F32
        rows = generator.integers(0, 256, (*values.shape[:-1], values.shape[-1] // elements, width), np.uint8)
        for at in _SCALES[kind.name]:
            scales = generator.uniform(0.0002, 0.002, rows.shape[:-1]).astype("<f2")
            rows[..., at : at + 2] = scales[..., None].view(np.uint8)
        return rows.reshape(*values.shape[:-1], -1), kind

    return quantise


# Where blocks have their float16 scales, by ggml-common.h.
_SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
    "IQ2_XXS": (0,),
}


def write(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    leave_out: Collection[str] = (),
    quantise: Quantise | None = None,
    most_tensors: int = 0,
    tokenizer: Mapping[str, Any] = BYTE_LEVEL,
) -> Path:
    """Writes a model as a GGUF file, or as several.

    Args:
        path: Where.
        model: What.
        architecture: As GGUF calls it.
        keys: Whole keys, or names without the architecture, that are added; None as a value leaves a key out.
        tensors: That are added, or stand in for the model's.
        leave_out: Tensors that aren't written.
        quantise: How tensors are stored; None for float32.
        most_tensors: In one shard; 0 for one file.
        tokenizer: Its keys.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=most_tensors)
    given = {name: value for name, value in (keys or {}).items() if not name.startswith(("general.", "tokenizer."))}
    others = {name: value for name, value in (keys or {}).items() if name not in given}
    own = {**_keys(architecture, model), **given}
    whole = {
        name if name.split(".")[0] in ("x", "adapter") else f"{architecture}.{name}": value
        for name, value in own.items()
    }
    for name, value in {**whole, **tokenizer, **others}.items():
        if value is not None:
            _add(writer, name, value)
    for name, values in {**_as_stored(architecture, model), **(tensors or {})}.items():
        if name in leave_out:
            continue
        if quantise is None:
            writer.add_tensor(name, np.ascontiguousarray(values, np.float32))
        else:
            data, kind = quantise(name, values)
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    else:
        writer.add_array(name, value)
