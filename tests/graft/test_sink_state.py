"""Sink state as layers of the cache: the functions against numpy, what halves keep of it, long runs and rewinding."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from close import assert_logits_close
from foreign_models import CALIBRATION, Decoder, prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper

from act_export.graft import StateLayout
from act_export.graft.job import graft
from act_export.graft.sink_state import (
    Dimensions,
    StateNames,
    cache_layer_names,
    count_rows,
    functions_of,
    load_scores,
    score_names,
    store_scores,
)
from act_export.onnx_file.node_builder import NodeBuilder
from act_export.runtime import Session

TEMPLATES = ("past.%d.key", "past.%d.value", "present.%d.key", "present.%d.value")
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SIZES = {"float32": 1, "float16": 1, "bfloat16": 2}
KEPT = {"float32": (2**-24, 0.0), "float16": (2**-22, 2**-25), "bfloat16": (2**-23, 2**-100)}
"""How far the parts of a mean may be from it: relatively, or at least absolutely."""

HEADS = 3


@lru_cache(32)
def session(kind: str, dtype: str, window: int = -1, opset: int = 22) -> onnxruntime.InferenceSession:
    """One of the three nodes as a model of its own, with everything float32 outside of it."""
    build = NodeBuilder()
    names = cache_layer_names(TEMPLATES, 7, HEADS, TYPES[dtype], Dimensions())
    casts = [helper.make_node("Cast", [f"{name}.float"], [name], to=TYPES[dtype]) for name in names.past]
    inputs = {f"{name}.float": TensorProto.FLOAT for name in names.past}
    if kind == "count":
        inputs |= {"mask": TensorProto.INT64, "tokens": TensorProto.INT64}
        outputs = count_rows(build, "mask", names.past[0], "tokens", window, "rows")
    elif kind == "load":
        inputs["rows"] = TensorProto.FLOAT
        outputs = (load_scores(build, names, "rows", TYPES[dtype]),)
    else:
        inputs |= {"sums": TensorProto.FLOAT, "rows": TensorProto.FLOAT}
        store_scores(build, "sums", names, "rows", TYPES[dtype])
        back = [helper.make_node("Cast", [name], [f"{name}.float"], to=TensorProto.FLOAT) for name in names.present]
        outputs = tuple(node.output[0] for node in back)
        build.nodes += back
    graph = helper.make_graph(
        [*casts, *build.nodes],
        kind,
        [helper.make_tensor_value_info(name, element_type, None) for name, element_type in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("act", 1)],
        functions=functions_of(build.nodes, opset),
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(kind: str, dtype: str = "float32", window: int = -1, opset: int = 22, **feeds: Any) -> list[np.ndarray]:
    found = session(kind, dtype, window, opset)
    batch, *_ = next(iter(feeds.values())).shape
    empty = np.zeros((batch, HEADS, 0, SIZES[dtype]), np.float32)
    given = {each.name: feeds.get(each.name, empty) for each in found.get_inputs()}
    return found.run(None, given)


def store(sums: np.ndarray, rows: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    high, low = run("store", dtype, sums=sums, rows=rows)
    return high, low


def load(high: np.ndarray, low: np.ndarray, rows: np.ndarray, dtype: str) -> np.ndarray:
    (sums,) = run("load", dtype, rows=rows, **{"past.7.key.float": high, "past.7.value.float": low})
    return sums


def count(mask: np.ndarray, sequence: int, buffer: int, window: int, opset: int = 22) -> list[np.ndarray]:
    batch = mask.shape[0]
    state = {f"past.7.{part}.float": np.zeros((batch, HEADS, buffer, 1), np.float32) for part in ("key", "value")}
    return run("count", window=window, opset=opset, mask=mask, tokens=np.zeros((batch, sequence), np.int64), **state)


def rows_of(mask: np.ndarray, length: int, window: int) -> np.ndarray:
    """Real rows that see each column, row by row."""
    found = np.zeros((mask.shape[0], 1, length, 1), np.float32)
    for sequence, real in enumerate(mask):
        for column in range(min(length, len(real))):
            last = len(real) if window < 0 else min(len(real), column + window)
            found[sequence, 0, column, 0] = real[column:last].sum()
    return found


@settings(max_examples=60)
@given(
    mask=arrays.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 12)), elements=st.integers(0, 1)),
    new=st.integers(1, 12),
    room=st.sampled_from([0, 0, 1, 5]),
    window=st.sampled_from([-1, 1, 2, 5, 40]),
    opset=st.sampled_from([15, 22]),
)
def test_rows_are_counted(mask: np.ndarray, new: int, room: int, window: int, opset: int) -> None:
    """`room` 0: buffers that grow; else buffers longer than what is in them after the call, or just as long."""
    total = mask.shape[1]
    new = min(new, total)
    buffer = total - new if room == 0 else total + room - 1
    before, after = count(mask, new, buffer, window, opset)
    assert before.shape == (len(mask), 1, buffer, 1)
    assert after.shape == (len(mask), 1, max(total, buffer), 1)
    np.testing.assert_array_equal(before, rows_of(mask[:, : total - new], buffer, window))
    np.testing.assert_array_equal(after, np.maximum(rows_of(mask, max(total, buffer), window), 1))


@pytest.mark.parametrize("dtype", TYPES)
def test_parts_as_numpy_makes_them(dtype: str) -> None:
    random = np.random.default_rng(0)
    rows = random.integers(1, 4000, (2, 1, 50, 1)).astype(np.float32)
    sums = random.uniform(0, 1, (2, HEADS, 50, 1)).astype(np.float32) * rows
    high, low = store(sums, rows, dtype)
    kind, rest, parts = NUMPY[dtype], sums / rows, []
    for _ in range(2 * SIZES[dtype]):
        parts.append(rest.astype(kind).astype(np.float32))
        rest = rest - parts[-1]
    if SIZES[dtype] == 2:
        parts[3] = np.zeros_like(rest)  # three are enough
    np.testing.assert_array_equal(np.concatenate([high, low], -1), np.concatenate(parts, -1))
    np.testing.assert_array_equal(high.astype(kind).astype(np.float32), high)


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(list(TYPES)),
    rows=arrays.arrays(np.float32, (2, 1, 9, 1), elements=st.integers(1, 100_000).map(float)),
    means=arrays.arrays(np.float32, (2, HEADS, 9, 1), elements=st.floats(0, 1, width=32, allow_subnormal=False)),
)
def test_sums_come_back(dtype: str, rows: np.ndarray, means: np.ndarray) -> None:
    sums = means * rows
    found = load(*store(sums, rows, dtype), rows, dtype)
    relative, absolute = KEPT[dtype]
    exact = sums.astype(np.float64)
    rounding = 2**-22 * exact  # of the division and the product
    allowed = np.maximum(relative * exact, absolute * rows) + rounding
    assert (np.abs(found - exact) <= allowed).all()


def test_halves_keep_what_decides_about_sinks() -> None:
    """Sink scores from 0.06 up, where thresholds lie: to 2**-20 of them, large ones to 2**-21."""
    rows = np.full((1, 1, 1000, 1), 7777, np.float32)
    sums = np.linspace(0.06, 1, 3000, dtype=np.float32).reshape(1, HEADS, 1000, 1) * rows
    for dtype in ("float16", "bfloat16"):
        found = load(*store(sums, rows, dtype), rows, dtype)
        assert (np.abs(found - sums.astype(np.float64)) <= 2**-20 * sums).all()
        large = sums / rows >= 0.125
        assert (np.abs(found - sums.astype(np.float64))[large] <= 2**-21 * sums[large]).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_sums_dont_drift(dtype: str) -> None:
    """Ten thousand steps, each a load, a sum and a store, as the functions do them; against float64."""
    kind, steps = NUMPY[dtype], 10_000
    random = np.random.default_rng(1)
    start = random.uniform(0.02, 0.9, 64)
    exact = start * 100
    mean = start.astype(np.float32)
    for step in range(100, 100 + steps):
        new = random.uniform(0, 2 * start).clip(0, 1)
        exact += new
        sums = parts_of(mean, kind) * np.float32(step) + new.astype(np.float32)
        mean = sums / np.float32(step + 1)
    assert np.abs(mean - exact / (100 + steps)).max() < 1e-5


def parts_of(mean: np.ndarray, kind: Any) -> np.ndarray:
    """What is left of float32 numbers after they were stored."""
    if kind is np.float32:
        return mean
    first = mean.astype(kind).astype(np.float32)
    second = (mean - first).astype(kind).astype(np.float32)
    third = (mean - first - second).astype(kind).astype(np.float32) if kind is ml_dtypes.bfloat16 else 0
    return first + second + third


def test_the_simulation_stores_as_the_functions_do() -> None:
    mean = np.random.default_rng(2).uniform(0, 1, (1, HEADS, 100, 1)).astype(np.float32)
    ones = np.ones((1, 1, 100, 1), np.float32)
    for dtype, kind in NUMPY.items():
        np.testing.assert_array_equal(load(*store(mean, ones, dtype), ones, dtype), parts_of(mean, kind))


@pytest.mark.parametrize("dtype", TYPES)
def test_means_stay_after_tokens_were_taken_back(dtype: str) -> None:
    """Of 20 columns 12 remain: each weighs as many rows as remain, with the mean that it had."""
    mask = np.ones((2, 20), np.int64)
    mask[1, 9:13] = 0
    (_, rows) = count(mask, 20, 0, -1)
    sums = np.random.default_rng(3).uniform(0, 1, (2, HEADS, 20, 1)).astype(np.float32) * rows
    high, low = store(sums, rows, dtype)
    shorter = np.concatenate([mask[:, :12], np.ones((2, 1), np.int64)], 1)
    before, _ = count(shorter, 1, 12, -1)
    found = load(high[:, :, :12], low[:, :, :12], before, dtype)
    real = np.broadcast_to(mask[:, None, :12, None] != 0, found.shape)
    means = (sums / rows)[:, :, :12]
    np.testing.assert_allclose((found / np.maximum(before, 1))[real], means[real], rtol=2e-6, atol=2**-25)
    np.testing.assert_array_equal(before, rows_of(mask[:, :12], 12, -1))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_a_run_keeps_the_sums_of_a_state_of_its_own(dtype: str, native: bool, tmp_path: Path) -> None:
    """Prompt, chunk and steps of a grafted folder, whose state is layers of the cache, beside the other layout."""
    folder = Decoder(element_type=TYPES[dtype], windows=(-1, 9)).save_folder(tmp_path / "in")
    hidden = graft(folder, CALIBRATION, tmp_path / "layers").path
    plain = graft(folder, CALIBRATION, tmp_path / "scores", layout=StateLayout.SCORES).path
    tokens, lengths = prompt(60), (13, 6, *[1] * 41)
    with (
        Session.open(hidden, native=native, threads=1) as layers,
        Session.open(plain, native=native, threads=1) as scores,
    ):
        state, expected, end = None, None, 0
        for length in lengths:
            ids, mask = np.array([tokens[end : end + length]]), np.ones((1, end + length), np.int64)
            logits, state = layers.run(ids, mask, state)
            wanted, expected = scores.run(ids, mask, expected)
            end += length
            assert_logits_close(logits, wanted, 2e-5)
    for layer, window, index in ((0, -1, 2), (1, 9, 3)):
        parts = state[f"past_key_values.{index}.key"], state[f"past_key_values.{index}.value"]
        means = sum(part.astype(np.float32) for part in parts)
        sums = means * rows_of(np.ones((1, 60), np.int64), 60, window)
        np.testing.assert_allclose(sums, expected[f"past_sink_scores.{layer}"], rtol=1e-5, atol=1e-5)


def test_names_and_shapes() -> None:
    assert score_names(4, 2, Dimensions()).past == ("past_sink_scores.4",)
    assert score_names(4, 2, Dimensions()).present == ("present_sink_scores.4",)
    for dtype, size in SIZES.items():
        names = cache_layer_names(TEMPLATES, 30, 2, TYPES[dtype], Dimensions("rows"))
        assert names.past == ("past.30.key", "past.30.value")
        assert names.present == ("present.30.key", "present.30.value")
        assert {shape_of(info) for info in names.infos} == {
            ("rows", 2, length, size) for length in ("past_sequence_length", "total_sequence_length")
        }
        assert {info.type.tensor_type.elem_type for info in names.infos} == {TYPES[dtype]}


def shape_of(info: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_value or dim.dim_param for dim in info.type.tensor_type.shape.dim)


def test_functions_are_given_once() -> None:
    build = NodeBuilder()
    names = StateNames(("a", "b"), ("c", "d"), ())
    for _ in range(2):
        load_scores(build, names, "rows", TensorProto.BFLOAT16)
        store_scores(build, "sums", names, "rows", TensorProto.BFLOAT16)
    assert [function.name for function in functions_of(build.nodes, 22)] == ["LoadSinkScores3", "StoreSinkScores3"]
