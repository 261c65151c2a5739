"""act-export's own attention nodes: plain ones are calibrated, calibrated ones refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from foreign_operators import (
    CALIBRATION,
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
from act_export.graft.graph import Graph, attribute
from act_export.graft.rewrite import find_sites
from act_export.ops import schema

PLAIN = Operator("act", mask="none", opset=21)
SINKS = {"attributes": (("sink_logits", [1.0, 3.0, -2.0, 0.5]),)}


@pytest.mark.parametrize("changes", [{}, {"window": 4}, {"softcap": 1.5, "kv_heads": 1}, SINKS], ids=str)
def test_graft_computes_the_reference(changes: dict[str, Any]) -> None:
    assert_calibrates(replace(PLAIN, **changes), [9, 1, 4, 1])


@given(sizes=SIZES, kv_heads=st.sampled_from([1, 2]), softcap=st.sampled_from([0.0, 2.0]), calls=CALLS, padding=PADDING)
@settings(max_examples=10, deadline=None)
def test_nothing_changes_without_effect(
    sizes: dict[str, Any], kv_heads: int, softcap: float, calls: list[int], padding: dict[str, int]
) -> None:
    sizes = {**sizes, "scale": sizes["scale"] or 0.5}
    assert_nothing_changes(replace(PLAIN, kv_heads=kv_heads, softcap=softcap, **sizes), calls, **padding)


@pytest.mark.parametrize("logits", [[2.0], [1.0, 3.0, -2.0, 0.5]])
def test_learned_sinks_are_kept(logits: list[float]) -> None:
    model = replace(PLAIN, attributes=(("sink_logits", logits),))
    assert_nothing_changes(model, [9, 1, 4, 1])
    (node,) = (
        node for node in calibrated(model.model, CALIBRATION).graph.node if node.op_type == "CalibratedAttention"
    )
    assert attribute(node, "sink_logits") == logits
    (node,) = (
        node for node in calibrated(PLAIN.model, CALIBRATION).graph.node if node.op_type == "CalibratedAttention"
    )
    assert attribute(node, "sink_logits") == [schema.NO_SINK_LOGIT]


def test_plain_layers_stay_and_need_no_new_import() -> None:
    model = replace(PLAIN, layers=2).model
    after = calibrated(model, CALIBRATION)
    assert [node.op_type for node in after.graph.node if node.domain == "act"] == ["CalibratedAttention", "Attention"]
    assert sorted(each.name for each in after.functions) == ["Attention", "CalibratedAttention"]
    assert [each.domain for each in after.opset_import].count("act") == 1
    ids, mask = batch([5, 1])
    before, now = (np.concatenate(run(each, ids, mask, [5, 1]), 1) for each in (model, after))
    width = PLAIN.hidden
    np.testing.assert_array_equal(now[..., width:], before[..., width:])


def test_buffers_are_shared_as_before() -> None:
    site = find_sites(Graph(PLAIN.model.graph))[0]
    assert site.shares_buffers
    assert site.problem is None


def test_calibrated_nodes_are_refused() -> None:
    model = calibrated(PLAIN.model, CALIBRATION)
    for node in model.graph.node:
        node.name = node.name.replace("act/", "other/")
        node.output[:] = [name.replace("act/", "other/") for name in node.output]
    with pytest.raises(UnsupportedPatternError, match=r"calibrated already.*--plain.*--remove"):
        calibrated(model, NOTHING)


def test_a_mask_of_its_own_is_refused() -> None:
    model = replace(PLAIN, layers=2).model
    node = next(node for node in model.graph.node if node.op_type == "Attention")
    node.input[5] = "other_mask"
    model.graph.input.append(helper.make_tensor_value_info("other_mask", TensorProto.INT64, ["batch", "total"]))
    with pytest.raises(UnsupportedPatternError, match="Attention '/model/0/attention' has the mask 'other_mask'"):
        calibrated(model, NOTHING)
    assert calibrated(model, Calibration({1: (0,)}))


def test_unknown_attributes_are_refused() -> None:
    model = replace(PLAIN, attributes=(("sink_scale", 2.0),)).model
    with pytest.raises(UnsupportedPatternError, match="'sink_scale'"):
        calibrated(model, NOTHING)
