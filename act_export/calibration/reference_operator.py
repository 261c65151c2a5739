"""The operator in plain PyTorch, input for input: attention with its cache, by the definition in `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from act_export.calibration.reference import GAMMAS, calibrate_with_state, check_range, initial_tokens


class AttentionOutputs(NamedTuple):
    """What `calibrated_attention` returns, shapes as in the operator's table.

    Attributes:
        output: (batch, sequence, num_heads * head_size).
        present_key: (batch, kv_num_heads, total, head_size).
        present_value: (batch, kv_num_heads, total, head_size).
        present_sink_scores: running column sums (batch, calibrated heads, total, 1), float32.
    """

    output: Tensor
    present_key: Tensor
    present_value: Tensor
    present_sink_scores: Tensor


def attention_probabilities(
    query: Tensor,
    key: Tensor,
    real: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sliding_window: int = -1,
    sink_logits: Tensor | Sequence[float] | None = None,
    gamma: Tensor | None = None,
) -> Tensor:
    """The attention map A before the later sinks are calibrated.

    Args:
        query: (batch, heads, sequence, head_size).
        key: (batch, heads, total, head_size); the rows are the last `sequence` positions.
        real: Boolean (batch, total), true for real tokens.
        scale: Multiplies the logits.
        softcap: c in c * tanh(logits / c), applied after the scale; 0 for none.
        sliding_window: Number of keys a row sees, itself included; -1 for all.
        sink_logits: Learned logits of one more key without a value, which every row sees, neither scaled nor capped:
            (1,), (heads,) or (batch, heads). Each row then sums to less than 1. None, or nothing in it, for none.
        gamma: Multiplies the initial token's weight: (heads,) or (batch, heads); None for 1.

    Returns:
        (batch, heads, sequence, total), at least float32. A row that sees no key is all zeros.

    Raises:
        ValueError: If the number of sink logits doesn't fit, or gamma is out of range.
    """
    sequence, total = query.shape[2], key.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (query.to(dtype) @ key.to(dtype).transpose(2, 3)) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    if gamma is not None:
        check_range("gamma", gamma, GAMMAS)
        logits = logits + gamma.to(logits).log()[..., None, None] * initial_tokens(real)[:, None, None, :]
    columns = torch.arange(total, device=query.device)
    rows = columns[total - sequence :, None]
    visible = columns <= rows
    if sliding_window >= 0:
        visible = visible & (columns > rows - sliding_window)
    visible = visible & real[:, None, None, :]
    logits = logits.masked_fill(~visible, torch.finfo(dtype).min)
    if sink_logits is None or len(sink_logits) == 0:
        return torch.softmax(logits, -1).masked_fill(~visible, 0)
    sinks = torch.as_tensor(sink_logits, dtype=dtype, device=query.device)
    if sinks.shape not in ((1,), query.shape[1:2], query.shape[:2]):
        raise ValueError(f"sink_logits has shape {tuple(sinks.shape)}; {query.shape[1]} heads need 1 or one each")
    with_sink = torch.cat([logits, sinks[..., None, None].expand(*logits.shape[:-1], 1)], -1)
    return torch.softmax(with_sink, -1)[..., :-1].masked_fill(~visible, 0)


def calibrated_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_sink_scores: Tensor,
    attention_mask: Tensor,
    calibration: Tensor | None = None,
    *,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    calibrated_heads: Sequence[int] = (),
    threshold_mode: str = "absolute",
    softcap: float = 0.0,
    sliding_window: int = -1,
    sink_logits: Tensor | Sequence[float] | None = None,
) -> AttentionOutputs:
    """The operator `act.CalibratedAttention`, input for input; with no calibrated head, ordinary attention.

    Args:
        query: (batch, sequence, num_heads * head_size), rotary already applied.
        key: (batch, sequence, kv_num_heads * head_size).
        value: As `key`.
        past_key: (batch, kv_num_heads, past, head_size).
        past_value: As `past_key`.
        past_sink_scores: Running column sums (batch, len(calibrated_heads), past, 1), float32.
        attention_mask: (batch, past + sequence), nonzero for real tokens.
        calibration: beta, gamma and threshold (tau, or alpha where the mode is "relative") of each calibrated head, for
            all sequences or for each: (1 or batch, len(calibrated_heads), 3).
        num_heads: Query heads.
        kv_num_heads: Key and value heads; divides num_heads.
        scale: Multiplies the logits.
        calibrated_heads: Query heads that `calibration` is of.
        threshold_mode: "absolute" or "relative".
        softcap: As in `attention_probabilities`.
        sliding_window: As in `attention_probabilities`.
        sink_logits: As in `attention_probabilities`; one for all query heads or one each.

    Returns:
        Output, present cache and present column sums. Rows of padding tokens are finite and otherwise meaningless.

    Raises:
        ValueError: For a mask, calibration or sink logits that don't fit, values out of range, or an unknown mode.
    """
    batch, sequence = query.shape[:2]
    past = past_key.shape[2]
    if attention_mask.shape[-1] != past + sequence:
        raise ValueError(
            f"attention_mask has length {attention_mask.shape[-1]}; {past} cached and {sequence} new tokens need "
            f"{past + sequence}"
        )
    real = attention_mask != 0
    present_key = torch.cat([past_key, key.view(batch, sequence, kv_num_heads, -1).transpose(1, 2)], 2)
    present_value = torch.cat([past_value, value.view(batch, sequence, kv_num_heads, -1).transpose(1, 2)], 2)
    group = num_heads // kv_num_heads
    heads = list(calibrated_heads)
    strengths = torch.ones(1, 0, 3) if calibration is None else calibration
    if strengths.shape not in ((1, len(heads), 3), (batch, len(heads), 3)):
        raise ValueError(
            f"calibration has shape {tuple(strengths.shape)}; {batch} sequences and {len(heads)} calibrated heads need "
            f"(1, {len(heads)}, 3) or ({batch}, {len(heads)}, 3)"
        )
    gamma = strengths.new_ones(len(strengths), num_heads)
    gamma[:, heads] = strengths[..., 1]
    probabilities = attention_probabilities(
        query.view(batch, sequence, num_heads, -1).transpose(1, 2),
        present_key.repeat_interleave(group, 1),
        real,
        scale=scale,
        softcap=softcap,
        sliding_window=sliding_window,
        sink_logits=sink_logits,
        gamma=gamma.to(query.device),
    )
    column_sums = probabilities.new_zeros(batch, 0, past + sequence)
    if heads:
        beta, threshold = strengths.to(probabilities)[..., 0], strengths.to(probabilities)[..., 2]
        past_sums = past_sink_scores.squeeze(-1).to(probabilities.dtype)
        calibrated = calibrate_with_state(
            probabilities[:, heads],
            beta=beta[..., None, None],
            threshold=threshold[..., None],
            threshold_mode=threshold_mode,
            real=real[:, None],
            past_column_sums=past_sums,
            sliding_window=sliding_window,
        )
        probabilities = probabilities.index_copy(1, torch.tensor(heads, device=query.device), calibrated.probabilities)
        column_sums = torch.where((beta == 1)[..., None], pad(past_sums, (0, sequence)), calibrated.column_sums)
    output = probabilities @ present_value.repeat_interleave(group, 1).to(probabilities.dtype)
    return AttentionOutputs(
        output.transpose(1, 2).reshape(batch, sequence, -1).to(query.dtype),
        present_key,
        present_value,
        column_sums.unsqueeze(-1).float(),
    )
