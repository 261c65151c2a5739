"""The operators in ONNX Runtime, as portable functions and by the native library, against the reference."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from close import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from act_export.calibration.reference import visible_rows
from act_export.calibration.reference_operator import calibrated_attention
from act_export.ops import functions, schema
from act_export.ops.library import library_path

HEAD_SIZE = 8
RANKS = {"query": 3, "key": 3, "value": 3, "output": 3, "attention_mask": 2, "calibration": 3}
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def single_node_model(operator, attributes, dtype="float32"):
    described = schema.schema(operator)
    types = {"T": TYPES[dtype], "F": TensorProto.FLOAT, "M": TensorProto.INT64}

    def value(parameter):
        rank = RANKS.get(parameter.name, 4)
        return helper.make_tensor_value_info(parameter.name, types[parameter.type_str], [None] * rank)

    node = helper.make_node(
        operator,
        [i.name for i in described.inputs],
        [o.name for o in described.outputs],
        domain=schema.DOMAIN,
        **attributes,
    )
    graph = helper.make_graph([node], "g", [value(i) for i in described.inputs], [value(o) for o in described.outputs])
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", functions.OPSET), helper.make_opsetid(schema.DOMAIN, schema.VERSION)],
        functions=[functions.function_body(operator)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


def session(operator, attributes, dtype="float32", *, is_native=False):
    model = single_node_model(operator, attributes, dtype)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if is_native:
        options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def random_inputs(rng, *, batch, sequence, past, heads, kv_heads, calibrated, left=0, right=0, dtype=np.float32):
    def normal(*shape):
        return (2 * rng.standard_normal(shape)).astype(dtype)

    mask = np.ones((batch, past + sequence), np.int64)
    mask[-1, :left] = 0
    if right:
        mask[0, -right:] = 0
    return {
        "query": normal(batch, sequence, heads * HEAD_SIZE),
        "key": normal(batch, sequence, kv_heads * HEAD_SIZE),
        "value": normal(batch, sequence, kv_heads * HEAD_SIZE),
        "past_key": normal(batch, kv_heads, past, HEAD_SIZE),
        "past_value": normal(batch, kv_heads, past, HEAD_SIZE),
        "past_sink_scores": rng.random((batch, calibrated, past, 1), dtype=np.float32),
        "attention_mask": mask,
        "calibration": np.tile(np.array([0.4, 3.0, 0.1], np.float32), (1, calibrated, 1)),
    }


def reference(inputs, attributes, dtype=torch.float64):
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    tensors |= {name: tensors[name].to(dtype) for name in ("query", "key", "value", "past_key", "past_value")}
    return calibrated_attention(*tensors.values(), **attributes)


def undecided(inputs, attributes, result):
    """Whether a score lies within rounding of the threshold, so that either answer is right."""
    real = torch.from_numpy(inputs["attention_mask"] != 0)[:, None]
    scores = result.present_sink_scores[..., 0] / visible_rows(real, attributes["sliding_window"]).clamp(min=1)
    beta, _, tau = torch.from_numpy(inputs["calibration"])[..., None].unbind(2)
    if attributes["threshold_mode"] == "relative":
        tau = tau / real.sum(-1, keepdim=True).clamp(min=1)
    return bool(((beta != 1) & ((scores - tau).abs() < 1e-5)).any())


@st.composite
def cases(draw):
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 3]))
    calibrated = sorted(draw(st.sets(st.integers(0, heads - 1), min_size=1)))
    attributes = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": draw(st.sampled_from([0.35, 1.0])),
        "softcap": draw(st.sampled_from([0.0, 3.0])),
        "sliding_window": draw(st.sampled_from([-1, 1, 4, 50])),
        "calibrated_heads": calibrated,
        "threshold_mode": draw(st.sampled_from(["absolute", "relative"])),
    }
    sinks = st.sampled_from([-3.0, 0.0, 1.5, 4.0, 30.0, schema.NO_SINK_LOGIT])
    attributes |= draw(
        st.sampled_from([{}, {"sink_logits": [draw(sinks)]}, {"sink_logits": [draw(sinks) for _ in range(heads)]}])
    )
    sequence, past, batch = draw(st.integers(1, 9)), draw(st.integers(0, 7)), draw(st.integers(1, 3))
    strengths = st.tuples(
        st.sampled_from([0.0, 0.4, 1.0, 1.9, 2.0]),
        st.sampled_from([1 / 16, 0.5, 1.0, 1.0, 3.0, 16.0]),
        st.sampled_from([0.0, 0.1, 0.3]),
    )
    calibrations = draw(st.sampled_from([1, batch]))
    drawn = [draw(strengths) for _ in range(calibrations * len(calibrated))]
    inputs = random_inputs(
        np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        batch=batch,
        sequence=sequence,
        past=past,
        heads=heads,
        kv_heads=kv_heads,
        calibrated=len(calibrated),
        left=draw(st.integers(0, sequence + past)),
        right=draw(st.sampled_from([0, 0, 1])),
    )
    inputs["calibration"] = np.array(drawn, np.float32).reshape(calibrations, len(calibrated), 3)
    return attributes, inputs


@given(cases())
@settings(max_examples=60, deadline=None)
def test_equals_the_reference(case):
    attributes, inputs = case
    expected = reference(inputs, attributes)
    assume(not undecided(inputs, attributes, expected))
    for is_native in (False, True):
        outputs = session(schema.CALIBRATED, attributes, is_native=is_native).run(None, inputs)
        for output, wanted in zip(outputs, expected, strict=True):
            assert_close(output, wanted, 1e-5)


ATTRIBUTES = {
    "num_heads": 6,
    "kv_num_heads": 2,
    "scale": 0.35,
    "calibrated_heads": [0, 3, 4],
}
SHAPE = {"heads": 6, "kv_heads": 2, "calibrated": 3}


def test_any_nonzero_mask_value_is_a_real_token():
    inputs = random_inputs(np.random.default_rng(3), batch=2, sequence=5, past=3, left=2, **SHAPE)
    engine = session(schema.CALIBRATED, ATTRIBUTES)
    expected = engine.run(None, inputs)
    for output, wanted in zip(
        engine.run(None, inputs | {"attention_mask": 7 * inputs["attention_mask"]}), expected, strict=True
    ):
        np.testing.assert_array_equal(output, wanted)


def test_strengths_out_of_range_are_taken_for_the_nearest():
    inputs = random_inputs(np.random.default_rng(6), batch=2, sequence=5, past=3, left=2, **SHAPE)
    engine = session(schema.CALIBRATED, ATTRIBUTES)
    for given_as, taken_as in (([-1, 0, -1], [0, 1 / 16, 0]), ([3, 100, 0.1], [2, 16, 0.1])):
        outputs, expected = (
            engine.run(None, inputs | {"calibration": np.tile(np.array(each, np.float32), (1, 3, 1))})
            for each in (given_as, taken_as)
        )
        for output, wanted in zip(outputs, expected, strict=True):
            np.testing.assert_array_equal(output, wanted)


def test_heads_without_a_learned_sink_are_as_if_there_were_none():
    inputs = random_inputs(np.random.default_rng(4), batch=2, sequence=5, past=3, left=2, **SHAPE)
    expected = session(schema.CALIBRATED, ATTRIBUTES).run(None, inputs)
    none = session(schema.CALIBRATED, ATTRIBUTES | {"sink_logits": [schema.NO_SINK_LOGIT] * 6}).run(None, inputs)
    for output, wanted in zip(none, expected, strict=True):
        np.testing.assert_array_equal(output, wanted)
    mixed = ATTRIBUTES | {"sink_logits": [2.0, *[schema.NO_SINK_LOGIT] * 5]}
    output, *_ = session(schema.CALIBRATED, mixed).run(None, inputs)
    np.testing.assert_array_equal(output[..., HEAD_SIZE:], expected[0][..., HEAD_SIZE:])
    assert np.abs(output - expected[0])[..., :HEAD_SIZE].max() > 0.1


@pytest.mark.parametrize("opset", [15, 17, 18, 21])
@pytest.mark.parametrize("operator", [schema.CALIBRATED, schema.PLAIN])
def test_learned_sinks_in_models_of_other_opsets(operator, opset):
    attributes = {key: ATTRIBUTES[key] for key in ("num_heads", "kv_num_heads", "scale")}
    if operator == schema.CALIBRATED:
        attributes = dict(ATTRIBUTES)
    attributes["sink_logits"] = [0.5, -1.0, 2.0, 0.0, 3.0, -0.2]
    inputs = random_inputs(np.random.default_rng(5), batch=2, sequence=5, past=3, left=2, **SHAPE)
    model = single_node_model(operator, attributes)
    model.opset_import[0].version = opset
    del model.functions[:]
    model.functions.append(functions.function_body(operator, opset))
    engine = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = engine.run(None, {i.name: inputs[i.name] for i in engine.get_inputs()})
    if operator == schema.PLAIN:
        inputs["calibration"] = inputs["calibration"][:, :0]
    for output, wanted in zip(outputs, reference(inputs, attributes), strict=False):
        assert_close(output, wanted, 1e-5)


def test_plain_operator_equals_the_reference():
    attributes = {key: ATTRIBUTES[key] for key in ("num_heads", "kv_num_heads", "scale")}
    inputs = random_inputs(np.random.default_rng(0), batch=2, sequence=5, past=3, left=2, **SHAPE)
    expected = reference({**inputs, "calibration": inputs["calibration"][:, :0]}, attributes)
    del inputs["past_sink_scores"], inputs["calibration"]
    outputs = session(schema.PLAIN, attributes).run(None, inputs)
    for output, wanted in zip(outputs, expected[:3], strict=True):
        assert_close(output, wanted, 1e-5)


def test_preallocated_buffers_keep_their_length():
    rng = np.random.default_rng(1)
    exact = random_inputs(rng, batch=2, sequence=3, past=4, **SHAPE)
    spare = dict(exact)
    for name in ("past_key", "past_value", "past_sink_scores"):
        filler = rng.standard_normal((2, exact[name].shape[1], 6, exact[name].shape[3])).astype(np.float32)
        spare[name] = np.concatenate([exact[name], filler], 2)
    engine = session(schema.CALIBRATED, ATTRIBUTES)
    for short, long in zip(engine.run(None, exact)[1:], engine.run(None, spare)[1:], strict=True):
        assert (short.shape[2], long.shape[2]) == (7, 10)
        np.testing.assert_array_equal(long[:, :, :7], short)
    np.testing.assert_array_equal(engine.run(None, exact)[0], engine.run(None, spare)[0])


def test_float16_computes_in_float32():
    inputs = random_inputs(np.random.default_rng(2), batch=2, sequence=5, past=3, left=2, dtype=np.float16, **SHAPE)
    expected = reference(inputs, ATTRIBUTES, torch.float16)
    outputs = session(schema.CALIBRATED, ATTRIBUTES, "float16").run(None, inputs)
    for output, wanted in zip(outputs, expected, strict=True):
        assert output.dtype == wanted.numpy().dtype
        assert_close(output, wanted, 2e-3)


def with_float32_inputs_and_outputs(model):
    """Casts around a bfloat16 model: numpy has no bfloat16."""
    graph = model.graph
    for values, suffix in ((graph.input, "_given"), (graph.output, "_wanted")):
        for value in values:
            if value.type.tensor_type.elem_type != TensorProto.BFLOAT16:
                continue
            inner, value.name = value.name, value.name + suffix
            value.type.tensor_type.elem_type = TensorProto.FLOAT
            if suffix == "_given":
                graph.node.insert(0, helper.make_node("Cast", [value.name], [inner], to=TensorProto.BFLOAT16))
            else:
                graph.node.append(helper.make_node("Cast", [inner], [value.name], to=TensorProto.FLOAT))
    return model


def test_bfloat16_computes_in_float32():
    inputs = random_inputs(np.random.default_rng(2), batch=2, sequence=5, past=3, left=2, **SHAPE)
    state = ("past_sink_scores", "attention_mask", "calibration")
    tensors = {
        name: torch.from_numpy(value) if name in state else torch.from_numpy(value).bfloat16()
        for name, value in inputs.items()
    }
    expected = calibrated_attention(*tensors.values(), **ATTRIBUTES)
    model = with_float32_inputs_and_outputs(single_node_model(schema.CALIBRATED, ATTRIBUTES, "bfloat16"))
    engine = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        name if name in state else name + "_given": (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        for name, tensor in tensors.items()
    }
    for output, wanted in zip(engine.run(None, feeds), expected, strict=True):
        assert_close(output, wanted, 2e-2)


@pytest.mark.parametrize("operator", [schema.CALIBRATED, schema.PLAIN])
def test_defaults_travel_with_the_function(operator):
    function = functions.function_body(operator)
    defaults = {a.name: helper.get_attribute_value(a) for a in function.attribute_proto}
    wanted = schema.attribute_defaults(operator)
    assert {k: v.decode() if isinstance(v, bytes) else v for k, v in defaults.items()} == wanted
    assert set(function.attribute) | set(wanted) == set(schema.attribute_names(operator))


def test_registering_schemas_twice_is_harmless():
    schema.register_schemas()
    schema.register_schemas()
    assert onnx.defs.has(schema.CALIBRATED, schema.DOMAIN)
