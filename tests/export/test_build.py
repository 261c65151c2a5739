"""The exported graph: what is in it, and that it computes what PyTorch computes."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny import CALIBRATION, tiny_checkpoint

from act_export.calibration.file import Calibration, CalibrationError
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.onnx_file.record import FileRecord


@pytest.fixture(scope="module")
def graph(tiny_file):
    return onnx.load(tiny_file, load_external_data=False).graph


def test_names_follow_optimum(graph):
    cache = [f"{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    sinks = ["0", "1"]
    assert [i.name for i in graph.input] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{name}" for name in cache),
        *(f"past_sink_scores.{name}" for name in sinks),
        "logits_to_keep",
        "calibration",
    ]
    assert [o.name for o in graph.output] == [
        "logits",
        *(f"present.{name}" for name in cache),
        *(f"present_sink_scores.{name}" for name in sinks),
    ]


def test_one_attention_node_per_layer_and_no_debris(graph):
    operators = Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in graph.node)
    assert operators["act.CalibratedAttention"] == 2
    assert not {"Reshape", "Expand", "Where", "Softmax", "Concat"} & set(operators)
    assert operators["Slice"] == 2  # the last attention and the residual stream: for logits_to_keep
    assert operators["Transpose"] == 1  # of the embedding, which the last matrix product shares
    assert len(graph.node) <= 17 * 2 + 14


def test_only_calibrated_layers_carry_sink_state(tiny, tmp_path):
    path = tmp_path / "one.onnx"
    build_model(tiny, Calibration({1: (2,)}), path)
    graph = onnx.load(path, load_external_data=False).graph
    assert [i.name for i in graph.input if "sink" in i.name] == ["past_sink_scores.1"]
    assert [n.op_type for n in graph.node if n.domain == "act"] == ["Attention", "CalibratedAttention"]


def test_what_can_be_calibrated_is_in_the_attributes_and_how_in_an_input(graph):
    node = [node for node in graph.node if node.domain == "act"][1]
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values["calibrated_heads"] == [0, 3]
    assert values["threshold_mode"] == b"absolute"
    assert (values["num_heads"], values["kv_num_heads"], values["sliding_window"]) == (4, 2, -1)
    default = next(onnx.numpy_helper.to_array(each) for each in graph.initializer if each.name == "calibration")
    assert np.allclose(default, [[[0.4, 1, 0.06], [0.2, 1, 0.06], [1.7, 1, 0.06]]])
    split = next(node for node in graph.node if node.op_type == "Split")
    assert split.input[0] == "calibration"
    assert [node.input[7] for node in graph.node if node.domain == "act"] == list(split.output)


def test_dynamic_dimensions(graph):
    dims = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert dims["input_ids"] == ["batch_size", "sequence_length"]
    assert dims["attention_mask"] == ["batch_size", "total_sequence_length"]
    assert dims["past_key_values.0.key"] == ["batch_size", 2, "past_sequence_length", 8]
    assert dims["past_sink_scores.1"] == ["batch_size", 2, "past_sequence_length", 1]


def test_metadata_has_calibration_and_nothing_of_torch(tiny, tiny_file):
    model = onnx.load(tiny_file, load_external_data=False)
    properties = {p.key: p.value for p in model.metadata_props}
    assert json.loads(properties["act_export.calibrations"])["default"] == "calibrated"
    assert FileRecord.read(properties, "it").calibration == CALIBRATION
    assert json.loads(properties["act_export.model"])["fingerprint"] == tiny.identity.fingerprint
    assert b"pkg.torch" not in tiny_file.read_bytes()
    assert model.producer_name == "act-export"


def test_weights_are_external_and_stored_once(tiny, tiny_file):
    model = onnx.load(tiny_file, load_external_data=False)
    large = [t for t in model.graph.initializer if ir.serde.deserialize_tensor(t).nbytes > 256]
    assert large
    assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in large)
    parameters_bytes = sum(p.numel() * 4 for p in tiny.model.parameters())
    stored_bytes = (tiny_file.parent / "model.onnx.data").stat().st_size
    assert stored_bytes <= parameters_bytes * 1.1 + 4096 * len(large)


def test_weights_have_their_modules_names(graph):
    names = {t.name for t in graph.initializer}
    assert "model.layers.1.self_attn.q_proj+k_proj+v_proj.weight_transposed" in names
    assert "model.layers.0.mlp.down_proj.weight_transposed" in names


def test_strict_shape_inference(tiny_file):
    onnx.checker.check_model(str(tiny_file), full_check=True)
    model = onnx.load(tiny_file)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)


def test_a_calibration_of_another_model_is_refused(tiny, tmp_path):
    with pytest.raises(CalibrationError, match="layer 2 is out of range"):
        build_model(tiny, Calibration({2: (0,)}), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_attention_that_misses_the_hook_is_refused(tmp_path):
    with pytest.raises(ActExportError, match="once per layer"):
        build_model(tiny_checkpoint("gpt_neox_japanese"), None, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_refused_before_writing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ActExportError, match=r"0 MB free; the export needs \d+ MB"):
        build_model(tiny, None, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
