"""Rewrites that put one operator in the place of several."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphs import counts, is_left_alone, numbers, operators, parse, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st

from act_export.export.passes.fuse_layer_norm import FuseLayerNormPass
from act_export.export.passes.fuse_partial_rotary import FusePartialRotaryPass
from act_export.export.passes.fuse_rotary import FuseRotaryPass
from act_export.export.passes.fuse_tanh_gelu import FuseTanhGeluPass
from act_export.export.passes.gather_rows import GatherRowsPass

SIZES = st.integers(1, 3)
PAIRS = """p1 = Slice (x, n1, end, ax, n2) m = Neg (p1) p2 = Slice (x, n0, end, ax, n2) u1 = Unsqueeze (m, minus)
  u2 = Unsqueeze (p2, minus) st = Concat <axis: int = -1> (u1, u2) turned = Reshape (st, whole)"""
HALVES = """p1 = Slice (x, half, end, ax) m = Neg (p1) p2 = Slice (x, n0, half, ax, n1)
  turned = Concat <axis: int = -1> (m, p2)"""
SUM = "xc = Mul (x, cos) ts = Mul (sin, turned) y = Add (ts, xc)"
PARTS = """x1, x2 = Split <axis: int = -1, num_outputs: int = 2> (x) a = Mul (x1, cos) b = Mul (x2, sin) d = Sub (a, b)
  e = Mul (x2, cos) f = Mul (x1, sin) h = Add (f, e) y = Concat <axis: int = -1> (d, h)"""
CACHES = {
    # Cosines and sines (B, S, size), or (B, S, size / 2) for the parts of a head, of angles (B, S, size / 2).
    "halves": "twice = Concat <axis: int = -1> (angles, angles) cw = Cos (twice) sw = Sin (twice)",
    "scaled": """twice = Concat <axis: int = -1> (angles, angles) c0 = Cos (twice) s0 = Sin (twice)
      cw = Mul (c0, factor) sw = Mul (factor, s0)""",
    "pairs": """a1 = Unsqueeze (angles, minus) a2 = Expand (a1, two) twice = Reshape (a2, flat) cw = Cos (twice)
      sw = Sin (twice)""",
    "pairs of halves": """t = Concat <axis: int = -1> (angles, angles) ct = Cos (t) stt = Sin (t)
      cf = Slice (ct, n0, half, n2) c1 = Unsqueeze (cf, minus) c2 = Expand (c1, two) cw = Reshape (c2, flat)
      sf = Slice (stt, n0, half, n2) s1 = Unsqueeze (sf, minus) s2 = Expand (s1, two) sw = Reshape (s2, flat)""",
    "parts": "cw = Cos (angles) sw = Sin (angles)",
    "different": """others = Neg (angles) twice = Concat <axis: int = -1> (angles, others) cw = Cos (twice)
      sw = Sin (twice)""",
}


def rotary_model(caches: str, rotation: str, heads: int, half: int, heads_axis: int = 1) -> ir.Model:
    """A rotation of (B, heads, S, size), or of (B, S, heads, size) with 2 as the axis of heads."""
    shape = ["B", "S", str(2 * half)]
    shape.insert(heads_axis, str(heads))
    text = ", ".join(shape)
    return parse(
        f"""g (float[{text}] x, float[B, S, {half}] angles) => (float[{text}] o)
          <float[{text}] y, float[{text}] turned, float[B, S, {2 * half}] twice, float[B, S, {half}, 2] a2,
          float[B, S, {half}, 2] c2, float[B, S, {half}, 2] s2>
        {{ {caches} cos = Unsqueeze (cw, heads_axis) sin = Unsqueeze (sw, heads_axis) {rotation} o = Identity (y) }}""",
        n0=np.array([0]),
        n1=np.array([1]),
        n2=np.array([2]),
        ax=np.array([3]),
        end=np.array([2**62]),
        minus=np.array([-1]),
        half=np.array([half]),
        two=np.array([1, 1, 1, 2]),
        flat=np.array([0, 0, 2 * half]),
        whole=np.array([0, 0, 0, 2 * half]) if heads_axis == 1 else np.array([0, 0, heads, 2 * half]),
        factor=np.array(1.3, np.float32),
        heads_axis=np.array([heads_axis]),
    )


FORMS = [("halves", HALVES + SUM), ("scaled", HALVES + SUM), ("pairs", PAIRS + SUM), ("parts", PARTS)]
FORMS.append(("pairs of halves", PAIRS + SUM))


@pytest.mark.parametrize(("caches", "rotation"), FORMS, ids=[name for name, _ in FORMS])
@settings(max_examples=6)
@given(SIZES, SIZES, st.integers(1, 4), SIZES, st.sampled_from([1, 2]))
def test_fuse_rotary_keeps_the_result(caches, rotation, batch, sequence, heads, half, heads_axis):
    model = rotary_model(CACHES[caches], rotation.replace(")", ") "), heads, half, heads_axis)
    shape = [batch, sequence, 2 * half]
    shape.insert(heads_axis, heads)
    model = rewritten(model, FuseRotaryPass(), x=numbers(*shape), angles=numbers(batch, sequence, half))
    kinds = counts(model)
    assert kinds["RotaryEmbedding"] == kinds["Cos"] == kinds["Sin"] == 1
    assert not {"Neg", "Slice", "Expand", "Unsqueeze", "Concat", "Transpose"} & set(kinds)
    rotary = next(node for node in model.graph if node.op_type == "RotaryEmbedding")
    assert rotary.attributes.get_int("interleaved", 0) == ("pairs" in caches)


@pytest.mark.parametrize(
    ("caches", "rotation"),
    [
        ("different", HALVES + SUM),
        ("halves", PAIRS + SUM),
        ("pairs", HALVES + SUM),
        ("halves", HALVES.replace("Neg (p1)", "Abs (p1)") + SUM),
        ("halves", HALVES.replace("(m, p2)", "(p2, m)") + SUM),
        ("halves", HALVES + SUM.replace("Add", "Sub")),
        ("parts", PARTS.replace("Sub (a, b)", "Sub (b, a)")),
        ("parts", PARTS.replace("(d, h)", "(h, d)")),
        ("parts", PARTS.replace("Mul (x1, sin)", "Mul (x1, cos)")),
    ],
)
def test_fuse_rotary_leaves_other_rotations_alone(caches, rotation):
    assert is_left_alone(rotary_model(CACHES[caches], rotation.replace(")", ") "), 3, 2), FuseRotaryPass())


def partial_model(first: str = "n0, cut", others: str = "cut, end", size: int = 7) -> ir.Model:
    return parse(
        f"""g (float[B, S, 3, {size}] x, float[B, S, 2] c, float[B, S, 2] s) => (float[B, S, 3, N] o) {{
          a = Slice (x, {first}, axis)
          b = Slice (x, {others}, axis)
          flat = Reshape (a, three)
          r = RotaryEmbedding <num_heads: int = 3, interleaved: int = 1> (flat, c, s)
          back = Reshape (r, four)
          y = Concat <axis: int = 3> (back, b)
          o = Identity (y)
        }}""",
        n0=np.array([0]),
        n1=np.array([1]),
        cut=np.array([4]),
        five=np.array([5]),
        end=np.array([2**62]),
        axis=np.array([-1]),
        three=np.array([0, 0, 12]),
        four=np.array([0, 0, 3, 4]),
    )


@settings(max_examples=6)
@given(SIZES, SIZES, st.integers(5, 9))
def test_fuse_partial_rotary_keeps_the_result(batch, sequence, size):
    feeds = {"c": numbers(batch, sequence, 2), "s": numbers(batch, sequence, 2, seed=1)}
    x = numbers(batch, sequence, 3, size)
    model = rewritten(partial_model(size=size), FusePartialRotaryPass(), x=x, **feeds)
    assert operators(model) == ["Reshape", "RotaryEmbedding", "Reshape", "Identity"]


@pytest.mark.parametrize(("first", "others"), [("n1, five", "cut, end"), ("n0, cut", "five, end")])
def test_fuse_partial_rotary_leaves_other_parts_alone(first, others):
    assert is_left_alone(partial_model(first, others), FusePartialRotaryPass())


def norm_model(mean: str = "ReduceMean <keepdims: int = 1> (x, axes)", axes: int = -1) -> ir.Model:
    return parse(
        f"""g (float[B, S, 6] x) => (float[B, S, 6] o) {{
          mean = {mean}
          c = Sub (x, mean)
          y = RMSNormalization <axis: int = -1, epsilon: float = 0.01> (c, scale)
          o = Identity (y)
        }}""",
        axes=np.array([axes]),
        scale=numbers(6),
    )


@settings(max_examples=4)
@given(SIZES, SIZES, st.sampled_from([-1, 2]))
def test_fuse_layer_norm_keeps_the_result(batch, sequence, axes):
    model = rewritten(norm_model(axes=axes), FuseLayerNormPass(), x=numbers(batch, sequence, 6))
    assert operators(model) == ["LayerNormalization", "Identity"]


@pytest.mark.parametrize("model", [norm_model(axes=1), norm_model("ReduceMax <keepdims: int = 1> (x, axes)")])
def test_fuse_layer_norm_leaves_others_alone(model):
    assert is_left_alone(model, FuseLayerNormPass())


GELUS = {
    "gpt2": """a = Mul (x, h) b = Pow (x, three) c = Mul (b, k) d = Add (x, c) e = Mul (d, root) f = Tanh (e)
      j = Add (f, one) y = Mul (a, j)""",
    "bloom": """b = Mul (k, x) c = Mul (b, x) d = Add (one, c) r = Mul (root, x) e = Mul (r, d) f = Tanh (e)
      j = Add (one, f) a = Mul (x, h) y = Mul (a, j)""",
    "halved last": """b = Pow (x, three) c = Mul (b, k) d = Add (x, c) e = Mul (d, root) f = Tanh (e) j = Add (f, one)
      a = Mul (x, j) y = Mul (h, a)""",
}


def gelu_model(form: str, k: float = 0.044715) -> ir.Model:
    scalars = {"h": 0.5, "three": 3.0, "k": k, "root": np.sqrt(2 / np.pi), "one": 1.0}
    return parse(
        f"g (float[B, S] w) => (float[B, S] o) {{ x = Add (w, bias) {form} o = Identity (y) }}",
        bias=numbers(5),
        **{name: np.array(value, np.float32) for name, value in scalars.items()},
    )


@pytest.mark.parametrize("form", GELUS)
def test_fuse_tanh_gelu_keeps_the_result(form):
    model = rewritten(gelu_model(GELUS[form]), FuseTanhGeluPass(), w=4 * numbers(30, 5))
    assert operators(model) == ["Add", "Gelu", "Identity"]


@pytest.mark.parametrize(
    "model",
    [
        gelu_model(GELUS["gpt2"], k=0.0447),
        gelu_model(GELUS["gpt2"].replace("Mul (x, h)", "Mul (w, h)")),
        gelu_model(GELUS["gpt2"].replace("Add (f, one)", "Add (f, h)")),
        gelu_model("c = Tanh (x) d = Mul (c, root) y = Mul (d, x)"),
    ],
    ids=["another constant", "of two values", "another sum", "a cap"],
)
def test_fuse_tanh_gelu_leaves_others_alone(model):
    assert is_left_alone(model, FuseTanhGeluPass())


def lookup_model(axis: int, attributes: str = "") -> ir.Model:
    return parse(
        f"""g (float[7, 4] table, int64[B, S] at) => (float[B, Y, N] o) {{
          i = Unsqueeze (at, axis)
          y = GatherND {attributes} (table, i)
          o = Identity (y)
        }}""",
        axis=np.array([axis]),
    )


@settings(max_examples=4)
@given(SIZES, SIZES, st.sampled_from([-1, 2]))
def test_gather_rows_keeps_the_result(batch, sequence, axis):
    at = np.arange(batch * sequence).reshape(batch, sequence) % 7
    model = rewritten(lookup_model(axis), GatherRowsPass(), table=numbers(7, 4), at=at)
    assert operators(model) == ["Gather", "Identity"]


def test_gather_rows_leaves_other_lookups_alone():
    assert is_left_alone(
        parse("g (float[7, 4] t, int64[B, 1] i) => (float[B, 4] o) { y = GatherND (t, i) o = Identity (y) }"),
        GatherRowsPass(),
    )
