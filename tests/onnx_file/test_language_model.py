"""What a graph says about running it: of act-export, of other exporters, and of files that are no language model."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny import VOCABULARY

from act_export.errors import ActExportError
from act_export.onnx_file.language_model import read_model_file

HEADS, KV_HEADS, SIZE = 4, 2, 16


def packed_model(*, kv_heads=KV_HEADS, width=(HEADS + 2 * KV_HEADS) * SIZE, vocabulary=9, extra=()) -> onnx.ModelProto:
    """A graph that names what onnxruntime-genai's builder names; it says little and computes nothing."""
    past = (TensorProto.FLOAT, ["batch", kv_heads, "past", "kv_cache_dim"])
    inputs = [
        ("input_ids", TensorProto.INT64, ["batch", "sequence"]),
        ("attention_mask", TensorProto.INT64, ["a", "b"]),
    ]
    states = [f"past_key_values.0.{part}" for part in ("key", "value")]
    present = [f"present.0.{part}" for part in ("key", "value")]
    nodes = [
        helper.make_node("MatMul", ["embedded", "weight"], ["packed"]),
        helper.make_node(
            "GroupQueryAttention",
            ["packed", "", "", *states, "lengths", "total"],
            ["logits", *present],
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "packed",
        [helper.make_tensor_value_info(*given) for given in (*inputs, *((name, *past) for name in states), *extra)],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "sequence", vocabulary]),
            *(helper.make_tensor_value_info(name, *past) for name in present),
        ],
        initializer=[numpy_helper.from_array(np.zeros((3, width), np.float32), "weight")],
    )
    return helper.make_model(graph)


def test_a_file_of_our_own(tiny_file, tiny):
    file = read_model_file(tiny_file.parent)
    assert file.path == tiny_file
    assert file.ours
    assert file.last_logits
    assert file.identity == tiny.identity
    assert (file.vocabulary, file.limits.context) == (VOCABULARY, 256)
    assert file.attention == {"CalibratedAttention": 2}
    assert file.cache_shape[0] == ("past_key_values.0.key", 2, 8)
    assert file.weights_bytes > tiny_file.stat().st_size


def test_calibration_does_not_change_the_cache(tiny_file, tiny_plain_file):
    assert read_model_file(tiny_file).cache_shape == read_model_file(tiny_plain_file).cache_shape


def test_head_size_of_packed_weights(tmp_path):
    onnx.save(packed_model(), tmp_path / "model.onnx")
    file = read_model_file(tmp_path)
    assert not file.ours
    assert not file.last_logits
    assert file.shares_buffers
    assert file.limits.context is None
    assert [(part.present, part.heads, part.size) for part in file.state_inputs] == [
        ("present.0.key", KV_HEADS, SIZE),
        ("present.0.value", KV_HEADS, SIZE),
    ]


def test_configuration_beside_the_file(tmp_path):
    onnx.save(packed_model(kv_heads="kv_heads", width=7, vocabulary="vocabulary"), tmp_path / "model.onnx")
    with pytest.raises(ActExportError, match="can't tell the vocabulary"):
        read_model_file(tmp_path)
    decoder = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 3}
    genai = {"model": {"context_length": 77, "vocab_size": 55, "decoder": decoder}}
    (tmp_path / "genai_config.json").write_text(json.dumps(genai))
    file = read_model_file(tmp_path)
    assert (file.vocabulary, file.limits.context) == (55, 77)
    assert {(part.heads, part.size) for part in file.state_inputs} == {(KV_HEADS, 16)}  # the attention has the say


def test_a_head_size_that_nothing_tells(tmp_path):
    onnx.save(packed_model(width=7), tmp_path / "model.onnx")
    with pytest.raises(ActExportError, match=r"can't tell the head size .* genai_config.json"):
        read_model_file(tmp_path)


def test_an_input_that_nobody_can_give(tmp_path):
    onnx.save(packed_model(extra=[("pixels", TensorProto.FLOAT, [1])]), tmp_path / "model.onnx")
    with pytest.raises(ActExportError, match="it wants pixels"):
        read_model_file(tmp_path)


def test_no_language_model(tmp_path):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", [x], [y])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    with pytest.raises(ActExportError, match="it lacks input_ids"):
        read_model_file(tmp_path)


@pytest.mark.parametrize(("text", "message"), [(None, "there is no model"), ("text", "can't read")])
def test_no_onnx_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "model.onnx").write_text(text)
    with pytest.raises(ActExportError, match=message):
        read_model_file(tmp_path)
