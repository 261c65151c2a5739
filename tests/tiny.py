"""Tiny random models of many architectures, and a tokenizer to go with them."""

from __future__ import annotations

from pathlib import Path

from tiny_models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from act_export.calibration.file import Calibration
from act_export.checkpoint.identity import identify
from act_export.checkpoint.load import Checkpoint

__all__ = ["CALIBRATION", "ROUTED", "VOCABULARY", "save_checkpoint", "tiny_checkpoint", "tiny_model", "tiny_tokenizer"]

CALIBRATION = Calibration({0: (1,), 1: (0, 3)}, beta={0: (0.4,), 1: (0.2, 1.7)}, threshold=0.06)
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
