"""onnxscript's rule for pairs of Slices finds what it found, and isn't asked where it can find nothing."""

from __future__ import annotations

import graphs
import onnx_ir as ir
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnxscript.optimizer import optimize_ir
from onnxscript.rewriter.rules import common

from act_export.export.slice_pairs import quick_slice_pairs

LAST = 2**63 - 1  # as torch writes the end of x[..., n:]


def sliced(size: int, *ranges: tuple[int, int], axis: int = -1, layers: int = 1) -> ir.Model:
    """Slices of the last axis of x, which all layers take and add up."""
    lines = []
    for layer in range(layers):
        for index, (begin, end) in enumerate(ranges):
            name = f"{layer}_{index}"
            lines += [
                f"b{name} = Constant <value_ints: ints = [{begin}]> ()",
                f"e{name} = Constant <value_ints: ints = [{end}]> ()",
                f"a{name} = Constant <value_ints: ints = [{axis}]> ()",
                f"y{name} = Slice (x, b{name}, e{name}, a{name})",
                f"z{name} = Relu (y{name})",
            ]
    results = ", ".join(
        f"float[N, {len(range(size)[begin:end])}] z{layer}_{index}"
        for layer in range(layers)
        for index, (begin, end) in enumerate(ranges)
    )
    return graphs.parse(f"g (float[N, {size}] x) => ({results}) {{ {' '.join(lines)} }}")


def optimized(model: ir.Model) -> bytes:
    optimize_ir(model)
    return ir.to_proto(model).SerializeToString(deterministic=True)


@settings(max_examples=30)
@example(size=8, cuts=[(0, 4), (4, 8)], axis=1)
@example(size=8, cuts=[(4, 8), (0, 4)], axis=-1)
@example(size=9, cuts=[(0, 4), (0, 4), (4, 9)], axis=-1)
@example(size=8, cuts=[(0, 4), (4, LAST)], axis=-1)
@given(
    size=st.integers(1, 6),
    cuts=st.lists(st.tuples(st.integers(0, 3), st.integers(3, 6)), min_size=1, max_size=4),
    axis=st.sampled_from([1, -1]),
)
def test_the_graph_is_the_rules_own(size, cuts, axis):
    expected = optimized(sliced(size, *cuts, axis=axis))
    with quick_slice_pairs():
        assert optimized(sliced(size, *cuts, axis=axis)) == expected


def test_halves_are_split_still():
    """The rule knows them where the second comes first."""
    with quick_slice_pairs():
        model = sliced(8, (4, 8), (0, 4))
        optimize_ir(model)
    assert graphs.operators(model).count("Split") == 1


@pytest.mark.parametrize(("ends", "searches"), [(LAST, False), (8, True)])
def test_rotary_embeddings_are_not_searched(monkeypatch, ends, searches):
    """They have an end for each of their halves that the rule doesn't know; its name is still the optimizer's."""
    asked: list[ir.Node] = []
    search = common.slice_split_rule.match
    monkeypatch.setattr(
        common.slice_split_rule, "match", lambda *given, **rest: [asked.append(given[2]), search(*given, **rest)][1]
    )
    with quick_slice_pairs():
        optimized(sliced(8, (4, ends), (0, 4), layers=3))
    assert bool(asked) == searches
    assert all(node.op_type == "Slice" for node in asked)
    optimized(sliced(8, (4, ends), (0, 4), layers=3))
    assert any(node.op_type == "Relu" for node in asked)


def test_the_rule_is_left_as_it_was():
    with pytest.raises(KeyError), quick_slice_pairs():
        raise KeyError
    assert "try_rewrite" not in vars(common.slice_split_rule)


def test_an_onnxscript_without_the_rule(monkeypatch):
    monkeypatch.delattr(common, "slice_split_rule")
    with quick_slice_pairs():
        optimized(sliced(8, (0, 4), (4, 8)))
