"""Each rewrite on small graphs: what it does, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime
import pytest

from act_export.export.passes.cancel_reshapes import CancelReshapesPass
from act_export.export.passes.flatten_rotary import FlattenRotaryPass
from act_export.export.passes.name_weights import NameWeightsPass
from act_export.export.passes.pack_projections import PackProjectionsPass
from act_export.export.passes.strip_metadata import StripMetadataPass


def parse(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, **feeds):
    session = onnxruntime.InferenceSession(ir.serde.serialize_model(model).SerializeToString())
    return session.run(None, feeds)


def clean(model: ir.Model) -> ir.Model:
    return common.RemoveUnusedNodesPass()(model).model


def rotary_model(extra_use: bool = False, rotary_dim: int = 0) -> ir.Model:
    half = (rotary_dim or 8) // 2
    attributes = f"<rotary_embedding_dim: int = {rotary_dim}, num_heads: int = 3>"
    extra = "o2 = Identity (r)" if extra_use else "o2 = Identity (y)"
    rank = "[2, 3, 5, 8]" if extra_use else "[2, 5, 3, 8]"
    return parse(f"""
      <ir_version: 10, opset_import: ["" : 23]>
      g (float[2, 5, 24] x, float[2, 5, {half}] c, float[2, 5, {half}] s) => (float[2, 5, 24] o, float{rank} o2)
      <int64[4] four = {{2, 5, 3, 8}}, int64[3] three = {{2, 5, 24}}> {{
        y = Reshape (x, four)
        t = Transpose <perm: ints = [0, 2, 1, 3]> (y)
        r = RotaryEmbedding {attributes} (t, c, s)
        b = Transpose <perm: ints = [0, 2, 1, 3]> (r)
        o = Reshape (b, three)
        {extra}
      }}""")


@pytest.mark.parametrize("rotary_dim", [0, 4])
def test_flatten_rotary_keeps_the_result(rotary_dim):
    rng = np.random.default_rng(0)
    half = (rotary_dim or 8) // 2
    feeds = {
        "x": rng.standard_normal((2, 5, 24)).astype(np.float32),
        "c": rng.standard_normal((2, 5, half)).astype(np.float32),
        "s": rng.standard_normal((2, 5, half)).astype(np.float32),
    }
    before = run(rotary_model(rotary_dim=rotary_dim), **feeds)
    model = clean(FlattenRotaryPass()(rotary_model(rotary_dim=rotary_dim)).model)
    assert "Transpose" not in operators(model)
    for new, old in zip(run(model, **feeds), before, strict=True):
        np.testing.assert_allclose(new, old, atol=1e-6)


def test_flatten_rotary_leaves_other_uses_alone():
    model = rotary_model(extra_use=True)
    assert not FlattenRotaryPass()(model).modified
    assert operators(model).count("Transpose") == 2


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
