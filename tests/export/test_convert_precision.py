"""Half precision: which values are rounded, which stay float32, and what can't be stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from tiny import CALIBRATION, ROUTED, tiny_checkpoint

from act_export.checkpoint.placement import Placement
from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.export.passes.convert_precision import ConvertPrecisionPass
from act_export.verify.parity.job import verify_file

HALVES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# Grouped heads, and float32 where it matters: caps, scaled embeddings, norms on heads, a mean of its own, no rotation.
REPRESENTATIVES = ("llama", "gemma2", "qwen3", "cohere2", "gpt2")


def parse(body: str, constants: str = "") -> ir.Model:
    """A graph of activations `x`, positions `p`, a table of weights and logits."""
    text = f"""
      <ir_version: 10, opset_import: ["" : 23]>
      g (int64[B, S] ids, int64[B, S, 1] p) => (float[B, S, 4] logits)
      <float[9, 4] table = {{{", ".join(map(str, range(36)))}}}, float[4] freq = {{1, 0.1, 0.01, 0.001}},
       float[4, 4] head = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}}, float cap = {{3}}{constants}> {{
        {body}
      }}"""
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def converted(body: str, constants: str = "", dtype: ir.DataType = ir.DataType.FLOAT16) -> ir.Model:
    model = ConvertPrecisionPass(dtype)(parse(body, constants)).model
    onnx.checker.check_model(ir.serde.serialize_model(model), full_check=True)
    return model


def stored(model: ir.Model) -> dict[str, str]:
    """Type of each float value by name."""
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    floats = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
    return {str(value.name): floats[value.dtype] for value in values if value.dtype in floats}


def casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


POSITIONS = """
  x = Gather (table, ids)
  f = Cast <to: int = 1> (p)
  angle = Mul (f, freq)
  c = Cos (angle)
  y = Mul (x, c)
  z = Mul (y, c)
  logits = MatMul (z, head)
"""


@pytest.mark.parametrize("name", HALVES)
def test_positions_stay_float32_and_are_rounded_once(name):
    model = converted(POSITIONS, dtype=HALVES[name])
    types = stored(model)
    assert {types[value] for value in ("f", "angle", "c", "freq", "logits")} == {"float32"}
    assert {types[value] for value in ("x", "y", "z", "table", "head")} == {name}
    assert casts(model) == 3  # of positions, of their cosines, of the logits


def test_the_result_is_that_of_the_rounded_weights():
    model = converted(POSITIONS)
    feeds = {"ids": np.array([[3, 8]]), "p": np.array([[[1], [2]]])}
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    (logits,) = session.run(None, feeds)
    cos = np.cos(feeds["p"] * np.float32([1, 0.1, 0.01, 0.001])).astype(np.float16)
    rows = np.arange(36).reshape(9, 4)[feeds["ids"]] * cos.astype(np.float64) ** 2
    assert logits.dtype == np.float32
    np.testing.assert_allclose(
        logits, rows @ parse(POSITIONS).graph.initializers["head"].const_value.numpy(), rtol=3e-3
    )


def test_a_cap_of_logits_stays_float32():
    model = converted(
        "x = Gather (table, ids)  m = MatMul (x, head)  d = Div (m, cap)  t = Tanh (d)  logits = Mul (t, cap)"
    )
    types = stored(model)
    assert {types[name] for name in ("d", "t", "logits", "cap")} == {"float32"}
    assert types["m"] == "float16"
    assert casts(model) == 1


def test_a_bias_of_logits_is_a_weight():
    model = converted(
        "x = Gather (table, ids)  m = MatMul (x, head)  logits = Add (m, bias)", ", float[4] bias = {1, 2, 3, 4}"
    )
    assert stored(model)["bias"] == "float16"
    assert model.graph.outputs[0].name == "logits"
    assert stored(model)["logits"] == "float32"


def test_a_constant_that_both_types_read_gets_a_copy():
    model = converted("x = Gather (table, ids)  y = Mul (x, cap)  m = MatMul (y, head)  logits = Mul (m, cap)")
    types = stored(model)
    assert (types["cap"], types["cap.float16"]) == ("float32", "float16")


def test_weights_that_are_turned_around_first():
    model = converted("x = Gather (table, ids)  h = Transpose <perm: ints = [1, 0]> (head)  logits = MatMul (x, h)")
    assert {stored(model)[name] for name in ("head", "h")} == {"float16"}
    model = converted(
        """x = Gather (table, ids)  f = Cast <to: int = 1> (p)  w = Unsqueeze (freq, zero)  angle = Mul (f, w)
           y = Add (x, angle)  logits = MatMul (y, head)""",
        ", int64[1] zero = {0}",
    )
    assert {stored(model)[name] for name in ("freq", "w", "angle")} == {"float32"}


@pytest.mark.parametrize(("value", "shown"), [(70000.0, "70000"), (-65520.0, "-65520"), (np.inf, "inf")])
def test_a_weight_too_large_for_float16(value, shown):
    model = parse("x = Gather (table, ids)  logits = MatMul (x, head)")
    weights = np.ones((4, 4), np.float32)
    weights[2, 1] = value
    model.graph.initializers["head"].const_value = ir.tensor(weights)
    ConvertPrecisionPass(ir.DataType.FLOAT16)(model)
    with pytest.raises(ActExportError, match=rf"head has the value {shown}.*--dtype bfloat16"):
        model.graph.initializers["head"].const_value.numpy()


def test_the_largest_float16_fits():
    model = parse("x = Gather (table, ids)  logits = MatMul (x, head)")
    model.graph.initializers["head"].const_value = ir.tensor(np.full((4, 4), 65504, np.float32))
    ConvertPrecisionPass(ir.DataType.FLOAT16)(model)
    assert (model.graph.initializers["head"].const_value.numpy() == 65504).all()


def test_a_graph_inside_an_operator_is_refused():
    branch = "() => (float[B, S, 4] a) { a = Identity (x) }"
    model = parse(
        f"x = Gather (table, ids)  y = If (flag) <then_branch = t {branch}, else_branch = e {branch}>"
        "  logits = MatMul (y, head)",
        ", bool flag = {1}",
    )
    with pytest.raises(ActExportError, match="operator If with a graph inside"):
        ConvertPrecisionPass(ir.DataType.FLOAT16)(model)


def test_a_value_of_unknown_type_is_refused():
    model = parse("x = Gather (table, ids)  logits = MatMul (x, head)")
    model.graph[0].outputs[0].type = None
    with pytest.raises(ActExportError, match="type of x, a result of Gather, isn't known"):
        ConvertPrecisionPass(ir.DataType.FLOAT16)(model)


# The usual one in both types, and what differs from it: soft caps, norms of their own, no rotary embedding.
QUICK = [("llama", "float16"), ("llama", "bfloat16"), ("gemma2", "bfloat16"), ("gpt2", "float16")]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("architecture", "dtype"), QUICK)
def test_representative_architectures(architecture, dtype, tmp_path):
    checkpoint = tiny_checkpoint(architecture)
    path = tmp_path / "model.onnx"
    build_model(checkpoint, CALIBRATION, path, dtype=dtype)
    report = verify_file(path, checkpoint, CALIBRATION)
    assert report.passed, report
    assert report.precision == dtype
    assert bool(report.remark) == (dtype == "bfloat16")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.fixture(scope="module")
def halves(tiny, tmp_path_factory) -> dict[str, Path]:
    """The tiny model in each type."""
    folder = tmp_path_factory.mktemp("halves")
    for dtype in HALVES:
        build_model(tiny, CALIBRATION, folder / f"{dtype}.onnx", dtype=dtype)
    return {dtype: folder / f"{dtype}.onnx" for dtype in HALVES}


def test_types_of_inputs_and_outputs(halves):
    graph = onnx.load(halves["bfloat16"], load_external_data=False).graph
    types = {value.name: value.type.tensor_type.elem_type for value in [*graph.input, *graph.output]}
    for name, found in types.items():
        if name.startswith(("past_key_values", "present.")):
            assert found == onnx.TensorProto.BFLOAT16
        elif "sink_scores" in name or name in ("logits", "calibration"):
            assert found == onnx.TensorProto.FLOAT
        else:
            assert found == onnx.TensorProto.INT64


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_those_that_pytorch_rounds(dtype, tiny, halves):
    graph = onnx.load(halves[dtype]).graph
    tensor = next(tensor for tensor in graph.initializer if "down_proj" in tensor.name)
    weight = tiny.model.model.layers[0].mlp.down_proj.weight.T
    expected = weight.to(getattr(torch, dtype)).float().numpy()
    numpy_type = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    found = np.frombuffer(tensor.raw_data, numpy_type).reshape(weight.shape)
    np.testing.assert_array_equal(found.astype(np.float32), expected)


@pytest.mark.in_turn(2)
def test_no_layer_has_a_cast(tmp_path):
    checkpoint = tiny_checkpoint("gemma2")
    nodes = {}
    for dtype in ("float32", "float16"):
        build_model(checkpoint, CALIBRATION, tmp_path / f"{dtype}.onnx", dtype=dtype)
        graph = onnx.load(tmp_path / f"{dtype}.onnx", load_external_data=False).graph
        nodes[dtype] = Counter(node.op_type for node in graph.node)
    assert nodes["float16"] - nodes["float32"] == {"Cast": 3}  # cosines, sines, logits
    assert not nodes["float32"] - nodes["float16"]


def test_weights_take_half_the_room(tiny_file, halves):
    sizes = [path.with_name(f"{path.name}.data").stat().st_size for path in (halves["float16"], tiny_file)]
    assert sizes[0] <= 0.51 * sizes[1]


def test_an_overflow_leaves_nothing_and_names_the_weight(tmp_path):
    checkpoint = tiny_checkpoint()
    checkpoint.model.model.embed_tokens.weight[3, 5] = 1e5
    with pytest.raises(ActExportError, match=r"lm_head\.weight has the value 100000; float16 goes up to 65504"):
        build_model(checkpoint, None, tmp_path / "m.onnx", dtype="float16")
    build_model(checkpoint, None, tmp_path / "m.onnx", dtype="bfloat16")


def test_other_types_are_refused(tiny, tmp_path):
    with pytest.raises(ActExportError, match="dtype is 'int2'; an export must be one of float32, float16, bfloat16"):
        build_model(tiny, None, tmp_path / "m.onnx", dtype="int2")


def test_a_model_loaded_in_a_half_type_is_refused(tmp_path):
    checkpoint = tiny_checkpoint()
    Placement("float16").apply(checkpoint.model, "tiny")
    with pytest.raises(ActExportError, match="loaded as float16; an export starts from float32"):
        build_model(checkpoint, None, tmp_path / "m.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype"), [(name, half) for name in ROUTED for half in HALVES if (name, half) not in QUICK]
)
def test_every_architecture(architecture, dtype, tmp_path):
    checkpoint = tiny_checkpoint(architecture)
    build_model(checkpoint, CALIBRATION, tmp_path / "m.onnx", dtype=dtype)
    report = verify_file(tmp_path / "m.onnx", checkpoint, CALIBRATION)
    assert report.passed, report
