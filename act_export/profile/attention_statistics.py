"""Attention with its statistics, a block of rows at a time: no attention map is ever whole in memory.

A block of rows is multiplied with its keys, put through the softmax, and read while it is in the processor's cache: by
the values, for the output; by the rows' weights in the mean attention map; for the entropy. What is kept of a head are
the mean map's rows over all columns, (grid, total), from which both column sums and the map follow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from act_export.attention.call import AttentionCall

# Of an attention map's rows that are in memory at once, by kind of device: as many elements as fit in a cache, but of
# long prompts no fewer rows than matrix products need to be fast.
_BLOCK_ELEMENTS = {"cpu": 2**20}
_BLOCK_ROWS = {"cpu": 512}
_ELEMENTS_OTHERWISE, _ROWS_OTHERWISE = 2**26, 4096
_UNSEEN = -1e30  # finite: times a probability of 0 it is 0


class AttentionStatistics(NamedTuple):
    """Statistics of one layer's attention maps.

    Attributes:
        column_sums: Sum of each column over the real rows (batch, num_heads, total).
        entropy: Of a row in nats, mean over the real rows (batch, num_heads). What a learned sink takes isn't counted.
        mean_map: (batch, num_heads, grid, grid), see `act_export.profile.sink_statistics.SinkStatistics`.
    """

    column_sums: Tensor
    entropy: Tensor
    mean_map: Tensor


class MapGrid(NamedTuple):
    """How the tokens of a batch fall into the rows and columns of a mean attention map.

    Attributes:
        rows: (batch, grid, total), each grid row's weights of the tokens: they sum to 1. Padding has none.
        columns: (batch, total, grid), the share of each token that lies in each grid column.
        tokens: Number of real tokens of each sequence (batch,).
    """

    rows: Tensor
    columns: Tensor
    tokens: Tensor


def map_grid(real: Tensor, grid: int, dtype: torch.dtype = torch.float32) -> MapGrid:
    """The grid of a batch: real tokens share it evenly, and those on a border count in proportion.

    Args:
        real: Boolean (batch, total), with at least one real token in each sequence.
        grid: Number of rows and columns.
        dtype: Of the weights.
    """
    tokens = real.sum(1)
    position = (real.long().cumsum(1) - 1).to(torch.float64)
    # The token at position p covers grid * p / tokens to grid * (p + 1) / tokens.
    width = grid / tokens[:, None].to(torch.float64)
    start, cells = position * width, torch.arange(grid, device=real.device)
    overlap = torch.minimum((start + width)[..., None], cells + 1.0) - torch.maximum(start[..., None], cells.double())
    overlap = overlap.clamp(min=0).masked_fill(~real[..., None], 0)
    return MapGrid(overlap.transpose(1, 2).to(dtype), (overlap / width[..., None]).to(dtype), tokens)


def attend_with_statistics(call: AttentionCall, grid: MapGrid) -> tuple[Tensor, AttentionStatistics]:
    """Plain attention of a first call, and the statistics of its maps.

    Args:
        call: Without a past.
        grid: Of its mask.

    Returns:
        Output (batch, num_heads, sequence, head_size), and the statistics, at least float32.
    """
    batch, heads, total, _ = call.query.shape
    kv_heads = call.key.shape[1]
    dtype = torch.promote_types(call.query.dtype, torch.float32)
    query = (call.query.to(dtype) * call.scale).contiguous().view(batch, kv_heads, heads // kv_heads, total, -1)
    key, value = call.key.to(dtype).contiguous().transpose(2, 3), call.value.to(dtype).contiguous()
    sinks = None
    if call.sink_logits is not None:
        sinks = call.sink_logits.to(dtype).view(kv_heads, heads // kv_heads, 1, 1)
    real = call.attention_mask != 0
    unpadded = bool(real.all())
    weighted = query.new_zeros(*query.shape[:3], grid.rows.shape[1], total)
    entropy = query.new_zeros(query.shape[:3])
    output = query.new_empty(*query.shape[:-1], value.shape[-1])
    blocks = list(_blocks(call))
    # Blocks share their memory: new pages for each would take as long as the arithmetic.
    largest = max(batch * query[0, kv, :, rows].shape.numel() // query.shape[-1] for kv, rows in blocks) * total
    scratch = query.new_empty(2, largest)
    for kv, rows in blocks:
        first = 0 if call.sliding_window < 0 else max(0, rows.start - call.sliding_window + 1)
        columns = slice(first, rows.stop)
        block = query[:, kv, :, rows]
        shape = (*block.shape[:-1], columns.stop - columns.start)
        logits, maps = (part[: math.prod(shape)].view(shape) for part in scratch)
        torch.bmm(
            block.flatten(2, 3).flatten(0, 1),
            key[:, kv, :, columns].flatten(0, 1),
            out=logits.flatten(2, 3).flatten(0, 1),
        )
        if call.softcap > 0:
            logits.div_(call.softcap).tanh_().mul_(call.softcap)
        _hide(logits, rows, columns, call.sliding_window, None if unpadded else real)
        torch.softmax(logits, -1, out=maps)
        kept = None
        if sinks is not None:  # what the keys keep of each row
            kept = (logits.logsumexp(-1, keepdim=True) - sinks[kv]).sigmoid_()
            maps.mul_(kept)
        output[:, kv, :, rows] = (maps.flatten(2, 3) @ value[:, kv, columns]).view(*block.shape[:-1], -1)
        bins = _bins_of(grid.rows[:, :, rows])
        weighted[:, kv, :, bins, columns] += grid.rows[:, None, None, bins, rows] @ maps
        # Logits relative to the row's largest, so that nothing cancels: log p = logit - largest + log(largest p).
        logits.sub_(logits.amax(-1, keepdim=True)).mul_(maps)
        largest = maps.amax(-1).log_()
        row_entropy = -(largest if kept is None else largest * kept.squeeze(-1)) - logits.sum(-1)
        if not unpadded:
            row_entropy.masked_fill_(~real[:, None, None, rows], 0)
        entropy[:, kv] += row_entropy.sum(-1)
    # Every token's weights sum to grid / tokens over the rows of the grid.
    per_row = grid.tokens.to(dtype) / grid.rows.shape[1]
    return output.flatten(1, 2), AttentionStatistics(
        weighted.sum(3).flatten(1, 2) * per_row[:, None, None],
        entropy.flatten(1, 2) / grid.tokens[:, None],
        weighted.flatten(1, 2) @ grid.columns[:, None],
    )


def _blocks(call: AttentionCall) -> Iterator[tuple[slice, slice]]:
    """Key-value heads, and rows, that are computed together.

    All heads where their maps are small; else one by one, because matrix products of many rows are the faster ones.
    """
    batch, heads, total = call.query.shape[:3]
    kv_heads, kind = call.key.shape[1], call.query.device.type
    elements = _BLOCK_ELEMENTS.get(kind, _ELEMENTS_OTHERWISE)
    together = kv_heads if batch * heads * total * total <= elements else 1
    of_each = batch * heads // kv_heads * together  # rows of a block for each query
    size = max(1, elements // (of_each * total), _BLOCK_ROWS.get(kind, _ROWS_OTHERWISE) // of_each)
    for head in range(0, kv_heads, together):
        for start in range(0, total, size):
            yield slice(head, head + together), slice(start, min(start + size, total))


def _hide(logits: Tensor, rows: slice, columns: slice, sliding_window: int, real: Tensor | None) -> None:
    """Overwrites what rows can't see: later keys, keys that left the window, padding."""
    row = torch.arange(rows.start, rows.stop, device=logits.device)[:, None]
    if sliding_window < 0 and real is None:  # only the block on the diagonal has anything to hide
        later = torch.arange(rows.start, columns.stop, device=logits.device) > row
        logits[..., rows.start - columns.start :].masked_fill_(later, _UNSEEN)
        return
    column = torch.arange(columns.start, columns.stop, device=logits.device)
    hidden = column > row
    if sliding_window >= 0:
        hidden = hidden | (column <= row - sliding_window)
    if real is not None:
        hidden = (hidden | ~real[:, None, columns])[:, None, None]
    logits.masked_fill_(hidden, _UNSEEN)


def _bins_of(weights: Tensor) -> slice:
    """Rows of the grid (batch, grid, rows) that have a part in these rows in any sequence."""
    used = weights.any(2).any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)
