"""Each rewrite on small graphs: what it does, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import clean, operators, parse, run

from act_export.export.passes.cancel_reshapes import CancelReshapesPass
from act_export.export.passes.name_weights import NameWeightsPass
from act_export.export.passes.pack_projections import PackProjectionsPass
from act_export.export.passes.strip_metadata import StripMetadataPass


def test_cancel_reshapes_drops_a_round_trip():
    model = parse("""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[B, S, 24] x) => (float[B, S, 24] o)
      <int64[4] four = {0, 0, 3, 8}, int64[3] three = {0, 0, 24}> {
        y = Reshape (x, four)
        z = Reshape (y, three)
        o = Identity (z)
      }""")
    for value, shape in (("y", ["B", "S", 3, 8]), ("z", ["B", "S", 24])):
        next(n.outputs[0] for n in model.graph if n.outputs[0].name == value).shape = ir.Shape(shape)
    assert operators(clean(CancelReshapesPass()(model).model)) == ["Identity"]


@pytest.mark.parametrize("shape", [["B", "S", 12, 2], ["S", "B", 24], None, [None, None, 24]])
def test_cancel_reshapes_leaves_other_shapes_alone(shape):
    model = parse("""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[B, S, 24] x, int64[N] wanted) => (float o) { y = Reshape (x, wanted)  o = Identity (y) }""")
    next(n.outputs[0] for n in model.graph if n.op_type == "Reshape").shape = ir.Shape(shape) if shape else None
    assert not CancelReshapesPass()(model).modified


def test_name_weights():
    model = parse("""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[2, 2] x) => (float[2, 2] o)
      <float[2, 2] val_3 = {1, 2, 3, 4}, float[2, 2] val_4 = {1, 2, 3, 4}> {
        y = MatMul (x, val_3)
        o = Add (y, val_4)
      }""")
    product = next(iter(model.graph))
    product.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'wrapper.layers.0.q_proj', 'linear']"
    NameWeightsPass("wrapper.")(model)
    assert set(model.graph.initializers) == {"layers.0.q_proj.weight_transposed", "val_4"}


def test_name_weights_of_norms_and_tables():
    model = parse("""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[2, 2] x, int64[3] i) => (float[2, 2] o, float[3, 2] t)
      <float[2] add_3 = {1, 2}, float[2] add_4 = {1, 2}, float[2, 2] val_5 = {1, 2, 3, 4}> {
        y = RMSNormalization (x, add_3)
        z = RMSNormalization (y, add_4)
        o = Add (z, add_4)
        t = Gather (val_5, i)
      }""")
    for node, module in zip(model.graph, ("a.norm", "b.norm", "c", "rope"), strict=True):
        node.metadata_props["pkg.torch.onnx.name_scopes"] = f"['', '{module}', 'x']"
    NameWeightsPass("")(model)
    assert set(model.graph.initializers) == {"a.norm.scale", "add_4", "rope.table"}


def test_strip_metadata():
    model = parse('<ir_version: 10, opset_import: ["" : 23]> g (float[2] x) => (float[2] o) { o = Identity (x) }')
    node = next(iter(model.graph))
    node.metadata_props["pkg.torch"] = "a"
    node.outputs[0].metadata_props["pkg.torch"] = "b"
    node.doc_string = "c"
    StripMetadataPass()(model)
    text = ir.serde.serialize_model(model).SerializeToString()
    assert b"pkg.torch" not in text
    assert node.doc_string is None


def projections(biases=("q_b", "k_b", "v_b"), extra="") -> ir.Model:
    """With the weights `a.q.weight`, `a.k.weight` and `a.v.weight`."""
    adds = "".join(
        f"{name}o = Add ({name}p, {bias})" if bias else f"{name}o = Identity ({name}p)"
        for name, bias in zip("qkv", biases, strict=True)
    )
    model = parse(f"""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[2, 3, 2] x) => (float[2, 3, 4] q, float[2, 3, 2] k, float[2, 3, 2] v)
      <float[2, 4] q_w = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2, 2] k_w = {{1, -2, 3, -4}},
       float[2, 2] v_w = {{9, 8, 7, 6}}, float[4] q_b = {{1, 2, 3, 4}}, float[2] k_b = {{5, 6}},
       float[2] v_b = {{7, 8}}> {{
        qp = MatMul (x, q_w)
        kp = MatMul (x, k_w)
        vp = MatMul (x, v_w)
        {adds}
        {extra}
        q = Neg (qo)
        k = Neg (ko)
        v = Neg (vo)
      }}""")
    for name in "qkv":
        model.graph.initializers[f"{name}_w"].name = f"a.{name}.weight"
    return model


@pytest.mark.parametrize("biases", [("q_b", "k_b", "v_b"), ("q_b", "", "v_b"), ("", "", "")])
def test_pack_projections_keeps_the_result(biases):
    x = np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)
    expected = run(projections(biases), x=x)
    packed = PackProjectionsPass()(projections(biases)).model
    assert operators(packed).count("MatMul") == 1
    assert operators(packed).count("Add") == (1 if all(biases) else sum(map(bool, biases)))
    assert "a.q+k+v.weight" in packed.graph.initializers
    for actual, wanted in zip(run(packed, x=x), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-6)


def test_pack_projections_leaves_two_products_and_shared_weights_alone():
    assert not PackProjectionsPass()(projections(extra="again = MatMul (x, v_w)")).modified


def test_pack_projections_leaves_overridable_weights_alone():
    model = projections()
    model.graph.inputs.append(model.graph.initializers["a.k.weight"])
    assert not PackProjectionsPass()(model).modified
