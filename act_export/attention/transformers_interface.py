"""What transformers calls in place of a model's own attention and its masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

from act_export.attention.call import ACTIVE, SinkCache, active, attend
from act_export.errors import ActExportError

ATTENTION_NAME = "act_export"
_HARMLESS_KEYWORDS = {"position_ids", "cache_position", "position_embeddings"}  # used before the attention


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in place of the model's own attention."""
    _, cache = active()
    layer = getattr(module, "layer_idx", None)
    name = type(module).__name__
    if layer is None:
        raise ActExportError(f"{name} doesn't know its layer_idx")
    if position_bias is not None:
        raise ActExportError(f"{name} adds a position bias to its attention, which the operator can't express")
    if s_aux is not None and s_aux.shape != (query.shape[1],):
        raise ActExportError(
            f"{name} has sink logits of shape {tuple(s_aux.shape)}; the operator takes one for each of its "
            f"{query.shape[1]} heads"
        )
    if attention_mask is None or attention_mask.ndim != 2:
        raise ActExportError(f"{name} builds an attention mask of its own, which the operator can't express")
    for keyword, value_given in others.items():
        if keyword not in _HARMLESS_KEYWORDS and not isinstance(value_given, bool | int | float | str | None):
            raise ActExportError(f"{name} passes {keyword!r} to its attention, which the operator doesn't know")
    output = attend(
        module,
        layer,
        query,
        key,
        value,
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        softcap=float(softcap or 0.0),
        sliding_window=_window_of(attention_mask, sliding_window, cache, name),
        sink_logits=s_aux,
    )
    return output.view(*output.shape[:2], query.shape[1], -1), None


def _plain_mask(
    *,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    local_size: int | None = None,
    **_: Any,
) -> Tensor | None:
    """Hands the 2-D mask on; refuses masks that are more than causal, windowed and padded."""
    if use_vmap or not (allow_is_causal_skip or mask_function is causal_mask_function):
        raise ActExportError(
            "the model overlays its causal mask with another (packed, blockwise or bidirectional); the operator can't "
            "express that"
        )
    running = ACTIVE.get(None)
    if running is None or attention_mask is None:
        return attention_mask
    mask = attention_mask.view(attention_mask.shape)  # an object of its own, to know it by
    running[1].masks.append((mask, int(local_size) if local_size else -1))
    return mask


def _window_of(attention_mask: Tensor, asked: int | None, cache: SinkCache, name: str) -> int:
    """The sliding window of the mask that a layer was given, -1 for none.

    The mask decides, as it does in transformers' own attention; what the layer asks for beside it is for kernels that
    build their mask themselves, and some models ask for a window that their masks don't have.

    Raises:
        ActExportError: If the mask was made anew on its way to the layer and there are windows to tell apart.
    """
    for mask, window in cache.masks:
        if mask is attention_mask:
            return window
    windows = {window for _, window in cache.masks}
    if len(windows) == 1 and all(mask.device != attention_mask.device for mask, _ in cache.masks):
        return windows.pop()  # a copy for a layer on another device
    if asked or any(window > 0 for _, window in cache.masks):
        raise ActExportError(f"{name} changes its attention mask on the way, so its sliding window can't be told")
    return -1


AttentionInterface.register(ATTENTION_NAME, _attention)
AttentionMaskInterface.register(ATTENTION_NAME, _plain_mask)
