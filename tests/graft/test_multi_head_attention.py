"""MultiHeadAttention: with beta = 1 nothing changes, with a calibration it is what the reference computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from close import assert_close
from foreign_operators import (
    CALLS,
    NOTHING,
    PADDING,
    SIZES,
    Operator,
    assert_calibrates,
    assert_nothing_changes,
    batch,
    calibrated,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from act_export.calibration.file import Calibration
from act_export.graft import UnsupportedPatternError
from act_export.graft.graph import Graph
from act_export.graft.rewrite import find_sites

OWN = Operator("multi head", kv_heads=4)
JOINED = Operator("multi head", own_cache=False)
KINDS = {
    "its own cache": OWN,
    "a bias": replace(OWN, bias=True),
    "boolean padding of keys": replace(OWN, mask="keys"),
    "a window": replace(OWN, window=4),
    "no scale": replace(OWN, scale=0.0),
    "causal as well": replace(OWN, causal=True),
    "no head size": replace(OWN, says_size=False),
    "repeated heads": JOINED,
    "repeated heads in a window": replace(JOINED, window=3),
    "as many heads, joined": replace(JOINED, kv_heads=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_graft_computes_the_reference(kind: str) -> None:
    assert_calibrates(KINDS[kind], [9, 1, 4, 1])


@given(sizes=SIZES, own=st.booleans(), bias=st.booleans(), causal=st.booleans(), calls=CALLS, padding=PADDING)
@settings(max_examples=25, deadline=None)
def test_nothing_changes_without_effect(
    sizes: dict[str, Any], own: bool, bias: bool, causal: bool, calls: list[int], padding: dict[str, int]
) -> None:
    kv_heads = sizes["heads"] if own else 2
    operator = Operator(
        "multi head", kv_heads=kv_heads, own_cache=own, bias=bias and own, causal=causal and own, **sizes
    )
    assert_nothing_changes(operator, calls, **padding)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_masks_that_take_no_chunks(kv_heads: int) -> None:
    operator = replace(JOINED, kv_heads=kv_heads, mask="squares")
    site = find_sites(Graph(operator.model.graph, operator.model.opset_import))[0]
    assert not site.takes_chunks
    assert_calibrates(operator, [9, 1, 1])


def test_all_that_repeats_heads_goes() -> None:
    operator = replace(JOINED, layers=2)
    before = {node.name for node in operator.model.graph.node}
    after = calibrated(operator.model, NOTHING)
    gone = before - {node.name for node in after.graph.node}
    assert {"/model/0/attention", "/model/present/0/key/joined", "/model/present/0/value/repeated"} <= gone
    assert "/model/present/0/key/new" not in gone
    assert all("/0/" in name for name in gone), "the other layer and the mask that it shares stay"
    ids, mask = batch([6, 2])
    wanted, found = (np.concatenate(run(model, ids, mask, [6, 2]), 1) for model in (operator.model, after))
    assert_close(found[mask != 0], wanted[mask != 0], 2e-5)


def _with_input(model: onnx.ModelProto, position: int, name: str) -> onnx.ModelProto:
    node = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name
    return model


def _with_attribute(model: onnx.ModelProto, **named: Any) -> onnx.ModelProto:
    node = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in named.items())
    return model


def _packed(model: onnx.ModelProto) -> onnx.ModelProto:
    packed = helper.make_tensor_value_info("/model/0/q_proj", TensorProto.FLOAT, ["batch", "sequence", 4, 3, 8])
    model.graph.value_info.append(packed)
    return model


def _with_attention_map(model: onnx.ModelProto) -> onnx.ModelProto:
    node = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    node.output.append("map")
    return model


def _scaled_values(model: onnx.ModelProto) -> onnx.ModelProto:
    """Doubles the values after they were joined to the cache."""
    node = next(node for node in model.graph.node if node.op_type == "MultiHeadAttention")
    used = node.input[2]
    at = next(i for i, each in enumerate(model.graph.node) if each.op_type == "MultiHeadAttention")
    model.graph.node.insert(at, helper.make_node("Add", [used, used], ["doubled"], name="double"))
    model.graph.node[at + 1].input[2] = "doubled"
    return model


def _values_of_other_heads(model: onnx.ModelProto) -> onnx.ModelProto:
    """Repeats all heads one after another, not each."""
    for node in model.graph.node:
        if node.name == "/model/present/0/value/wide":
            node.input[1] = "/model/present/0/value/other_axis"
            axis = helper.make_tensor("axis", TensorProto.INT64, [1], [1])
            made = helper.make_node("Constant", [], ["/model/present/0/value/other_axis"], value=axis)
        if node.name == "/model/present/0/value/repeats":
            node.attribute[0].t.CopyFrom(helper.make_tensor("repeats", TensorProto.INT64, [5], [1, 2, 1, 1, 1]))
    model.graph.node.insert(0, made)
    return model


def _copy(operator: Operator) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(operator.model.SerializeToString())


REFUSED = {
    "buffer of fixed length": (_with_input(_copy(OWN), 8, "length"), "past_sequence_length"),
    "beams": (_with_input(_copy(OWN), 9, "beams"), "cache_indirection"),
    "unknown attribute": (_with_attribute(_copy(OWN), smooth=1), "'smooth'"),
    "packed": (_packed(_copy(OWN)), "aren't three inputs"),
    "no key": (_with_input(_copy(OWN), 1, ""), "aren't three inputs"),
    "attention map": (_with_attention_map(_copy(OWN)), "attention map is an output"),
    "cache that isn't the model's": (_with_input(_copy(OWN), 6, "/model/0/k_proj"), "aren't inputs of the model"),
    "later tokens": (_copy(replace(OWN, mask="none")), "sees later tokens"),
    "padding": (_copy(replace(OWN, mask="none", causal=True)), "takes padding for tokens"),
    "bidirectional mask": (_copy(replace(OWN, sees="later")), "isn't that of causal attention"),
    "position bias": (_copy(replace(OWN, sees="distance")), "differs between heads"),
    "weak mask": (_with_attribute(_copy(replace(OWN, mask="keys")), mask_filter_value=-10.0), "isn't that of causal"),
    "causal from the first key": (_copy(replace(JOINED, mask="keys")), "isn't that of causal attention"),
    "bias of the cache": (_copy(replace(JOINED, bias=True)), "keys that were in the cache"),
    "scaled values": (_scaled_values(_copy(JOINED)), "has no cache"),
    "other order of heads": (_values_of_other_heads(_copy(JOINED)), "with its heads repeated"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_what_the_operator_cannot_do(what: str) -> None:
    model, message = REFUSED[what]
    with pytest.raises(UnsupportedPatternError, match=message) as raised:
        calibrated(model, NOTHING)
    assert "MultiHeadAttention '/model/0/attention'" in str(raised.value)


def test_a_layer_that_is_not_calibrated_may_be_anything() -> None:
    model = _with_attribute(_copy(replace(OWN, layers=2)), smooth=1)
    sites = find_sites(Graph(model.graph, model.opset_import))
    assert (sites[0].problem is None, sites[1].problem) == (False, None)
    after = calibrated(model, Calibration({1: (0,)}))
    assert [node.op_type for node in after.graph.node if "Attention" in node.op_type] == [
        "MultiHeadAttention",
        "CalibratedAttention",
    ]
