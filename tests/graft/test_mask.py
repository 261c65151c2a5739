"""Masks of operators are taken for what they compute, and refused if that is something else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from operator_writer import inputs_of_tokens, write_mask

from act_export.graft import UnsupportedPatternError
from act_export.graft.graph import Graph
from act_export.graft.mask import visible
from act_export.graft.operator_mask import MaskReader, OperatorMask
from act_export.graft.probe import Call
from act_export.onnx_file.node_builder import NodeBuilder

CACHE = helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, ["batch", 32, "past", 128])


def reader(build: NodeBuilder, *weights: np.ndarray) -> MaskReader:
    tables = [numpy_helper.from_array(array, f"weight{number}") for number, array in enumerate(weights)]
    graph = helper.make_graph(build.nodes, "masks", [*inputs_of_tokens(), CACHE], [], tables)
    return MaskReader(Graph(graph, [helper.make_opsetid("", 18)]))


def read(mask: str, window: int = -1, sees: str = "", heads: int = 1, **more) -> int:
    build = NodeBuilder("/model/")
    names = write_mask(build, mask, window, sees, heads)
    return reader(build).read(OperatorMask(**names, **more)).sliding_window


@pytest.mark.parametrize("mask", ["float", "bool"])
@given(window=st.one_of(st.just(-1), st.integers(1, 40), st.sampled_from([512, 4096, 8192])))
@settings(max_examples=12, deadline=None)
def test_windows(mask: str, window: int) -> None:
    assert read(mask, window) == window


def test_a_causal_operator_needs_only_padding() -> None:
    assert read("padding", causal=True) == -1
    assert read("keys", causal=True, lowest=-10000.0) == -1
    assert read("bool", 7, causal=True) == 7


def test_squares_take_no_chunks() -> None:
    build = NodeBuilder("/model/")
    names = write_mask(build, "squares", -1, heads=3)
    found = reader(build).read(OperatorMask(**names))
    assert (found.sliding_window, found.takes_chunks) == (-1, False)
    build = NodeBuilder("/model/")
    names = write_mask(build, "float", -1)
    assert reader(build).read(OperatorMask(**names)).takes_chunks


def test_a_mask_is_read_once() -> None:
    build = NodeBuilder("/model/")
    masks, mask = OperatorMask(**write_mask(build, "float", 5)), reader(build)
    assert mask.read(masks) is mask.read(masks)


@pytest.mark.parametrize(
    ("mask", "sees", "more", "message"),
    [
        ("bool", "later", {}, "isn't that of causal attention"),
        ("float", "padding", {}, "isn't that of causal attention"),
        ("bool", "a position more", {}, "isn't that of causal attention"),
        ("float", "distance", {}, "differs between heads"),
        ("padding", "", {}, "isn't that of causal attention"),
        ("keys", "", {}, "isn't that of causal attention"),
        ("keys", "", {"causal": True, "lowest": -10.0}, "isn't that of causal attention"),
        ("padding", "", {"causal": True, "own_cache": False}, "isn't that of causal attention"),
        ("none", "", {"causal": True}, "takes padding for tokens"),
        ("none", "", {}, "sees later tokens"),
    ],
)
def test_other_masks_are_refused(mask: str, sees: str, more: dict, message: str) -> None:
    with pytest.raises(UnsupportedPatternError, match=message) as raised:
        read(mask, sees=sees, heads=3, **more)
    if mask != "none":
        assert "/model/" in str(raised.value)


def test_a_bias_of_positions_that_is_the_same_for_all_heads_is_refused() -> None:
    with pytest.raises(UnsupportedPatternError, match="something else is done to them"):
        read("float", sees="distance", heads=1)


def _of_weights(build: NodeBuilder) -> str:
    return build.add("Add", [write_mask(build, "float", -1)["added"], "weight0"], "learned")


def _of_cache(build: NodeBuilder) -> str:
    small = build.add("ReduceMax", ["past_key_values.0.key"], "largest", keepdims=0)
    return build.add("Add", [write_mask(build, "float", -1)["added"], small], "of_cache")


def _of_integers(build: NodeBuilder) -> str:
    return build.add("Cast", [write_mask(build, "bool", -1)["added"]], "integers", to=TensorProto.INT32)


def _of_one_length(build: NodeBuilder) -> str:
    return build.constant(np.zeros((1, 1, 4, 4), np.float32), "constant")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_of_weights, "depends on the weights 'weight0'"),
        (_of_cache, "/model/of_cache"),
        (_of_integers, "type int32"),
        (_of_one_length, "doesn't fit 2 new of 2 tokens"),
    ],
)
def test_masks_of_other_things_are_refused(write: Callable[[NodeBuilder], str], message: str) -> None:
    build = NodeBuilder("/model/")
    name = write(build)
    with pytest.raises(UnsupportedPatternError, match=message):
        reader(build, np.zeros((1, 5 << 20), np.float32)).read(OperatorMask(added=name))


def test_two_masks_add_up() -> None:
    build = NodeBuilder("/model/")
    names = {**write_mask(build, "float", 6, "padding"), **write_mask(build, "keys", -1)}
    masks = reader(build)
    assert masks.read(OperatorMask(**names, lowest=-10000.0)).sliding_window == 6
    with pytest.raises(UnsupportedPatternError, match="isn't that of causal attention"):
        masks.read(OperatorMask(**names, lowest=-10.0))


def test_lengths_of_keys_are_refused() -> None:
    build = NodeBuilder("/model/")
    count = build.add("ReduceSum", ["attention_mask", build.constant([1], "axis")], "count", keepdims=0)
    name = build.add("Cast", [count], "lengths", to=TensorProto.INT32)
    with pytest.raises(UnsupportedPatternError, match=r"key padding mask has shape \(1,\)"):
        reader(build).read(OperatorMask(keys=name, causal=True))


@given(st.data())
def test_visible_is_what_the_words_say(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 12))
    sequence = data.draw(st.integers(1, total))
    window = data.draw(st.sampled_from([-1, 1, 2, 5]))
    mask = np.array([data.draw(st.lists(st.integers(0, 1), min_size=total, max_size=total))])
    found = visible(Call(mask, sequence), window)
    for row in range(sequence):
        for column in range(total):
            position = total - sequence + row
            near = window < 0 or position - column < window
            assert found[0, row, column] == (mask[0, column] == 1 and column <= position and near)
