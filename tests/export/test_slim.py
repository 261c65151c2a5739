"""What is left of an exported graph: how many nodes a layer has, in every style of rotary embedding and projection."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from close import assert_logits_close
from tiny import CALIBRATION, tiny_checkpoint

from act_export.calibration.strengths import CalibratedHeads
from act_export.export.metadata import finish_model
from act_export.export.slim import slim
from act_export.export.trace import trace

# Nodes from one attention to the next, and those of them that a graph shouldn't have, or should have as many as said.
LAYERS = {
    "gpt_neox": (17, {"Reshape": 0, "Slice": 0, "Concat": 0, "RotaryEmbedding": 2, "Split": 1}),
    "gptj": (14, {"Reshape": 0, "Slice": 0, "Neg": 0, "RotaryEmbedding": 2, "Gelu": 1, "GatherND": 0}),
}


@pytest.fixture(scope="module", params=LAYERS)
def traced(request):
    """An exported graph and its name; biases and norms are random, so that a mistake with them shows."""
    checkpoint = tiny_checkpoint(request.param)
    generator = torch.Generator().manual_seed(1)
    for parameter in checkpoint.model.parameters():
        if parameter.ndim == 1:
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return request.param, trace(checkpoint.model, CalibratedHeads.of([CALIBRATION]))


def compute(model: ir.Model) -> dict[str, np.ndarray]:
    """All outputs for random inputs."""
    model = ir.serde.deserialize_model(ir.serde.serialize_model(model))  # which shall stay without the functions
    finish_model(model, {})
    rng = np.random.default_rng(0)
    batch, past, new = 2, 3, 5
    feeds: dict[str, np.ndarray] = {
        "input_ids": rng.integers(3, 259, (batch, new)),
        "attention_mask": np.ones((batch, past + new), np.int64),
        "position_ids": np.tile(np.arange(past, past + new), (batch, 1)),
    }
    for value in model.graph.inputs:
        if str(value.name).startswith("past"):
            feeds[value.name] = rng.random((batch, value.shape[1], past, value.shape[3]), np.float32)
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))


@pytest.mark.sampled(1)
def test_a_layer_has_no_debris_and_the_result_stays(traced):
    architecture, model = traced
    before = compute(model)
    model = slim(model, weight_prefix="model.")
    nodes = list(model.graph)
    first, second = (index for index, node in enumerate(nodes) if node.domain == "act")
    most, expected = LAYERS[architecture]
    layer = [node for node in nodes[first:second] if not str(node.outputs[0].name).endswith("_kept")]
    kinds = Counter(node.op_type for node in layer)
    assert len(layer) <= most, kinds
    assert {kind: kinds[kind] for kind in expected} == expected
    after = compute(model)
    assert after.keys() == before.keys()
    for name, values in after.items():
        assert_logits_close(values, before[name], 5e-5, what=name)
