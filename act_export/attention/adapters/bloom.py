"""BLOOM: ALiBi, which the model makes from the mask: positions count real tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from act_export.attention.adapters.key_bias import with_key_bias
from act_export.attention.call import attend
from act_export.errors import ActExportError


def forward(module: Any, hidden_states: Tensor, residual: Tensor, alibi: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Stands in for `BloomAttention.forward`; the mask and the cache are the hook's.

    Args:
        module: The attention module.
        hidden_states: (batch, sequence, hidden_size).
        residual: As `hidden_states`.
        alibi: (batch * num_heads, 1, past + sequence), added after the scale.

    Raises:
        ActExportError: If its output is computed in slices.
    """
    if module.pretraining_tp > 1 and module.slow_but_exact:
        raise ActExportError(
            f"bloom with slow_but_exact and pretraining_tp {module.pretraining_tp} computes its output in slices, "
            f"without the bias; set slow_but_exact to false in config.json"
        )
    batch, sequence = hidden_states.shape[:2]
    total = alibi.shape[2]
    scale = module.inv_norm_factor
    query, key, value = module._reshape(module.query_key_value(hidden_states))
    bias = alibi.view(batch, module.num_heads, total)[:, :, total - sequence :].transpose(1, 2)
    query, key = with_key_bias(query, key, bias / scale, scale=scale)
    output = attend(module, module.layer_idx, query, key, value, scale=scale)
    return module.dense(output) + residual, None
