"""The reference's results, at about the price of the model's own attention.

A search runs the model many times with a few calibrated heads. Everything else goes through torch's fused attention;
only the calibrated heads' attention maps are ever written out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from act_export.attention.call import AttentionCall, LayerState, empty_state, flatten_heads
from act_export.calibration.file import Calibration
from act_export.calibration.reference import CalibratedProbabilities, calibrate_one_at_a_time, calibrate_with_state
from act_export.calibration.reference_operator import attention_probabilities

_SINK_DIMENSIONS = 8  # of which one is used: fused kernels take multiples of 8
MAP_ELEMENTS = 2**25  # of all heads' attention maps that are in memory at once: 128 MiB in float32


class FastAttention:
    """An attention hook: a calibration, or (with None) the plain model."""

    def __init__(self, calibration: Calibration | None) -> None:
        """Takes the calibration to apply; None leaves every head as it is."""
        self.calibration = calibration

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """See `act_export.attention.call.AttentionHook`."""
        layer = self.calibration.layer(call.layer) if self.calibration is not None else None
        past = call.past if call.past is not None else empty_state(call, len(layer.heads) if layer is not None else 0)
        key, value = join_past(call, past)
        output = plain_attention(call, key, value)
        sums = call.query.new_zeros((call.query.shape[0], 0, key.shape[2]))
        if layer is not None:
            strengths = torch.tensor(layer.strengths, device=output.device)  # float32 as in a file
            maps = map_probabilities(call, key, layer.heads, strengths[:, 1])
            sums_before = past.sink_scores.squeeze(-1)
            calibrated = calibrated_probabilities(
                call,
                maps,
                sums_before,
                beta=strengths[:, 0],
                threshold=layer.threshold,
                threshold_mode=layer.threshold_mode,
            )
            heads = torch.tensor(layer.heads, device=output.device)
            output = output.index_copy(
                1, heads, (calibrated.probabilities @ values_of(call, value, layer.heads)).to(output.dtype)
            )
            is_plain = strengths[:, :1] == 1
            sums = torch.where(
                is_plain, pad(past.sink_scores.squeeze(-1), (0, call.query.shape[2])), calibrated.column_sums
            )
        return flatten_heads(output), LayerState(key, value, sums.unsqueeze(-1).float())


def head_groups(call: AttentionCall) -> list[tuple[int, ...]]:
    """All query heads, a few at a time: attention maps of a group have about `MAP_ELEMENTS` numbers at the most."""
    batch, heads, sequence = call.query.shape[:3]
    size = max(1, MAP_ELEMENTS // (batch * sequence * call.attention_mask.shape[1]))
    return [tuple(range(start, min(start + size, heads))) for start in range(0, heads, size)]


def join_past(call: AttentionCall, past: LayerState) -> tuple[Tensor, Tensor]:
    """Keys and values of all positions, (batch, kv_num_heads, past + sequence, head_size)."""
    return torch.cat([past.key, call.key], 2), torch.cat([past.value, call.value], 2)


def plain_attention(call: AttentionCall, key: Tensor, value: Tensor) -> Tensor:
    """Uncalibrated output (batch, num_heads, sequence, head_size) over keys and values of all positions.

    Soft-capped logits, which the fused attention doesn't have, take the reference's way. A learned sink, which it
    doesn't have either, is one more key.
    """
    if call.softcap > 0:
        heads = range(call.query.shape[1])
        probabilities = attention_probabilities(
            call.query,
            key.repeat_interleave(_group(call), 1),
            call.attention_mask != 0,
            scale=call.scale,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
            sink_logits=call.sink_logits,
        )
        return (probabilities @ values_of(call, value, heads)).to(call.query.dtype)
    query = call.query
    key, value = key.repeat_interleave(_group(call), 1), value.repeat_interleave(_group(call), 1)
    visible = visible_keys(call.attention_mask != 0, query.shape[2], call.sliding_window)
    if call.sink_logits is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=call.scale)
    size = value.shape[-1]
    query, key, value = _with_sink_key(query, key, value, call.sink_logits / call.scale)
    visible = pad(visible, (0, 1), value=True)
    return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=call.scale)[..., :size]


def _with_sink_key(query: Tensor, key: Tensor, value: Tensor, products: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Adds a key without a value, whose product with every query is `products` (heads,), and dimensions to hold it.

    Args:
        query: (batch, heads, sequence, head_size).
        key: (batch, heads, total, head_size).
        value: As `key`.
        products: (heads,).

    Returns:
        The three with `_SINK_DIMENSIONS` more dimensions, key and value with one more position at the end.
    """
    size = key.shape[-1]
    more = (0, _SINK_DIMENSIONS)
    wide_key = pad(key, (*more, 0, 1))
    wide_key[:, :, -1, size] = products.to(key.dtype)
    wide_query = pad(query, more)
    wide_query[..., size] = 1
    return wide_query, wide_key, pad(value, (*more, 0, 1))


def visible_keys(real: Tensor, sequence: int, sliding_window: int) -> Tensor:
    """Boolean (batch, 1, sequence, total): causal, windowed, without padding.

    A padding row sees itself: rows that see nothing are NaN in some of torch's kernels, and nobody reads this one.
    """
    total = real.shape[-1]
    columns = torch.arange(total, device=real.device)
    rows = columns[total - sequence :, None]
    visible = columns <= rows
    if sliding_window >= 0:
        visible = visible & (columns > rows - sliding_window)
    return (visible & real[:, None, None, :]) | (columns == rows)


def map_probabilities(
    call: AttentionCall, key: Tensor, heads: range | tuple[int, ...], gamma: Tensor | None = None
) -> Tensor:
    """Attention maps of these heads, later sinks as they are: (batch, heads, sequence, total), at least float32.

    Args:
        call: The attention call.
        key: Keys of all positions, (batch, kv_num_heads, total, head_size).
        heads: Query heads.
        gamma: Of each (heads,); None for 1.
    """
    return attention_probabilities(
        call.query[:, list(heads)],
        key[:, _kv_heads(call, heads)],
        call.attention_mask != 0,
        scale=call.scale,
        softcap=call.softcap,
        sliding_window=call.sliding_window,
        sink_logits=call.sink_logits[list(heads)] if call.sink_logits is not None else None,
        gamma=gamma,
    )


def calibrated_probabilities(
    call: AttentionCall,
    probabilities: Tensor,
    past_column_sums: Tensor,
    *,
    beta: float | Tensor,
    threshold: float,
    threshold_mode: str,
) -> CalibratedProbabilities:
    """Calibrated attention maps (batch, heads, sequence, total) of some heads.

    Args:
        call: The attention call.
        probabilities: Their attention maps, gamma in them.
        past_column_sums: (batch, heads, past).
        beta: Of all, or of each (heads,).
        threshold: tau, or alpha where the mode is "relative".
        threshold_mode: "absolute" or "relative".
    """
    calibrate = calibrate_one_at_a_time if call.one_at_a_time else calibrate_with_state
    return calibrate(
        probabilities,
        beta=beta.to(probabilities)[:, None, None] if isinstance(beta, Tensor) else beta,
        threshold=torch.tensor([threshold]).to(probabilities),  # float32 as in a file, whatever the maps are
        threshold_mode=threshold_mode,
        real=(call.attention_mask != 0)[:, None],
        past_column_sums=past_column_sums.to(probabilities.dtype),
        sliding_window=call.sliding_window,
    )


def values_of(call: AttentionCall, value: Tensor, heads: range | tuple[int, ...]) -> Tensor:
    """Values that these query heads read, at least float32: (batch, heads, total, head_size)."""
    return value[:, _kv_heads(call, heads)].to(torch.promote_types(value.dtype, torch.float32))


def _kv_heads(call: AttentionCall, heads: range | tuple[int, ...]) -> list[int]:
    return [head // _group(call) for head in heads]


def _group(call: AttentionCall) -> int:
    return call.query.shape[1] // call.key.shape[1]
