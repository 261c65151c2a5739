"""The reference as a hook."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from act_export.attention.call import AttentionCall, LayerState, empty_state, flatten_heads
from act_export.calibration.file import Calibration
from act_export.calibration.reference_operator import calibrated_attention
from act_export.calibration.strengths import CalibratedHeads


class ReferenceAttention:
    """The reference, calibrated or (with None) plain, as a hook."""

    def __init__(self, calibration: Calibration | None) -> None:
        """Takes the calibration to apply; None leaves every head as it is."""
        self.heads = CalibratedHeads.of([] if calibration is None else [calibration])
        self.calibrate(calibration)
        self.sliding_windows: dict[int, int] = {}  # by layer, as the model asked for them
        self.sink_logits: dict[int, Tensor] = {}  # of the layers that have some, (num_heads,)

    @classmethod
    def of_heads(cls, heads: CalibratedHeads) -> Self:
        """The reference as a file that can calibrate these heads runs it; `calibrate` says how, at first not at all."""
        found = cls(None)
        found.heads = heads
        found.calibrate(None)
        return found

    def calibrate(self, *calibrations: Calibration | None) -> None:
        """Takes a calibration for all sequences, or one for each; None leaves every head as it is.

        Raises:
            CalibrationError: If one doesn't fit the heads.
        """
        self.strengths = torch.from_numpy(self.heads.strengths(*calibrations))

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """Runs `act_export.calibration.reference.calibrated_attention`."""
        if call.one_at_a_time and call.query.shape[2] > 1:
            return self._attend_one_at_a_time(call)
        heads = self.heads.heads.get(call.layer, ())
        self.sliding_windows[call.layer] = call.sliding_window
        if call.sink_logits is not None:
            self.sink_logits[call.layer] = call.sink_logits.detach()
        past = call.past if call.past is not None else empty_state(call, len(heads))
        outputs = calibrated_attention(
            flatten_heads(call.query),
            flatten_heads(call.key),
            flatten_heads(call.value),
            *past,
            call.attention_mask,
            self.strengths[:, self.heads.part(call.layer)],
            num_heads=call.query.shape[1],
            kv_num_heads=call.key.shape[1],
            scale=call.scale,
            softcap=call.softcap,
            sliding_window=call.sliding_window,
            calibrated_heads=heads,
            threshold_mode=self.heads.threshold_mode,
            sink_logits=call.sink_logits,
        )
        return outputs.output, LayerState(*outputs[1:])

    def _attend_one_at_a_time(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        sequence = call.query.shape[2]
        past = call.attention_mask.shape[1] - sequence
        outputs, state = [], call.past
        for row in range(sequence):
            step = call._replace(
                query=call.query[:, :, row : row + 1],
                key=call.key[:, :, row : row + 1],
                value=call.value[:, :, row : row + 1],
                attention_mask=call.attention_mask[:, : past + row + 1],
                past=state,
            )
            output, state = self.attend(step)
            outputs.append(output)
        assert state is not None  # a call has at least one row
        return torch.cat(outputs, 1), state
