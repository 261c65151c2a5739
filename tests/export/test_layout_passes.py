"""Rewrites that take reshapes and transpositions out of a graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import counts, is_left_alone, numbers, operators, parse, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st

from act_export.export.passes.constant_reshapes import ConstantReshapesPass
from act_export.export.passes.drop_transposes import DropTransposesPass
from act_export.export.passes.straighten_projections import StraightenProjectionsPass
from act_export.export.passes.unflatten_tokens import UnflattenTokensPass

SIZES = st.integers(1, 4)
SWAP = "Transpose <perm: ints = [0, 2, 1, 3]>"


def head_model(
    heads: int, half: int, rest: int, last: str = f"y = {SWAP} (joined) o = Identity (y)", extra: str = ""
) -> ir.Model:
    """A norm, a scale and a partial rotary embedding of every head, between transpositions."""
    size, rotated = 2 * half + rest, 2 * half
    return parse(
        f"""g (float[B, S, {heads}, {size}] x, float[B, S, {half}] c, float[B, S, {half}] s)
        => (float[B, Y, Z, {size}] o) {{
          t = {SWAP} (x)
          n = RMSNormalization <axis: int = -1> (t, scale)
          m = Mul (n, factors)
          first = Slice (m, zero, cut, axis)
          others = Slice (m, cut, end, axis)
          r = RotaryEmbedding <num_heads: int = {heads}> (first, c, s)
          joined = Concat <axis: int = -1> (r, others)
          {extra}
          {last}
        }}""",
        scale=numbers(size),
        factors=numbers(size, seed=1),
        zero=np.array([0]),
        cut=np.array([rotated]),
        end=np.array([2**62]),
        axis=np.array([3]),
    )


def head_feeds(batch: int, sequence: int, heads: int, half: int, rest: int) -> dict[str, np.ndarray]:
    caches = {"c": numbers(batch, sequence, half), "s": numbers(batch, sequence, half, seed=1)}
    return {"x": numbers(batch, sequence, heads, 2 * half + rest), **caches}


@settings(max_examples=10)
@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_drop_transposes_keeps_the_result(batch, sequence, heads, half, rest):
    feeds = head_feeds(batch, sequence, heads, half, rest)
    model = rewritten(head_model(heads, half, rest), DropTransposesPass(), **feeds)
    assert counts(model)["Transpose"] == 0
    rotary = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert len(rotary.inputs[0].shape) == 3
    assert rotary.attributes.get_int("num_heads", 0) == heads


@pytest.mark.parametrize(
    ("last", "extra"),
    [
        (f"p = Softmax <axis: int = 2> (joined) y = {SWAP} (p) o = Identity (y)", ""),
        (f"y = {SWAP} (joined) o = Identity (y)", "again = Softmax <axis: int = 2> (n)"),
        (f"o = {SWAP} (joined)", ""),
        ("o = Identity (joined)", ""),
    ],
    ids=["another operator", "another use", "a result of the graph", "not transposed back"],
)
def test_drop_transposes_leaves_what_needs_the_order_alone(last, extra):
    assert is_left_alone(head_model(3, 2, 1, last, extra), DropTransposesPass())


def test_drop_transposes_takes_one_that_closes_and_opens_for_one_of_both():
    model = parse(
        f"""g (float[B, S, 3, 4] x) => (float[B, Y, Z, 4] o) {{
          a = {SWAP} (x)
          b = Neg (a)
          c = {SWAP} (b)
          d = Mul (c, c)
          e = {SWAP} (d)
          f = {SWAP} (e)
          h = {SWAP} (f)
          o = Neg (h)
        }}"""
    )
    model = rewritten(model, DropTransposesPass(), x=numbers(2, 5, 3, 4))
    assert counts(model)["Transpose"] == 1


def test_drop_transposes_changes_the_axis_of_heads():
    model = parse(
        f"""g (float[B, S, 2, 4] x) => (float[B, Y, Z, 4] o) {{
          a = {SWAP} (x)
          b, c = Split <axis: int = 1, num_outputs: int = 2> (a)
          d = LayerNormalization (b, scale)
          e = Concat <axis: int = 1> (c, d)
          y = {SWAP} (e)
          o = Identity (y)
        }}""",
        scale=numbers(4),
    )
    assert counts(rewritten(model, DropTransposesPass(), x=numbers(3, 5, 2, 4)))["Transpose"] == 0


def add_user(model: ir.Model, value: ir.Value) -> None:
    """Another use of a value, the result of which is an output of the graph."""
    node = ir.node("Neg", [value])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "again", value.type, value.shape
    model.graph.append(node)
    model.graph.outputs.append(node.outputs[0])


def token_model(gemm: str, middle: str = "m = Relu (first)", extra: str = "") -> ir.Model:
    """Two linear layers, a norm and a residual on flattened tokens."""
    return parse(
        f"""g (float[B, S, 6] x, int64[3] back) => (float[B, S, 6] o) <float[N, 6] flat, float[N, 6] n,
          float[N, 5] first, float[N, 5] m, float[N, 6] second, float[N, 6] sum, float[B, S, 6] y> {{
          flat = Reshape (x, flattened)
          n = LayerNormalization <axis: int = 1> (flat, scale, offset)
          first = Gemm <{gemm}> (n, up, up_bias)
          {middle}
          second = Gemm (m, down)
          sum = Add (flat, second)
          {extra}
          y = Reshape (sum, back)
          o = Identity (y)
        }}""",
        flattened=np.array([-1, 6]),
        scale=numbers(6),
        offset=numbers(6, seed=1),
        up=numbers(5, 6) if "transB" in gemm else numbers(6, 5),
        up_bias=numbers(5),
        down=numbers(5, 6),
    )


@pytest.mark.parametrize("gemm", ["alpha: float = 1.0", "transB: int = 1"])
@settings(max_examples=5)
@given(SIZES, SIZES)
def test_unflatten_tokens_keeps_the_result(gemm, batch, sequence):
    feeds = {"x": numbers(batch, sequence, 6), "back": np.array([batch, sequence, 6])}
    model = rewritten(token_model(gemm), UnflattenTokensPass(), **feeds)
    assert operators(model) == ["LayerNormalization", "MatMul", "Add", "Relu", "MatMul", "Add", "Identity"]
    assert "up_transposed" in model.graph.initializers or "transB" not in gemm
    assert "down" in model.graph.initializers


def test_unflatten_tokens_leaves_a_weight_with_two_users_to_the_graph():
    model = token_model("transB: int = 1")
    add_user(model, model.graph.initializers["up"])
    feeds = {"x": numbers(2, 3, 6), "back": np.array([2, 3, 6])}
    model = rewritten(model, UnflattenTokensPass(), **feeds)
    assert counts(model)["Transpose"] == 1
    assert "up_transposed" not in model.graph.initializers


@pytest.mark.parametrize(
    ("gemm", "middle", "extra"),
    [
        ("alpha: float = 0.5", "m = Relu (first)", ""),
        ("alpha: float = 1.0", "m = Softmax <axis: int = 0> (first)", ""),
        ("alpha: float = 1.0", "m = Relu (first)", "again = ReduceSum (second)"),
    ],
    ids=["scaled", "mixes tokens", "another use"],
)
def test_unflatten_tokens_leaves_others_alone(gemm, middle, extra):
    assert is_left_alone(token_model(gemm, middle, extra), UnflattenTokensPass())


FUSED = {
    # How q, k, v lie in the columns, and how the graph takes them apart: (nodes, the parts that result).
    "gpt_neox": "r = Reshape (y, by_head) q, k, v = Split <axis: int = 3, num_outputs: int = 3> (r)",
    "bloom": """r = Reshape (y, by_head) r5 = Reshape (r, by_part) q = Gather <axis: int = 3> (r5, i0)
      k = Gather <axis: int = -2> (r5, i1) v = Gather <axis: int = 3> (r5, i2)""",
    "phi3": """q1 = Slice (y, n0, n6, ax2, n1) k1 = Slice (y, n6, n12, ax2, n1) v1 = Slice (y, n12, last, ax2)
      q = Reshape (q1, heads) k = Reshape (k1, heads) v = Reshape (v1, heads)""",
    "by columns": """r = Reshape (y, by_column) t = Transpose <perm: ints = [0, 1, 3, 2]> (r)
      a, b = Split <axis: int = 2> (t, two) c = Unsqueeze (b, ax2) d = Squeeze (c, ax2)
      q = Identity (a) k, v = Split <axis: int = 2, num_outputs: int = 2> (d)""",
}


def fused_model(nodes: str, bias: bool, shared: bool = False, weight: np.ndarray | None = None) -> ir.Model:
    """A product with 18 columns: 3 parts, 2 heads, size 3."""
    add = "y = Add (p, bias)" if bias else "y = Identity (p)"
    start = "y = MatMul (x, weight)" if not bias else f"p = MatMul (x, weight) {add}"
    other = "z = MatMul (x, weight) z2 = Neg (z)" if shared else "z2 = Neg (x)"
    return parse(
        f"""g (float[B, S, 4] x)
        => (float[B, S, Q, R] a1, float[B, S, T, U] b1, float[B, S, V, W] c1, float[B, S, X] z2)
        {{ {start} {nodes} a1 = Neg (q) b1 = Exp (k) c1 = Tanh (v) {other} }}""",
        weight=numbers(4, 18) if weight is None else weight,
        bias=numbers(18),
        by_head=np.array([0, 0, 2, 9]),
        by_part=np.array([0, 0, 2, 3, 3]),
        by_column=np.array([0, 0, 3, 6]),
        heads=np.array([0, 0, 2, 3]),
        two=np.array([2, 4]),
        ax2=np.array([2]),
        i0=np.array(0),
        i1=np.array(1),
        i2=np.array(2),
        n0=np.array([0]),
        n1=np.array([1]),
        n6=np.array([6]),
        n12=np.array([12]),
        last=np.array([2**62]),
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", FUSED)
def test_straighten_projections_keeps_the_result(layout, bias):
    model = rewritten(fused_model(FUSED[layout], bias), StraightenProjectionsPass(), x=numbers(2, 5, 4))
    kinds = counts(model)
    assert kinds["Split"] == 1
    assert not {"Slice", "Gather", "Transpose", "Squeeze", "Unsqueeze"} & set(kinds)
    split = next(node for node in model.graph if node.op_type == "Split")
    assert split.inputs[0].producer().op_type == ("Add" if bias else "MatMul")
    assert split.attributes.get_int("axis", 0) == -1
    assert is_left_alone(model, StraightenProjectionsPass())


def test_straighten_projections_reads_the_weight_only_when_it_is_written():
    model = fused_model(FUSED["gpt_neox"], bias=True)
    weight, reads = model.graph.initializers["weight"], []
    values = weight.const_value.numpy()

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(values, name="weight")

    weight.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape(values.shape), name="weight")
    StraightenProjectionsPass()(model)
    assert not reads
    columns = model.graph.initializers["weight"].const_value.numpy()
    assert reads == [1]
    np.testing.assert_array_equal(columns[:, :3], values[:, :3])
    np.testing.assert_array_equal(columns[:, 3:6], values[:, 9:12])


@pytest.mark.parametrize(
    ("nodes", "shared"),
    [
        (FUSED["gpt_neox"], True),
        (FUSED["phi3"].replace("(y, n6, n12", "(y, n0, n6"), False),
        (
            """q1, k1, v1 = Split <axis: int = 2, num_outputs: int = 3> (y) q = Reshape (q1, heads)
            k = Reshape (k1, heads) v = Reshape (v1, heads)""",
            False,
        ),
    ],
    ids=["a shared weight", "columns that go to two places", "already straight"],
)
def test_straighten_projections_leaves_others_alone(nodes, shared):
    assert is_left_alone(fused_model(nodes, bias=False, shared=shared), StraightenProjectionsPass())


def test_straighten_projections_copies_a_bias_that_others_have_too():
    model = fused_model(FUSED["gpt_neox"], bias=True)
    add_user(model, model.graph.initializers["bias"])
    model = rewritten(model, StraightenProjectionsPass(), x=numbers(2, 5, 4))
    assert {"bias", "bias.y"} <= set(model.graph.initializers)


def reshape_model(shape: list[int | str], target: str = "float[B, S, 3, 4]") -> ir.Model:
    model = parse(
        f"""g (float[B, S, 12] x) => ({target} o) {{
          b = Shape <start: int = 0, end: int = 1> (x)
          s = Shape <start: int = 1, end: int = 2> (x)
          to = Concat <axis: int = 0> (b, s, rest)
          y = Reshape <allowzero: int = 1> (x, to)
          o = Identity (y)
        }}""",
        rest=np.array([3, 4]),
    )
    next(node for node in model.graph if node.op_type == "Reshape").outputs[0].shape = ir.Shape(shape)
    return model


@given(st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=6)
def test_constant_reshapes_keeps_the_result(batch, sequence):
    model = rewritten(reshape_model(["B", "S", 3, 4]), ConstantReshapesPass(), x=numbers(batch, sequence, 12))
    assert operators(model) == ["Reshape", "Identity"]


@pytest.mark.parametrize("shape", [["S", "B", 3, 4], ["B", 3, "S", 4], [None, None, 3, 4], ["B", "S", 0, 4]])
def test_constant_reshapes_leaves_others_alone(shape):
    assert is_left_alone(reshape_model(shape), ConstantReshapesPass())
