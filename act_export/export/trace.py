"""transformers model -> ONNX graph, through torch's exporter, with one operator node per attention layer."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from act_export.attention.call import LayerState
from act_export.attention.hook import HookedModel, as_unsupported, attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.strengths import CalibratedHeads
from act_export.checkpoint.identity import layers_and_heads
from act_export.checkpoint.low_memory import low_memory_told
from act_export.checkpoint.text_tower import hidden_size, one_rotation, position_axes
from act_export.errors import ActExportError
from act_export.export import decompose, experts
from act_export.export.lazy_weights import ReadWeight, attach_weights, hollowed
from act_export.export.operator import OperatorAttention, translation_table
from act_export.export.passes.name_dimensions import NameDimensionsPass
from act_export.export.passes.transpose_weights import TransposeWeightsPass
from act_export.export.passes.unroll_experts import UnrollExpertsPass
from act_export.export.promotion import quick_type_promotion
from act_export.export.rope import traceable_rotation
from act_export.export.slice_pairs import quick_slice_pairs
from act_export.onnx_file.names import (
    BATCH,
    EMBEDDINGS,
    IDS,
    LOGITS,
    MASK,
    PAST_LENGTH,
    POSITIONS,
    SEQUENCE,
    TOTAL_LENGTH,
    GraphNames,
)
from act_export.ops import functions, schema

if TYPE_CHECKING:
    from transformers import PreTrainedModel


EXPORTING = (
    "export the model",
    "close what else takes memory, take a machine with more, or pass --stream, which holds one weight at a time",
)
_WEIGHT_PREFIX = "model."  # by `_GraphModule`


class _GraphModule(torch.nn.Module):
    """The hooked model with the graph's flat inputs and outputs."""

    def __init__(self, hooked: HookedModel, sink_layers: Sequence[int]) -> None:
        super().__init__()
        self.model = hooked.model
        self._hooked = hooked
        self._sink_layers = list(sink_layers)

    def forward(
        self, tokens: Tensor, attention_mask: Tensor, position_ids: Tensor, cache: list[Tensor], sinks: list[Tensor]
    ) -> tuple[Tensor, ...]:
        by_layer = dict(zip(self._sink_layers, sinks, strict=True))
        none = cache[0].new_zeros((0, 0, 0, 1), dtype=torch.float32)
        state = [
            LayerState(key, value, by_layer.get(layer, none))
            for layer, (key, value) in enumerate(zip(cache[::2], cache[1::2], strict=True))
        ]
        ids, embeds = (None, tokens) if tokens.is_floating_point() else (tokens, None)
        outputs = self._hooked(ids, attention_mask, state, inputs_embeds=embeds, position_ids=position_ids)
        return (
            outputs.logits,
            *(part for layer in outputs.state for part in (layer.key, layer.value)),
            *(outputs.state[layer].sink_scores for layer in self._sink_layers),
        )


def trace(
    model: PreTrainedModel,
    heads: CalibratedHeads,
    *,
    inputs_embeds: bool = False,
    read_weight: ReadWeight | None = None,
) -> ir.Model:
    """Exports a model in whose attention nodes these heads can be calibrated.

    How they are is a constant of ones in each node, for `CalibrationInputPass` to replace.

    The batch, the new tokens and the cache have dynamic lengths. Large weights are read when somebody asks for their
    values, and not kept.

    Args:
        model: In float32.
        heads: That can be calibrated.
        inputs_embeds: The graph takes embeddings (batch, sequence, hidden size) instead of token ids, and with M-RoPE
            positions (3, batch, sequence).
        read_weight: Where the model's large weights are zeros that stand for them: how to get one, by its name. None
            for the model's own.

    Raises:
        ActExportError: If attention or experts can't be replaced, or the graph doesn't hold one node per layer.
    """
    experts.check_experts(model)
    num_layers, _ = layers_and_heads(model.config)
    sinks = list(heads.heads)
    names = GraphNames.of(num_layers, sinks, EMBEDDINGS if inputs_embeds else IDS)
    state, sink_logits = _probe(model, heads)
    batch, past, sequence = 2, 5, 3
    tokens = torch.zeros(batch, sequence, dtype=torch.long)
    positions = torch.arange(past, past + sequence).repeat(batch, 1)
    of_tokens = of_positions = {0: BATCH, 1: SEQUENCE}
    if inputs_embeds:
        tokens = torch.zeros(batch, sequence, hidden_size(model), dtype=model.dtype)
        if position_axes(model) > 1:
            positions = positions.repeat(position_axes(model), 1, 1)
            of_positions = {1: BATCH, 2: SEQUENCE}
    example = {
        "tokens": tokens,
        MASK: torch.ones(batch, past + sequence, dtype=torch.long),
        POSITIONS: positions,
        "cache": [part for layer in state for part in (layer.key, layer.value)],
        "sinks": [state[layer].sink_scores for layer in sinks],
    }
    of_past, of_present = {0: BATCH, 2: PAST_LENGTH}, {0: BATCH, 2: TOTAL_LENGTH}
    of_mask = {0: BATCH, 1: TOTAL_LENGTH}
    dimensions: dict[str, dict[int, str]] = {
        **dict.fromkeys(names.inputs, of_past),
        **dict.fromkeys(names.outputs, of_present),
        **{names.inputs[0]: of_tokens, MASK: of_mask, POSITIONS: of_positions, LOGITS: of_tokens},
    }
    translations = translation_table() | experts.translation_table() | decompose.translation_table()
    with (
        torch.no_grad(),
        as_unsupported(model.config.model_type),
        low_memory_told(*EXPORTING),
        decompose.decomposed_where_needed(translations),
        quick_type_promotion(),
        attention_hook(model, OperatorAttention(heads, sink_logits)) as hooked,
        experts.exportable_experts(model),
        one_rotation(model),
        traceable_rotation(model),
        hollowed(model) as own_weights,
        _quiet_exporter(),
    ):
        program = torch.onnx.export(
            _GraphModule(hooked, sinks).eval(),
            kwargs=example,
            dynamo=True,
            opset_version=functions.OPSET,
            custom_translation_table=translations,
            dynamic_shapes={
                "tokens": of_tokens,
                MASK: of_mask,
                POSITIONS: of_positions,
                "cache": [of_past] * (2 * num_layers),
                "sinks": [of_past] * len(sinks),
            },
            input_names=names.inputs,
            output_names=names.outputs,
            verbose=False,
            optimize=False,  # with weights of zeros some would be taken for equal
        )
    if program is None:
        raise ActExportError("torch's exporter returned nothing")
    attach_weights(program.model, own_weights, read_weight or own_weights.__getitem__, prefix=_WEIGHT_PREFIX)
    TransposeWeightsPass()(program.model)
    with as_unsupported(model.config.model_type), low_memory_told(*EXPORTING), _quiet_exporter(), quick_slice_pairs():
        program.optimize()
    exported = program.model
    NameDimensionsPass(dimensions)(exported)
    UnrollExpertsPass()(exported)
    check_one_node_per_layer(exported, num_layers, len(sinks))
    return exported


def check_one_node_per_layer(model: ir.Model, num_layers: int, calibrated: int) -> None:
    """Raises ActExportError unless the graph has exactly the attention nodes that it should have."""
    found = [node.op_type for node in model.graph if node.domain == schema.DOMAIN]
    expected = {schema.CALIBRATED: calibrated, schema.PLAIN: num_layers - calibrated}
    counts = {operator: found.count(operator) for operator in expected}
    if counts != expected:
        raise ActExportError(f"the exported graph holds {counts} attention nodes; expected {expected}")


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without torch's remarks on packages that this export doesn't need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _probe(model: PreTrainedModel, heads: CalibratedHeads) -> tuple[list[LayerState], dict[int, list[float]]]:
    """Runs the model once under the hook, which refuses it early.

    Returns:
        A cache of the right shapes to export with, and the learned sink logits of the layers that have some: while the
        model is traced its parameters have no values.
    """
    ids = torch.zeros(2, 5, dtype=torch.long)
    reference = ReferenceAttention.of_heads(heads)
    with (
        torch.no_grad(),
        as_unsupported(model.config.model_type),
        low_memory_told(*EXPORTING),
        attention_hook(model, reference) as hooked,
    ):
        state = hooked(ids, torch.ones_like(ids), logits_to_keep=1).state
    return state, {layer: logits.tolist() for layer, logits in reference.sink_logits.items()}
