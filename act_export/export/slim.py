"""The rewrites that an exported graph goes through, in order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from act_export.export.passes.cancel_reshapes import CancelReshapesPass
from act_export.export.passes.flatten_rotary import FlattenRotaryPass
from act_export.export.passes.keep_last_logits import KeepLastLogitsPass
from act_export.export.passes.name_weights import NameWeightsPass
from act_export.export.passes.pack_projections import PackProjectionsPass
from act_export.export.passes.strip_metadata import StripMetadataPass


def slim(model: ir.Model, *, weight_prefix: str = "") -> ir.Model:
    """Removes what the exporter left around attention and rotary embeddings, and adds the input `logits_to_keep`.

    With the input's default, what the graph computes stays.

    Args:
        model: As exported; changed in place.
        weight_prefix: Dropped from the names of weights.
    """
    passes = ir.passes.Sequential(
        FlattenRotaryPass(),
        CancelReshapesPass(),
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        NameWeightsPass(weight_prefix),
        PackProjectionsPass(),
        StripMetadataPass(),
        common.TopologicalSortPass(),
        KeepLastLogitsPass(),
        common.NameFixPass(),
    )
    return passes(model).model
