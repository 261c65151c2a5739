"""`act.Attention` and `act.CalibratedAttention`, as act-export's own exports have them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx

from act_export.graft.graph import Graph, attribute, describe
from act_export.graft.site import AttentionTerms, CacheNames, OperandSite, layer_of
from act_export.onnx_file.names import MASK
from act_export.ops import schema


@dataclass(frozen=True)
class ActAttentionSite(OperandSite):
    """One of act-export's own attention nodes; see `OperandSite`."""

    @property
    def shares_buffers(self) -> bool:
        """See `AttentionSite`."""
        return True


def find(graph: Graph) -> Iterator[ActAttentionSite]:
    """act-export's attention nodes of a graph, in its order; calibrated ones can't be calibrated again."""
    for node in graph.proto.node:
        if node.domain == schema.DOMAIN and node.op_type in (schema.PLAIN, schema.CALIBRATED):
            yield _site(graph, node)


def _site(graph: Graph, node: onnx.NodeProto) -> ActAttentionSite:
    query, key, value, past_key, past_value, *rest = node.input
    layer = layer_of(past_key)
    shape = graph.shape(past_key)
    return ActAttentionSite(
        layer=-1 if layer is None else layer,
        nodes=(node,),
        terms=AttentionTerms(
            num_heads=attribute(node, "num_heads"),
            kv_num_heads=attribute(node, "kv_num_heads"),
            head_size=shape[-1] if shape else None,
            scale=attribute(node, "scale"),
            softcap=attribute(node, "softcap", 0.0),
            sliding_window=attribute(node, "sliding_window", -1),
            sink_logits=tuple(attribute(node, "sink_logits", ())),
        ),
        cache=CacheNames(past_key, past_value, node.output[1], node.output[2]),
        output=node.output[0],
        problem=_problem(graph, node, rest[-1]),
        query=query,
        key=key,
        value=value,
    )


def _problem(graph: Graph, node: onnx.NodeProto, mask: str) -> str | None:
    if node.op_type == schema.CALIBRATED:
        return (
            f"{describe(node)} is calibrated already; export the model with --plain, or take a graft out with "
            f"act-export graft --remove"
        )
    for given in node.attribute:
        if given.name not in schema.attribute_names(schema.PLAIN):
            return f"{describe(node)} has an attribute {given.name!r} that this version of act-export doesn't know"
    caster = graph.producer(mask)
    if mask != MASK and (caster is None or caster.op_type != "Cast" or caster.input[0] != MASK):
        return f"{describe(node)} has the mask {mask!r}, which isn't the model's input {MASK}"
    return None
