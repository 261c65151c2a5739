"""Falcon: rotary embeddings with shared key heads, or ALiBi."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from act_export.attention.adapters.key_bias import with_key_bias
from act_export.attention.call import active, attend, positions


def forward(
    module: Any,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Stands in for `FalconAttention.forward`; the mask and the cache are the hook's.

    Args:
        module: The attention module.
        hidden_states: (batch, sequence, hidden_size).
        alibi: None for rotary embeddings.
        attention_mask: Not used.
        position_embeddings: Cosines and sines of the rotary embeddings.
    """
    from transformers.models.falcon import modeling_falcon

    rotate: Any = modeling_falcon.apply_rotary_pos_emb
    sequence = hidden_states.shape[1]
    scale = module.inv_norm_factor
    query, key, value = _split(module, module.query_key_value(hidden_states))
    if alibi is None:
        assert position_embeddings is not None  # the model makes them in any case
        query, key = rotate(query, key, *position_embeddings)
    else:
        if key.shape[1] != module.num_heads:  # each head has a bias of its own, so it needs a key of its own
            key, value = (x.repeat_interleave(module.num_heads // x.shape[1], 1) for x in (key, value))
        mask = active()[1].mask_on(query.device)
        new = positions(mask)[:, mask.shape[1] - sequence :]
        query, key = with_key_bias(query, key, alibi_of_positions(new, module.num_heads), scale=scale)
    output = attend(module, module.layer_idx, query, key, value, scale=scale)
    return module.dense(output), None


def alibi_of_positions(positions: Tensor, num_heads: int) -> Tensor:
    """Falcon's ALiBi before the scale, (batch, positions, num_heads), float32: rounded to bfloat16 at every step.

    transformers multiplies in bfloat16, which ONNX Runtime doesn't on a CPU: float32 holds the product, which is
    rounded afterwards.
    """
    slopes = torch.tensor(_slopes(num_heads), device=positions.device).bfloat16().float()
    return (positions.bfloat16().float().unsqueeze(-1) * slopes).bfloat16().float()


def _slopes(num_heads: int) -> list[float]:
    """Powers of 2 ** (-8 / n) for n heads, n a power of 2; for the heads beyond, those half way between."""
    whole = 2 ** int(math.log2(num_heads))
    return [2 ** (-8 * i / whole) for i in range(1, whole + 1)] + [
        2 ** (-4 * i / whole) for i in range(1, 2 * (num_heads - whole), 2)
    ]


def _split(module: Any, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (batch, num_heads, sequence, head_size), and key and value of the heads that are stored.

    The projection holds for each key head the queries that share it, the key, and the value.
    """
    batch, sequence = projected.shape[:2]
    shared = module.num_heads // module.num_kv_heads
    groups: Any = projected.view(batch, sequence, module.num_kv_heads, shared + 2, module.head_dim)
    query, key, value = (part.flatten(2, 3).transpose(1, 2) for part in groups.split([shared, 1, 1], 3))
    return query, key, value
