"""GPT-Neo: no scale; every other layer sees the last `window_size` keys only."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from act_export.attention.call import attend


def forward(module: Any, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    """Stands in for `GPTNeoSelfAttention.forward`; the mask and the cache are the hook's."""
    query, key, value = (
        module._split_heads(project(hidden_states), module.num_heads, module.head_dim)
        for project in (module.q_proj, module.k_proj, module.v_proj)
    )
    window = module.config.window_size if module.attention_type == "local" else -1
    output = attend(module, module.layer_id, query, key, value, scale=1.0, sliding_window=window)
    return module.out_proj(output), None
