"""Small models whose attention concentrates on few tokens."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def sharp(model: PreTrainedModel, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    """Weights large enough that attention concentrates on few tokens, so that there are sinks to calibrate."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5 if "_proj" in name else 20)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return sharp(LlamaForCausalLM(LlamaConfig(**SMALL)))


@pytest.fixture
def mistral() -> PreTrainedModel:
    """Every layer has a sliding window of 4."""
    torch.manual_seed(1)
    return sharp(MistralForCausalLM(MistralConfig(**SMALL, sliding_window=4)))


@pytest.fixture
def gemma2() -> PreTrainedModel:
    """Soft-capped logits, and windows in every other layer."""
    torch.manual_seed(2)
    config = Gemma2Config(**SMALL, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    return sharp(Gemma2ForCausalLM(config))


@pytest.fixture
def gpt_oss() -> PreTrainedModel:
    """Learned sinks, and windows in every other layer."""
    torch.manual_seed(3)
    experts = {"num_local_experts": 2, "num_experts_per_tok": 2}
    config = GptOssConfig(**SMALL, **experts, head_dim=8, sliding_window=4, experts_implementation="eager")
    model = sharp(GptOssForCausalLM(config))
    for layer in model.model.layers:
        layer.self_attn.sinks.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
    return model
