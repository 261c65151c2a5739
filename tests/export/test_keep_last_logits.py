"""Logits of the last positions: the same numbers as all of them, whatever makes them, on as few positions as can be."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from close import assert_logits_close
from tiny import CALIBRATION, ROUTED, tiny_checkpoint

from act_export.errors import ActExportError
from act_export.export import build_model
from act_export.export.passes.keep_last_logits import KeepLastLogitsPass
from act_export.ops.library import library_path

LENGTH = 5
# A head behind a norm, and what models put between or after them.
TAILS = {
    "head": "logits = MatMul (n, head)",
    "tied": "t = Transpose <perm: ints = [1, 0]> (rows)  logits = MatMul (n, t)",
    "bias": "p = MatMul (n, head)  logits = Add (p, bias)",
    "cap": "p = MatMul (n, head)  d = Div (p, cap)  u = Tanh (d)  logits = Mul (cap, u)",
    "scale": "p = MatMul (n, head)  logits = Mul (p, flat)",
    "centred": "m = ReduceMean (n, last)  c = Sub (n, m)  logits = MatMul (c, head)",
    "split": "l, r = Split <axis: int = -1> (n, halves)  g = Sigmoid (l)  h = Mul (g, r)  logits = MatMul (h, low)",
    "other axis": "l, r = Split <axis: int = 2> (n, halves)  logits = Softmax <axis: int = 2> (l)",
}
# What mixes positions, or isn't known not to: the slice must come after it.
MIXING = {
    "softmax over positions": "logits = Softmax <axis: int = 1> (n)",
    "mean over positions": "m = ReduceMean (n, middle)  logits = Sub (n, m)",
    "sum over positions": "p = MatMul (n, head)  logits = CumSum (p, one)",
    "product with itself": "t = Transpose <perm: ints = [0, 2, 1]> (n)  y = MatMul (n, t)  logits = MatMul (y, n)",
    "an unknown operator": "logits = Hardmax <axis: int = 1> (n)",
}


def language_model(tail: str, outputs: str = "") -> ir.Model:
    """Two streams that mix positions, as the last attention and its residual do, and a tail that makes logits."""
    text = f"""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[B, S, 4] x) => (float[B, S, V] logits{outputs})
      <int64 one = {{1}}, int64[1] last = {{-1}}, int64[1] middle = {{1}}, int64[2] halves = {{2, 2}},
       float[4] gain = {{1, 2, 3, 4}}, float cap = {{2}}, float[1, 1, 3] flat = {{1, -2, 3}},
       float[3] bias = {{1, 2, 3}},
       float[4, 3] head = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}}, float[2, 3] low = {{1, 2, 3, -1, 2, -3}},
       float[3, 4] rows = {{3, 2, 1, 4, 5, 6, 7, 9, 8, 1, 2, -3}}> {{
        attended = CumSum (x, one)
        residual = Sin (x)
        h0 = Add (residual, attended)
        n = RMSNormalization (h0, gain)
        {tail}
      }}"""
    model = onnx.parser.parse_model(text)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def run(model: ir.Model, outputs: tuple[str, ...] = ("logits",), **given) -> list[np.ndarray]:
    x = np.random.default_rng(0).standard_normal((2, LENGTH, 4)).astype(np.float32)
    serialized = ir.serde.serialize_model(model)
    onnx.checker.check_model(serialized, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(serialized.SerializeToString(), options)
    return session.run(list(outputs), {"x": x} | {name: np.array(value) for name, value in given.items()})


def kept_lengths(model: ir.Model) -> dict[str, bool]:
    """By result (batch, positions, anything): whether it is of the kept positions alone."""
    rows = [(str(node.outputs[0].name), node.outputs[0].shape) for node in model.graph]
    return {name: shape[1] == "logits_length" for name, shape in rows if shape is not None and len(shape) == 3}


@pytest.mark.parametrize("count", [None, 0, 1, 3, LENGTH, LENGTH + 2])
@pytest.mark.parametrize("tail", [*TAILS.values(), *MIXING.values()], ids=[*TAILS, *MIXING])
def test_the_last_logits_are_the_last_of_all(tail, count):
    (everything,) = run(language_model(tail))
    model = KeepLastLogitsPass()(language_model(tail)).model
    (logits,) = run(model) if count is None else run(model, logits_to_keep=count)
    assert_logits_close(logits, everything[:, -count:] if count else everything, 5e-6)
    assert model.graph.outputs[0].name == "logits"
    assert model.graph.outputs[0].shape[1] == "logits_length"


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_all_after_the_mixing_runs_on_the_kept_positions(tail):
    kept = kept_lengths(KeepLastLogitsPass()(language_model(tail)).model)
    assert not kept.pop("attended")
    assert not kept.pop("residual")
    assert all(kept.values()), kept


@pytest.mark.parametrize("tail", MIXING.values(), ids=MIXING)
def test_nothing_before_a_mixing_is_cut(tail):
    kept = kept_lengths(KeepLastLogitsPass()(language_model(tail)).model)
    assert not kept["h0"]
    assert not kept["n"]


def test_results_with_other_uses_stay_whole():
    model = language_model(TAILS["bias"], outputs=", float[B, S, 4] n")
    everything, whole = run(model, ("logits", "n"))
    logits, hidden = run(KeepLastLogitsPass()(model).model, ("logits", "n"), logits_to_keep=1)
    np.testing.assert_array_equal(hidden, whole)
    assert_logits_close(logits, everything[:, -1:], 1e-6)


def test_the_input_need_not_be_given():
    model = ir.serde.serialize_model(KeepLastLogitsPass()(language_model(TAILS["head"])).model)
    given = next(value for value in model.graph.input if value.name == "logits_to_keep")
    assert (given.type.tensor_type.elem_type, list(given.type.tensor_type.shape.dim)) == (onnx.TensorProto.INT64, [])
    default = next(tensor for tensor in model.graph.initializer if tensor.name == "logits_to_keep")
    assert onnx.numpy_helper.to_array(default) == 0


@pytest.mark.parametrize("shape", [None, ("B", 3), ("B", 5, 3), ("B", None, 3), (None, "S", 3)])
def test_logits_without_a_variable_number_of_positions_are_refused(shape):
    model = language_model(TAILS["head"])
    model.graph.outputs[0].shape = None if shape is None else ir.Shape(shape)
    with pytest.raises(ActExportError, match=r"logits have shape .*expected \(batch, sequence, vocabulary\)"):
        KeepLastLogitsPass()(model)


def test_a_graph_without_logits_is_refused():
    model = language_model(TAILS["head"])
    model.graph.outputs[0].name = "scores"
    with pytest.raises(ActExportError, match="logits have shape None"):
        KeepLastLogitsPass()(model)


def test_an_input_of_this_name_is_refused():
    model = KeepLastLogitsPass()(language_model(TAILS["head"])).model
    with pytest.raises(ActExportError, match="has an input logits_to_keep already"):
        KeepLastLogitsPass()(model)


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
@pytest.mark.parametrize("level", onnxruntime.GraphOptimizationLevel.__members__.values(), ids=str)
def test_no_optimization_takes_the_default_for_a_constant(tiny_file, native, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.log_severity_level = 3
    if native:
        options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(str(tiny_file), options)
    assert "logits_to_keep" not in [given.name for given in session.get_inputs()]
    optional = {given.name: (given.type, given.shape) for given in session.get_overridable_initializers()}
    assert optional["logits_to_keep"] == ("tensor(int64)", [])
    sizes = {"batch_size": 2, "sequence_length": 7, "total_sequence_length": 7, "past_sequence_length": 0}
    feeds = {}
    for given in session.get_inputs():
        shape = [sizes.get(size, size) for size in given.shape]
        feeds[given.name] = np.ones(shape, np.int64 if given.type == "tensor(int64)" else np.float32)
    feeds["input_ids"] = np.random.default_rng(0).integers(3, 200, (2, 7))
    (everything,) = session.run(["logits"], feeds)
    assert everything.shape[1] == 7
    for count in (1, 3, 9):
        (logits,) = session.run(["logits"], feeds | {"logits_to_keep": np.array(count)})
        assert_logits_close(logits, everything[:, -count:], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ROUTED)
def test_every_architecture_multiplies_the_kept_positions_with_its_vocabulary(architecture, tmp_path):
    path = tmp_path / "model.onnx"
    build_model(tiny_checkpoint(architecture), CALIBRATION, path)
    onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True, data_prop=True)
    graph = ir.load(path).graph
    vocabulary = graph.outputs[0].shape[-1]
    shapes = [node.outputs[0].shape for node in graph if node.op_type == "MatMul"]
    assert [shape[1] for shape in shapes if shape is not None and shape[-1] == vocabulary] == ["logits_length"]
