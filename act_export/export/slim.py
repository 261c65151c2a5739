"""The rewrites that an exported graph goes through, in order."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from act_export.export.passes.cancel_reshapes import CancelReshapesPass
from act_export.export.passes.constant_reshapes import ConstantReshapesPass
from act_export.export.passes.drop_transposes import DropTransposesPass
from act_export.export.passes.fuse_layer_norm import FuseLayerNormPass
from act_export.export.passes.fuse_partial_rotary import FusePartialRotaryPass
from act_export.export.passes.fuse_rotary import FuseRotaryPass
from act_export.export.passes.fuse_tanh_gelu import FuseTanhGeluPass
from act_export.export.passes.gather_rows import GatherRowsPass
from act_export.export.passes.keep_last_logits import KeepLastLogitsPass
from act_export.export.passes.name_weights import NameWeightsPass
from act_export.export.passes.pack_projections import PackProjectionsPass
from act_export.export.passes.straighten_projections import StraightenProjectionsPass
from act_export.export.passes.strip_metadata import StripMetadataPass
from act_export.export.passes.unflatten_tokens import UnflattenTokensPass


def slim(model: ir.Model, *, weight_prefix: str = "") -> ir.Model:
    """Removes what the exporter left around attention and rotary embeddings, and adds the input `logits_to_keep`.

    With the input's default, what the graph computes stays.

    Args:
        model: As exported; changed in place.
        weight_prefix: Dropped from the names of weights.
    """
    passes = ir.passes.Sequential(
        common.IdentityEliminationPass(),
        FuseLayerNormPass(),
        FuseTanhGeluPass(),
        GatherRowsPass(),
        FuseRotaryPass(),
        common.RemoveUnusedNodesPass(),
        DropTransposesPass(),
        UnflattenTokensPass(),
        common.RemoveUnusedNodesPass(),
        FusePartialRotaryPass(),
        common.RemoveUnusedNodesPass(),
        StraightenProjectionsPass(),
        ConstantReshapesPass(),
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
