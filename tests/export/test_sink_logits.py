"""Models with learned sinks: their logits are attributes of the attention nodes."""

from __future__ import annotations

import onnx
import pytest
import torch
from tiny import CALIBRATION, tiny_checkpoint

from act_export.attention.call import AttentionCall
from act_export.calibration.file import Calibration
from act_export.export import build_model
from act_export.export.operator import OperatorAttention
from act_export.ops import schema
from act_export.runtime import Session
from act_export.verify.parity.sessions import verify_sessions

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LOGITS = ([2.0, -1.0, 0.5, 3.0], [0.25, 1.5, -2.0, 4.0])


@pytest.mark.in_turn(2)
def test_the_graph_computes_what_pytorch_does(tmp_path):
    checkpoint = tiny_checkpoint("gpt_oss", sliding_window=7, **EXPERTS)
    for layer, logits in zip(checkpoint.model.model.layers, LOGITS, strict=True):
        layer.self_attn.sinks.copy_(torch.tensor(logits))
    path = tmp_path / "model.onnx"
    build_model(checkpoint, CALIBRATION, path)
    nodes = [node for node in onnx.load(path, load_external_data=False).graph.node if node.domain == "act"]
    found = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["sink_logits"] for node in nodes]
    assert [list(logits) for logits in found] == [list(logits) for logits in LOGITS]
    report = verify_sessions(
        checkpoint,
        CALIBRATION,
        {"native": lambda: Session.open(path), "portable": lambda: Session.open(path, native=False)},
    )
    assert report.passed, report
    assert max(engine.max_difference for engine in report.engines) < 1e-4


def test_models_without_have_the_default(tiny_file):
    """In the file: tools that inline functions don't know their defaults."""
    nodes = [node for node in onnx.load(tiny_file, load_external_data=False).graph.node if node.domain == "act"]
    found = [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}["sink_logits"] for node in nodes]
    assert found == [[schema.NO_SINK_LOGIT]] * 2


@pytest.mark.parametrize(("given", "has_sinks"), [({}, True), ({0: [0.0] * 4}, False)])
def test_a_layer_whose_logits_are_not_those_of_the_model_is_an_error(given, has_sinks):
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    sinks = torch.zeros(4) if has_sinks else None
    call = AttentionCall(0, query, key, key, torch.ones(1, 3), 1.0, 0.0, -1, None, sink_logits=sinks)
    with pytest.raises(ValueError, match=r"layer 0 .*learned sink logits; values were given for layers"):
        OperatorAttention(Calibration({0: (1,)}), given).attend(call)
