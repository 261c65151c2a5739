"""The operators as torch custom operators, so that torch's exporter carries them into the graph as single nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import onnxscript
import torch
from torch import Tensor

from act_export.attention.call import AttentionCall, LayerState, empty_state, flatten_heads
from act_export.calibration.reference_operator import calibrated_attention
from act_export.calibration.strengths import CalibratedHeads
from act_export.ops import schema


def _output_like(query: Tensor, past_value: Tensor, num_heads: int) -> Tensor:
    return query.new_empty(*query.shape[:2], num_heads * past_value.shape[-1])


def _present_like(past: Tensor, new: Tensor) -> Tensor:
    batch, heads, past_length, size = past.shape
    return past.new_empty(batch, heads, past_length + new.shape[1], size)


@torch.library.custom_op("act::CalibratedAttention", mutates_args=())
def _calibrated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_sink_scores: Tensor,
    attention_mask: Tensor,
    calibration: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    sliding_window: int,
    sink_logits: Sequence[float],
    calibrated_heads: Sequence[int],
    threshold_mode: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return calibrated_attention(
        query,
        key,
        value,
        past_key,
        past_value,
        past_sink_scores,
        attention_mask,
        calibration,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
        softcap=softcap,
        sliding_window=sliding_window,
        sink_logits=sink_logits,
        calibrated_heads=calibrated_heads,
        threshold_mode=threshold_mode,
    )


@_calibrated.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    past_sink_scores: Tensor,
    attention_mask: Tensor,
    calibration: Tensor,
    num_heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _output_like(query, past_value, num_heads),
        _present_like(past_key, key),
        _present_like(past_value, value),
        _present_like(past_sink_scores, key),
    )


@torch.library.custom_op("act::Attention", mutates_args=())
def _plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    sliding_window: int,
    sink_logits: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    no_state = past_key.new_zeros((past_key.shape[0], 0, past_key.shape[2], 1), dtype=torch.float32)
    outputs = calibrated_attention(
        query,
        key,
        value,
        past_key,
        past_value,
        no_state,
        attention_mask,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        scale=scale,
        softcap=softcap,
        sliding_window=sliding_window,
        sink_logits=sink_logits,
    )
    return outputs.output, outputs.present_key, outputs.present_value


@_plain.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    attention_mask: Tensor,
    num_heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _output_like(query, past_value, num_heads),
        _present_like(past_key, key),
        _present_like(past_value, value),
    )


class OperatorAttention:
    """The hook that puts one operator node per layer into the exported graph."""

    def __init__(
        self, heads: CalibratedHeads, sink_logits: Mapping[int, Sequence[float]] = MappingProxyType({})
    ) -> None:
        """Takes what to bake in.

        Args:
            heads: That can be calibrated; layers without any get the plain operator.
            sink_logits: By layer, of those that have learned ones: one for each query head.
        """
        self.heads = heads
        self.sink_logits = sink_logits

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """Calls the torch custom operator of the layer's kind."""
        heads = self.heads.heads.get(call.layer, ())
        past = call.past if call.past is not None else empty_state(call, len(heads))
        new = [flatten_heads(x) for x in (call.query, call.key, call.value)]
        if (call.sink_logits is not None) != (call.layer in self.sink_logits):
            has = "has no" if call.sink_logits is None else "has"
            raise ValueError(
                f"layer {call.layer} {has} learned sink logits; values were given for layers {list(self.sink_logits)}"
            )
        sink_logits = list(self.sink_logits.get(call.layer, ()))
        shape = (call.query.shape[1], call.key.shape[1], call.scale, call.softcap, call.sliding_window, sink_logits)
        if not heads:
            output, key, value = torch.ops.act.Attention(*new, past.key, past.value, call.attention_mask, *shape)
            return output, LayerState(key, value, past.sink_scores)
        output, *state = torch.ops.act.CalibratedAttention(
            *new,
            *past,
            call.attention_mask,
            torch.ones(1, len(heads), 3),  # `CalibrationInputPass` puts the graph's input here
            *shape,
            list(heads),
            self.heads.threshold_mode,
        )
        return output, LayerState(*state)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How torch's exporter writes the custom operators as ONNX nodes."""
    schema.register_schemas()
    opset = onnxscript.values.Opset(schema.DOMAIN, schema.VERSION)

    def translator(operator: str) -> Callable[..., Any]:
        names = schema.attribute_names(operator)

        def translate(*arguments: Any) -> Any:
            tensors, values = arguments[: -len(names)], arguments[-len(names) :]
            # Without sink logits the list is empty, which not every tool takes: the exporter writes the default then.
            attributes = {name: value for name, value in zip(names, values, strict=True) if value != []}
            return getattr(opset, operator)(*tensors, **attributes)

        return translate

    return {
        torch.ops.act.CalibratedAttention.default: translator(schema.CALIBRATED),
        torch.ops.act.Attention.default: translator(schema.PLAIN),
    }
