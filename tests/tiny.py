"""Tiny random models of many architectures, and a tokenizer to go with them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from act_export.calibration import Calibration
from act_export.checkpoint import Checkpoint, identify

VOCABULARY = 259  # a token per byte, and three of its own
CALIBRATION = Calibration({0: (1,), 1: (0, 3)}, beta={0: (0.4,), 1: (0.2, 1.7)}, threshold=0.06)
_COMMON = {
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
_OTHERWISE_NAMED = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.4},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "expansion_ratio": 2},
    "mistral": {"sliding_window": 7},
    "gemma2": {"sliding_window": 7, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 7},
    "cohere2": {"sliding_window": 7},
}
ROUTED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "opt",
    "olmo2",
    "starcoder2",
    "granite",
    "stablelm",
    "smollm3",
    "cohere2",
)


def tiny_model(architecture: str = "llama", seed: int = 0, **changes):
    """A random model of an architecture, in evaluation mode."""
    config = AutoConfig.for_model(architecture, **{**_COMMON, **_OTHERWISE_NAMED.get(architecture, {}), **changes})
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    tokens = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet(), key=ord)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def tiny_checkpoint(architecture: str = "llama", seed: int = 0, **changes) -> Checkpoint:
    """A loaded checkpoint without a tokenizer."""
    model = tiny_model(architecture, seed, **changes)
    return Checkpoint(f"tiny {architecture}", model, None, identify(model))


def save_checkpoint(folder: Path, *, tokenizer: bool = True, **changes) -> Path:
    """A checkpoint folder on disk."""
    tiny_model(**changes).save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder
