"""ONNX's Attention: with beta = 1 nothing changes, with a calibration it is what the reference computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import pytest
from foreign_operators import (
    CALLS,
    NOTHING,
    PADDING,
    SIZES,
    Operator,
    assert_calibrates,
    assert_nothing_changes,
    calibrated,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from act_export.graft import UnsupportedPatternError
from act_export.graft.graph import Graph
from act_export.graft.rewrite import find_sites
from act_export.graft.site import Layout

FLAT = Operator("onnx")
APART = Operator("onnx", apart=True)
JOINED = Operator("onnx", own_cache=False)
KINDS = {
    "its own cache": FLAT,
    "a boolean mask": replace(FLAT, mask="bool"),
    "causal, with padding": replace(FLAT, mask="padding"),
    "causal, with a whole mask": replace(FLAT, mask="bool", causal=True),
    "a window": replace(FLAT, window=4),
    "a cap": replace(FLAT, softcap=1.5),
    "no scale": replace(FLAT, scale=0.0),
    "one key head": replace(FLAT, kv_heads=1),
    "precise softmax": replace(FLAT, attributes=(("softmax_precision", TensorProto.FLOAT),)),
    "opset 24": replace(FLAT, opset=24),
    "heads apart": APART,
    "heads apart, opset 24": replace(APART, opset=24, mask="padding"),
    "a joined cache": JOINED,
    "a joined cache, heads apart": replace(JOINED, apart=True, mask="bool", window=3),
    "no head size": replace(FLAT, says_size=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_graft_computes_the_reference(kind: str) -> None:
    assert_calibrates(KINDS[kind], [9, 1, 4, 1])


@given(
    sizes=SIZES,
    kv_heads=st.sampled_from([1, 2]),
    own=st.booleans(),
    apart=st.booleans(),
    mask=st.sampled_from(["float", "bool"]),
    opset=st.sampled_from([23, 24]),
    calls=CALLS,
    padding=PADDING,
)
@settings(max_examples=25, deadline=None)
def test_nothing_changes_without_effect(
    sizes: dict[str, Any],
    kv_heads: int,
    own: bool,
    apart: bool,
    mask: str,
    opset: int,
    calls: list[int],
    padding: dict[str, int],
) -> None:
    operator = Operator("onnx", kv_heads=kv_heads, own_cache=own, apart=apart, mask=mask, opset=opset, **sizes)
    assert_nothing_changes(operator, calls, **padding)


def test_heads_are_not_put_apart_again() -> None:
    for operator, layout in ((APART, Layout.FLAT), (FLAT, Layout.FLAT)):
        assert find_sites(Graph(operator.model.graph, operator.model.opset_import))[0].output_layout is layout
    after = calibrated(APART.model, NOTHING)
    names = {node.name for node in after.graph.node}
    assert not {"/model/0/attention", "/model/0/flat_rows", "/model/0/flat"} & names


def test_an_output_of_heads_apart() -> None:
    """Where something else happens to it before heads are put side by side."""
    model = _copy(APART)
    at = next(i for i, node in enumerate(model.graph.node) if node.name == "/model/0/flat_rows")
    model.graph.node[at].input[0] = "gated"
    model.graph.node.insert(at, helper.make_node("Sigmoid", ["/model/0/attention"], ["gated"], name="gate"))
    assert find_sites(Graph(model.graph, model.opset_import))[0].output_layout is Layout.HEADS
    after = calibrated(model, NOTHING)
    assert "gate" in {node.name for node in after.graph.node}
    changed = replace(APART)
    object.__setattr__(changed, "model", model)
    assert_nothing_changes(changed, [5, 1, 2])


def _copy(operator: Operator) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(operator.model.SerializeToString())


def _attention(model: onnx.ModelProto) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "Attention")


def _with_input(model: onnx.ModelProto, position: int, name: str) -> onnx.ModelProto:
    node = _attention(model)
    node.input.extend([""] * (position + 1 - len(node.input)))
    node.input[position] = name
    return model


def _with_logits(model: onnx.ModelProto) -> onnx.ModelProto:
    _attention(model).output.append("qk")
    return model


def _with_attribute(operator: Operator, name: str, value: Any) -> onnx.ModelProto:
    return _copy(replace(operator, attributes=((name, value),)))


def _with_other_size_of_values(model: onnx.ModelProto) -> onnx.ModelProto:
    given = next(each for each in model.graph.input if each.name == "past_key_values.0.value")
    given.type.tensor_type.shape.dim[3].dim_value = 12
    return model


def _without_shape_of_query(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.value_info[:]
    return model


def _read_early(model: onnx.ModelProto) -> onnx.ModelProto:
    """The cache is read by a node that comes before the attention."""
    at = next(i for i, node in enumerate(model.graph.node) if node.op_type == "Attention")
    model.graph.node.insert(at, helper.make_node("ReduceMax", ["present.0.key"], ["peak"], name="peak"))
    return model


REFUSED = {
    "lengths of keys": (_with_input(_copy(replace(FLAT, opset=24)), 6, "lengths"), "nonpad_kv_seqlen"),
    "logits": (_with_logits(_copy(FLAT)), "qk_matmul_output"),
    "unknown attribute": (_with_attribute(FLAT, "novel", 1), "'novel'"),
    "window of a later opset": (_with_attribute(FLAT, "left_window_size", 4), "left_window_size = 4"),
    "no cache": (_with_input(_with_input(_copy(FLAT), 4, ""), 5, ""), "has no cache"),
    "cache that isn't the model's": (_with_input(_copy(FLAT), 5, "/model/0/v_proj"), "aren't inputs of the model"),
    "other size of values": (_with_other_size_of_values(_copy(FLAT)), "keys have size 8 and its values 12"),
    "unknown heads": (_without_shape_of_query(_copy(APART)), "how many heads"),
    "no mask": (_copy(replace(FLAT, mask="none", causal=True)), "takes padding for tokens"),
    "later tokens": (
        _copy(replace(FLAT, mask="padding", attributes=(("is_causal", 0),), causal=False)),
        "isn't that of",
    ),
    "causal from the first key": (_copy(replace(JOINED, mask="padding")), "isn't that of causal attention"),
    "position bias": (_copy(replace(FLAT, sees="distance")), "differs between heads"),
    "a position more": (_copy(replace(FLAT, sees="a position more", mask="bool")), "isn't that of causal attention"),
    "a cache that is read early": (_read_early(_copy(JOINED)), "before the attention is done"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refuses_what_the_operator_cannot_do(what: str) -> None:
    model, message = REFUSED[what]
    with pytest.raises(UnsupportedPatternError, match=message) as raised:
        calibrated(model, NOTHING)
    assert "Attention '/model/0/attention'" in str(raised.value)
