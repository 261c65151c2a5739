"""MPT: ALiBi by the place in the sequence, padding included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from act_export.attention.adapters.key_bias import with_key_bias
from act_export.attention.call import active, attend


def forward(module: Any, hidden_states: Tensor, position_bias: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Stands in for `MptAttention.forward`; the mask and the cache are the hook's.

    Args:
        module: The attention module.
        hidden_states: (batch, sequence, hidden_size).
        position_bias: (num_heads, 1, longest sequence), 0 for the last key and a slope less for each before it; added
            after the scale.
    """
    batch, sequence = hidden_states.shape[:2]
    projected = module.Wqkv(hidden_states)
    if module.clip_qkv:
        projected = projected.clamp(min=-module.clip_qkv, max=module.clip_qkv)
    query, key, value = (
        part.view(batch, sequence, module.n_heads, module.head_dim).transpose(1, 2) for part in projected.chunk(3, -1)
    )
    total = active()[1].attention_mask.shape[1]
    places = torch.arange(total - sequence, total, device=hidden_states.device)
    slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
    bias = (places[:, None] * slopes).expand(batch, -1, -1)
    scale = module.softmax_scale
    query, key = with_key_bias(query, key, bias / scale, scale=scale)
    output = attend(module, module.layer_idx, query, key, value, scale=scale)
    return module.out_proj(output), None
