"""Runs prompts and gives the statistics of every layer's attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from act_export.attention.call import AttentionCall, LayerState, empty_state, flatten_heads
from act_export.attention.hook import attention_hook
from act_export.calibration.file import Calibration
from act_export.calibration.reference import calibrate_with_state, visible_rows
from act_export.calibration.reference_operator import attention_probabilities
from act_export.profile.attention_statistics import AttentionStatistics, MapGrid, attend_with_statistics, map_grid
from act_export.profile.sink_statistics import GRID
from act_export.runtime.sampling import left_pad


class PromptStatistics(NamedTuple):
    """The attention of one prompt, on the CPU, at least float32.

    Attributes:
        column_sums: Sums of the attention maps' columns (layers, heads, tokens).
        scores: Sink scores (layers, heads, tokens).
        entropy: Of a row in nats, mean over the rows (layers, heads).
        mean_map: (layers, heads, GRID, GRID), see `act_export.profile.sink_statistics.SinkStatistics`.
    """

    column_sums: Tensor
    scores: Tensor
    entropy: Tensor
    mean_map: Tensor


class ProfilingAttention:
    """An attention hook that keeps the statistics of each layer; calibrated, those of the calibrated maps.

    Of a calibrated head the whole map is in memory, so long prompts are for the plain model only; and its entropy and
    mean map are those before calibration.
    """

    def __init__(self, calibration: Calibration | None = None) -> None:
        """Takes the calibration to apply; None leaves every head as it is."""
        self.calibration = calibration
        self.layers: dict[int, AttentionStatistics] = {}
        self.sliding_windows: dict[int, int] = {}
        self._grids: dict[torch.device, MapGrid] = {}

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """See `act_export.attention.call.AttentionHook`; takes first calls only, and keeps no state for others."""
        device = call.query.device
        if device not in self._grids:
            dtype = torch.promote_types(call.query.dtype, torch.float32)
            self._grids[device] = map_grid(call.attention_mask != 0, GRID, dtype)
        output, statistics = attend_with_statistics(call, self._grids[device])
        if self.calibration is not None and call.layer in self.calibration.heads:
            output, statistics = _calibrated(call, self.calibration, output, statistics)
        self.sliding_windows[call.layer] = call.sliding_window
        self.layers[call.layer] = statistics
        return flatten_heads(output).to(call.query.dtype), empty_state(call, 0)


def profile_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], calibration: Calibration | None = None
) -> Iterator[PromptStatistics]:
    """Statistics of prompts that run together, one by one.

    Args:
        model: Any that `act_export.attention.hook.attention_hook` takes.
        prompts: Token ids.
        calibration: To apply; None for the plain model.

    Raises:
        ActExportError: If the model's attention can't be exchanged.
    """
    input_ids, attention_mask = (torch.from_numpy(array).to(model.device) for array in left_pad(prompts))
    hook = ProfilingAttention(calibration)
    with torch.no_grad(), attention_hook(model, hook) as hooked:
        hooked(input_ids, attention_mask, logits_to_keep=hooked.fewest_logits)
    layers = [hook.layers[layer] for layer in sorted(hook.layers)]
    sums, entropy, maps = (torch.stack([part.cpu() for part in parts], 1) for parts in zip(*layers, strict=True))
    real = (attention_mask != 0).cpu()
    rows = torch.stack([visible_rows(real, hook.sliding_windows[layer]) for layer in sorted(hook.layers)], 1)
    for index, prompt in enumerate(prompts):
        own = slice(real.shape[1] - len(prompt), None)
        own_sums = sums[index, :, :, own]
        yield PromptStatistics(own_sums, own_sums / rows[index, :, None, own], entropy[index], maps[index])


def _calibrated(
    call: AttentionCall, calibration: Calibration, output: Tensor, statistics: AttentionStatistics
) -> tuple[Tensor, AttentionStatistics]:
    layer = calibration.layer(call.layer)
    assert layer is not None  # the caller looked
    heads = torch.tensor(layer.heads, device=output.device)
    kv_heads = heads // (call.query.shape[1] // call.key.shape[1])
    real = call.attention_mask != 0
    maps = attention_probabilities(
        call.query[:, heads],
        call.key[:, kv_heads],
        real,
        scale=call.scale,
        softcap=call.softcap,
        sliding_window=call.sliding_window,
        sink_logits=call.sink_logits[heads] if call.sink_logits is not None else None,
        gamma=torch.tensor([layer.gamma], device=output.device),
    )
    moved = calibrate_with_state(
        maps,
        beta=maps.new_tensor(layer.beta).view(-1, 1, 1),
        threshold=layer.threshold,
        threshold_mode=layer.threshold_mode,
        real=real[:, None],
        sliding_window=call.sliding_window,
    ).probabilities
    output = output.index_copy(1, heads, (moved @ call.value[:, kv_heads].to(moved.dtype)).to(output.dtype))
    sums = moved.masked_fill(~real[:, None, :, None], 0).sum(2)
    return output, statistics._replace(column_sums=statistics.column_sums.index_copy(1, heads, sums))
