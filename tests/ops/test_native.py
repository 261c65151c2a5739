"""The native library in ONNX Runtime against a float64 loop over the definition."""

import multiprocessing
import resource
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import act_export.ops
from act_export.calibration.reference import calibrated_attention
from act_export.ops import functions
from act_export.ops.library import LibraryNotFoundError, library_path
from act_export.ops.schema import NO_SINK_LOGIT

STORAGE = {
    "float32": (TensorProto.FLOAT, np.float32, 1e-5),
    "float16": (TensorProto.FLOAT16, np.float16, 2e-3),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 1.6e-2),
}


@dataclass(frozen=True)
class Layer:
    """Attributes of one node. No calibrated heads: the operator `Attention`."""

    num_heads: int = 4
    kv_num_heads: int = 2
    head_size: int = 8
    scale: float = 0.35
    softcap: float = 0.0
    sliding_window: int = -1
    calibrated_heads: tuple[int, ...] = (0, 3)
    beta: tuple[float, ...] = (0.4,)
    threshold: float = 0.1
    threshold_mode: str = "absolute"
    sink_logits: tuple[float, ...] = ()

    @property
    def operator(self):
        return "CalibratedAttention" if self.calibrated_heads else "Attention"

    @property
    def attributes(self):
        names = ["num_heads", "kv_num_heads", "scale", "softcap", "sliding_window"]
        if self.calibrated_heads:
            names += ["calibrated_heads", "beta", "threshold", "threshold_mode"]
        if self.sink_logits:
            names += ["sink_logits"]
        return {name: getattr(self, name) for name in names}

    @property
    def input_names(self):
        sinks = ["past_sink_scores"] if self.calibrated_heads else []
        return ["query", "key", "value", "past_key", "past_value", *sinks, "attention_mask"]

    @property
    def output_names(self):
        sinks = ["present_sink_scores"] if self.calibrated_heads else []
        return ["output", "present_key", "present_value", *sinks]


# ---------------------------------------------------------------------------------------------------------------------
# The definition, in float64.


@dataclass
class Expected:
    """Outputs, and whether float32 may rightly decide otherwise about a sink or a row."""

    output: np.ndarray
    present_key: np.ndarray
    present_value: np.ndarray
    present_sink_scores: np.ndarray
    ambiguous: bool
    later_sinks: int
    clamped_rows: int


def append(past, new, past_length):
    """(B, S, KV * D) appended to the first past_length positions of (B, KV, capacity, D)."""
    batch, heads, capacity, size = past.shape
    sequence = new.shape[1]
    present = np.zeros((batch, heads, max(capacity, past_length + sequence), size), past.dtype)
    present[:, :, :capacity] = past
    present[:, :, past_length : past_length + sequence] = new.reshape(batch, sequence, heads, size).swapaxes(1, 2)
    return present


def visible(layer, mask_row, position):
    first = max(0, position - layer.sliding_window + 1) if layer.sliding_window > 0 else 0
    return [j for j in range(first, position + 1) if mask_row[j]]


def expect(layer, feeds):
    query, key, value = (feeds[name].astype(np.float64) for name in ("query", "key", "value"))
    mask = feeds["attention_mask"]
    batch, sequence, _ = query.shape
    total = mask.shape[1]
    past = total - sequence
    keys = append(feeds["past_key"].astype(np.float64), key, past)
    values = append(feeds["past_value"].astype(np.float64), value, past)
    size, value_size = keys.shape[3], values.shape[3]
    queries = query.reshape(batch, sequence, layer.num_heads, size)
    output = np.zeros((batch, sequence, layer.num_heads, value_size))
    sums = np.zeros((batch, len(layer.calibrated_heads), keys.shape[2], 1))
    if layer.calibrated_heads:
        sums[:, :, : feeds["past_sink_scores"].shape[2]] = feeds["past_sink_scores"]
    found = Expected(output.reshape(batch, sequence, layer.num_heads * value_size), keys, values, sums, False, 0, 0)

    for b in range(batch):
        real = [j for j in range(total) if mask[b, j]]
        for h in range(layer.num_heads):
            kv_head = h // (layer.num_heads // layer.kv_num_heads)
            attention = np.zeros((sequence, total))
            for i in range(sequence):
                columns = visible(layer, mask[b], past + i)
                if columns:
                    logits = layer.scale * keys[b, kv_head, columns] @ queries[b, i, h]
                    if layer.softcap > 0:
                        logits = layer.softcap * np.tanh(logits / layer.softcap)
                    sink = np.float64(layer.sink_logits[h % len(layer.sink_logits)] if layer.sink_logits else -np.inf)
                    highest = max(logits.max(), sink)
                    weights = np.exp(logits - highest)
                    attention[i, columns] = weights / (weights.sum() + np.exp(sink - highest))

            if h in layer.calibrated_heads:
                c = layer.calibrated_heads.index(h)
                beta = np.float64(np.float32(layer.beta[c if len(layer.beta) > 1 else 0]))
                column_sums = sums[b, c, :total, 0]
                column_sums[past:] = 0
                for i in range(sequence):
                    if mask[b, past + i]:
                        column_sums += attention[i]
                attention = calibrate(layer, beta, attention, column_sums, real, found)
            output[b, :, h] = attention @ values[b, kv_head, :total]
    return found


def calibrate(layer, beta, attention, column_sums, real, found):
    tau = np.float64(np.float32(layer.threshold))
    if layer.threshold_mode == "relative" and real:
        tau /= len(real)
    sinks = []
    for j in real[1:]:
        rows = sum(1 for r in real if r >= j and (layer.sliding_window <= 0 or r < j + layer.sliding_window))
        score = column_sums[j] / max(rows, 1)
        found.ambiguous |= abs(score - tau) < 1e-5
        if score > tau:
            sinks.append(j)
    found.later_sinks += len(sinks)

    others = [j for j in range(attention.shape[1]) if j not in sinks]
    calibrated = attention.copy()
    for i in range(len(attention)):
        s, n = attention[i, sinks].sum(), attention[i, others].sum()
        found.ambiguous |= 3e-7 < n < 3e-6
        if n <= 1e-6:
            continue
        if (beta - 1) * s > n:
            found.clamped_rows += 1
            calibrated[i, sinks] *= 1 + n / s
            calibrated[i, others] = 0
        else:
            calibrated[i, sinks] *= beta
            calibrated[i, others] *= 1 + (1 - beta) * s / n
    return calibrated


# ---------------------------------------------------------------------------------------------------------------------
# One node in ONNX Runtime.


def make_model(layer, storage="float32", shapes=None, attributes=None, cast=True, omit=None):
    """One node between float32 graph inputs and outputs (`cast`), or inputs and outputs in its own storage type."""
    kind = STORAGE[storage][0]
    kinds = dict.fromkeys(layer.input_names + layer.output_names, kind)
    kinds |= {"past_sink_scores": TensorProto.FLOAT, "present_sink_scores": TensorProto.FLOAT}
    kinds |= {"attention_mask": TensorProto.INT64}
    casts = [
        name for name in layer.input_names + layer.output_names if cast and kinds[name] == kind != TensorProto.FLOAT
    ]
    inside = {name: f"{name}_{storage}" if name in casts else name for name in kinds}
    attributes = layer.attributes if attributes is None else attributes
    given = ["" if name == omit else inside[name] for name in layer.input_names]
    outputs = [inside[name] for name in layer.output_names]
    node = helper.make_node(layer.operator, given, outputs, domain="act", **attributes)
    before = [helper.make_node("Cast", [n], [inside[n]], to=kind) for n in layer.input_names if n in casts]
    after = [helper.make_node("Cast", [inside[n]], [n], to=TensorProto.FLOAT) for n in layer.output_names if n in casts]

    def info(name):
        outer = TensorProto.FLOAT if name in casts else kinds[name]
        return helper.make_tensor_value_info(name, outer, (shapes or {}).get(name))

    graph = helper.make_graph(
        [*before, node, *after],
        "one_node",
        [info(name) for name in layer.input_names],
        [info(name) for name in layer.output_names],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("act", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def make_session(model):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@lru_cache(maxsize=64)
def session_of(layer, storage="float32"):
    return make_session(make_model(layer, storage))


def run(layer, feeds, storage="float32"):
    fed = {n: v if n == "attention_mask" else v.astype(np.float32) for n, v in feeds.items() if n in layer.input_names}
    return dict(zip(layer.output_names, session_of(layer, storage).run(layer.output_names, fed), strict=True))


def make_feeds(layer, mask, sequence, seed=0, storage="float32", spare=0, gain=1.0, value_size=None):
    """Random feeds for `mask` (B, T); the cache holds T - sequence tokens and has room for `spare` more."""
    rng = np.random.default_rng(seed)
    mask = np.asarray(mask, np.int64)
    batch, total = mask.shape
    past = total - sequence
    value_size = value_size or layer.head_size

    def draw(*shape):
        return (gain * rng.standard_normal(shape)).astype(STORAGE[storage][1])

    sums = rng.random((batch, len(layer.calibrated_heads), past + spare, 1), np.float32)
    return {
        "query": draw(batch, sequence, layer.num_heads * layer.head_size),
        "key": draw(batch, sequence, layer.kv_num_heads * layer.head_size),
        "value": draw(batch, sequence, layer.kv_num_heads * value_size),
        "past_key": draw(batch, layer.kv_num_heads, past + spare, layer.head_size),
        "past_value": draw(batch, layer.kv_num_heads, past + spare, value_size),
        "past_sink_scores": sums,
        "attention_mask": mask,
    }


def check(layer, feeds, storage="float32", expected=None):
    """Runs the node, compares every output, and returns what was expected."""
    expected = expected or expect(layer, feeds)
    assert not expected.ambiguous
    actual = run(layer, feeds, storage)
    tolerance = STORAGE[storage][2]
    np.testing.assert_allclose(actual["output"], expected.output, rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(actual["present_key"], expected.present_key)
    np.testing.assert_array_equal(actual["present_value"], expected.present_value)
    if layer.calibrated_heads:
        np.testing.assert_allclose(actual["present_sink_scores"], expected.present_sink_scores, rtol=3e-6, atol=3e-6)
    return expected


def ones(batch, total):
    return np.ones((batch, total), np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Values.


@pytest.mark.parametrize("sequence", [1, 2, 3, 63, 64, 65])
@pytest.mark.parametrize(("num_heads", "kv_num_heads", "head_size"), [(2, 2, 32), (6, 2, 8), (8, 1, 80)])
def test_prompt(sequence, num_heads, kv_num_heads, head_size):
    layer = Layer(
        num_heads, kv_num_heads, head_size, head_size**-0.5, calibrated_heads=(1, 0), beta=(0.4, 1.5), threshold=0.05
    )
    expected = check(layer, make_feeds(layer, ones(2, sequence), sequence, seed=1))
    assert expected.later_sinks > 0 or sequence < 3


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("calibrated_heads", [(), (0, 3)])
def test_left_right_and_ragged_padding(storage, calibrated_heads):
    layer = Layer(calibrated_heads=calibrated_heads, threshold=0.08)
    mask = ones(5, 20)
    mask[0, :7] = 0
    mask[1, 13:] = 0
    mask[2, [0, 3, 4, 9, 19]] = 0
    mask[3] = 0
    check(layer, make_feeds(layer, mask, 17, seed=2, storage=storage, spare=5), storage)


def test_padding_gives_what_the_sequence_alone_gives():
    layer = Layer(threshold=1.2, threshold_mode="relative")
    feeds = make_feeds(layer, ones(1, 12), 12, seed=3)
    alone = run(layer, feeds)["output"]
    for left in (0, 3, 5):
        padded = make_feeds(layer, ones(1, 17), 17, seed=4)
        padded["attention_mask"][0, :left] = 0
        padded["attention_mask"][0, left + 12 :] = 0
        for name in ("query", "key", "value"):
            padded[name][:, left : left + 12] = feeds[name]
        np.testing.assert_allclose(run(layer, padded)["output"][:, left : left + 12], alone, rtol=1e-5, atol=1e-6)


def test_rows_that_see_nothing_are_zero():
    layer = Layer(sliding_window=2)
    mask = ones(2, 6)
    mask[0] = 0
    mask[1, 2:5] = 0
    output = run(layer, make_feeds(layer, mask, 6))["output"]
    assert not output[0].any()
    assert not output[1, 3:5].any()
    assert output[1, 2].any()


def test_what_is_masked_or_unwritten_does_not_leak():
    layer = Layer()
    mask = ones(1, 9)
    mask[0, :3] = 0
    feeds = make_feeds(layer, mask, 5, spare=7)
    clean = run(layer, feeds)["output"][:, 1:]
    for name in ("past_key", "past_value"):
        feeds[name][:, :, :3] = np.nan
        feeds[name][:, :, 4:] = np.nan
    feeds["past_sink_scores"][:, :, 4:] = np.nan
    np.testing.assert_array_equal(run(layer, feeds)["output"][:, 1:], clean)


@pytest.mark.parametrize("number", [-1, 2, 256, 2**32, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("sequence", [3, 20])
def test_whatever_is_not_zero_in_the_mask_is_real(number, sequence):
    layer = Layer(threshold=0.05, sliding_window=9)
    mask = ones(2, 20)
    mask[0, :7] = 0
    mask[1, [3, 4, 19]] = 0
    feeds = make_feeds(layer, mask, sequence, seed=15)
    expected = run(layer, feeds)
    feeds["attention_mask"] = mask * number
    for name, output in run(layer, feeds).items():
        np.testing.assert_array_equal(output, expected[name])
    tensors = [torch.from_numpy(feeds[name]) for name in layer.input_names]
    reference = calibrated_attention(*tensors, **layer.attributes)
    np.testing.assert_allclose(expected["output"], reference.output, rtol=1e-5, atol=1e-5)
    portable = helper.make_model(
        onnx.load_from_string(make_model(layer)).graph,
        opset_imports=[helper.make_opsetid("", functions.OPSET), helper.make_opsetid("act", 1)],
        functions=[functions.function_body(layer.operator)],
        ir_version=10,
    )
    session = onnxruntime.InferenceSession(portable.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(expected["output"], session.run(None, feeds)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [20, 2**31, 2**32 + 1, 2**62, 2**63 - 1])
@pytest.mark.parametrize("sequence", [1, 20])
def test_windows_beyond_the_tokens_are_none(window, sequence):
    layer = Layer(threshold=0.05)
    feeds = make_feeds(layer, ones(1, 20), sequence, seed=16)
    for name, output in run(replace(layer, sliding_window=window), feeds).items():
        np.testing.assert_allclose(output, run(layer, feeds)[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sequence", [2, 20])
@pytest.mark.parametrize(
    "changes",
    [
        {"scale": 1e-20, "sink_logits": (3.0,)},
        {"scale": -1e-40, "sink_logits": (3.0,)},
        {"scale": 1e-45},
        {"scale": 1e10},
        {"scale": 3e38},
        {"scale": -3e38, "sink_logits": (1e30,)},
        {"softcap": 1e-45},
        {"softcap": 1e-30, "scale": 1e20},
        {"softcap": 3e38},
        {"softcap": 30.0, "scale": 1e36},
        {"softcap": 30.0, "scale": 3e38},
        {"sink_logits": (3.4e38, -1e30, 1e-40, -3.4e38)},
    ],
    ids=str,
)
def test_factors_at_the_edges_of_float32(changes, sequence):
    layer = replace(Layer(calibrated_heads=(), scale=0.3), **changes)
    feeds = make_feeds(layer, ones(2, 20), sequence, seed=17)
    feeds["query"][:, :, :8] = 0.0  # whose logits are 0, whatever they are multiplied by
    check(layer, feeds)


def test_logits_beyond_float32_are_capped():
    layer = Layer(softcap=2.0, scale=1.0, calibrated_heads=())
    for sequence in (1, 20):
        feeds = make_feeds(layer, ones(1, 20), sequence, seed=18)
        rng = np.random.default_rng(19)
        for name in ("query", "key", "past_key"):
            feeds[name] = 1e25 * rng.choice(np.array([-1, 1], np.float32), feeds[name].shape)
            feeds[name][..., 1:8] = feeds[name][..., 9:16] = feeds[name][..., 17:24] = feeds[name][..., 25:] = 0
        check(layer, feeds)


@st.composite
def cases(draw):
    kv_num_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 3), (1, 8)]))
    num_heads = kv_num_heads * group
    heads = tuple(draw(st.lists(st.integers(0, num_heads - 1), max_size=4, unique=True)))
    per_head = draw(st.booleans())
    betas = st.sampled_from([0.0, 0.4, 1.0, 1.5, 2.0])
    relative = draw(st.booleans())
    thresholds = st.sampled_from([0.5, 1.1, 2.0] if relative else [0.0, 0.03, 0.11, 0.3])
    layer = Layer(
        num_heads,
        kv_num_heads,
        head_size=draw(st.sampled_from([8, 32, 80])),
        scale=draw(st.sampled_from([0.05, 0.3, 1.0])),
        softcap=draw(st.sampled_from([0.0, 1.5, 30.0])),
        sliding_window=draw(st.sampled_from([-1, 1, 2, 7, 40])),
        calibrated_heads=heads,
        beta=tuple(draw(betas) for _ in range(max(1, len(heads)) if per_head else 1)),
        threshold=draw(thresholds),
        threshold_mode="relative" if relative else "absolute",
        sink_logits=draw(
            st.one_of(
                st.just(()),
                st.sampled_from([(0.5,), (9.0,), (NO_SINK_LOGIT,)]),
                st.tuples(*[st.sampled_from([-2.0, 0.25, 3.0, 20.0, NO_SINK_LOGIT])] * num_heads),
            )
        ),
    )
    batch = draw(st.integers(1, 3))
    past = draw(st.sampled_from([0, 0, 1, 5, 17, 40]))
    sequence = draw(st.sampled_from([1, 1, 2, 3, 16, 17, 33]))
    rows = [draw_mask_row(draw, past + sequence) for _ in range(batch)]
    storage = draw(st.sampled_from(list(STORAGE)))
    spare = draw(st.sampled_from([0, 0, 1, sequence, sequence + 9]))
    return layer, make_feeds(layer, rows, sequence, draw(st.integers(0, 2**20)), storage, spare), storage


def draw_mask_row(draw, total):
    style = draw(st.sampled_from(["none", "left", "right", "holes", "all"]))
    padding = draw(st.integers(0, total))
    row = np.ones(total, np.int64)
    if style == "left":
        row[:padding] = 0
    elif style == "right":
        row[total - padding :] = 0
    elif style == "holes":
        row[np.random.default_rng(padding).random(total) < 0.3] = 0
    elif style == "all":
        row[:] = 0
    return row


@settings(max_examples=400, deadline=None, derandomize=True)
@given(cases())
def test_any_case(case):
    layer, feeds, storage = case
    expected = expect(layer, feeds)
    assume(not expected.ambiguous)
    check(layer, feeds, storage, expected)


def test_beta_above_one_stops_where_a_probability_would_turn_negative():
    layer = Layer(beta=(2.0, 1.8), threshold=0.02)
    expected = check(layer, make_feeds(layer, ones(2, 24), 24, seed=5))
    assert expected.clamped_rows > 5


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.7])
@pytest.mark.parametrize("weight", [1e2, 4e3, 1e5])
def test_rows_whose_mass_is_nearly_all_on_later_sinks(weight, beta):
    # Token 1 weighs so many times what each other token does: what is left for them must not drown in rounding.
    layer = Layer(1, 1, 8, 1.0, calibrated_heads=(0,), beta=(beta,), threshold=0.5)
    feeds = make_feeds(layer, ones(1, 40), 40, seed=6, gain=0.1)
    feeds["query"][:, :, 0] = 1.0
    feeds["key"][:, :, 0] = 0.0
    feeds["key"][:, 1, 0] = np.log(weight)
    expected = check(layer, feeds)
    assert expected.later_sinks == 1


def test_a_row_with_nothing_but_later_sinks_is_left_alone():
    layer = Layer(1, 1, 8, 1.0, calibrated_heads=(0,), threshold=0.5)
    feeds = make_feeds(layer, ones(1, 8), 8, seed=7, gain=0.1)
    feeds["query"][:, :, 0] = 1.0
    feeds["key"][:, 1, 0] = 40.0
    check(layer, feeds)
    np.testing.assert_allclose(run(layer, feeds)["output"][0, 4], feeds["value"][0, 1], atol=1e-6)


@pytest.mark.parametrize("calibrated_heads", [(), (0, 1, 2, 3)])
def test_extreme_logits(calibrated_heads):
    # Whole numbers: logits up to 20,000 are exact in float32.
    layer = Layer(scale=1.0, calibrated_heads=calibrated_heads, threshold=0.3)
    feeds = make_feeds(layer, ones(2, 30), 21, seed=8)
    rng = np.random.default_rng(9)
    for name in ("query", "key", "past_key"):
        feeds[name] = rng.integers(-50, 51, feeds[name].shape).astype(np.float32)
    actual = run(layer, feeds)
    assert all(np.isfinite(array).all() for array in actual.values())
    check(layer, feeds)


def test_values_may_have_another_head_size():
    layer = Layer(threshold=0.05)
    check(layer, make_feeds(layer, ones(2, 21), 13, seed=10, spare=3, value_size=12))


@pytest.mark.parametrize("shape", [(0, 4), (0, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize(("past", "spare"), [(0, 0), (3, 0), (0, 5), (3, 5)])
@pytest.mark.parametrize("calibrated_heads", [(), (0, 3)])
def test_empty(shape, past, spare, calibrated_heads):
    batch, sequence = shape
    layer = Layer(calibrated_heads=calibrated_heads)
    check(layer, make_feeds(layer, ones(batch, past + sequence), sequence, spare=spare))


# ---------------------------------------------------------------------------------------------------------------------
# Over several calls.


def feed_next(layer, feeds, state, start, stop):
    """Feeds of tokens start ... stop - 1 of a prompt, on the cache that earlier calls left."""
    chunk = {name: feeds[name][:, start:stop] for name in ("query", "key", "value")}
    for name in ("key", "value", "sink_scores"):
        chunk[f"past_{name}"] = state[f"present_{name}"] if state else feeds[f"past_{name}"]
    return chunk | {"attention_mask": feeds["attention_mask"][:, :stop]}


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("stops", [(9, 10, 11, 12, 13), (4, 8, 12, 16), (1, 2, 3, 20)])
def test_decode_and_chunks_with_running_sums(stops, window):
    layer = Layer(sliding_window=window, threshold=0.12)
    mask = ones(2, stops[-1])
    mask[1, :2] = 0
    feeds = make_feeds(layer, mask, stops[-1], seed=11)
    start, state, sinks = 0, {}, 0
    for stop in stops:
        chunk = feed_next(layer, feeds, state, start, stop)
        sinks += check(layer, chunk).later_sinks
        start, state = stop, run(layer, chunk)
    assert sinks > 0
    whole = run(layer, feeds)
    np.testing.assert_allclose(state["present_sink_scores"], whole["present_sink_scores"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(state["present_key"], whole["present_key"])


def run_bound(session, inputs, outputs):
    """Runs on these very arrays, an array that is both input and output included; returns the output that is left."""
    inputs = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    values = {
        id(array): onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in [*inputs.values(), *outputs.values()]
    }
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, values[id(array)])
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, values[id(array)])
    binding.bind_output("output")
    session.run_with_iobinding(binding)
    return binding.copy_outputs_to_cpu()[-1]


@pytest.mark.parametrize("storage", ["float32", "float16"])
@pytest.mark.parametrize("in_place", [True, False])
def test_shared_buffers_over_a_generation(storage, in_place):
    layer = Layer(threshold=0.12)
    _, kind, tolerance = STORAGE[storage]
    session = make_session(make_model(layer, storage, cast=False))
    capacity, stops = 24, (10, 11, 12, 15)
    feeds = make_feeds(layer, ones(2, stops[-1]), stops[-1], seed=12, storage=storage)
    rng = np.random.default_rng(13)
    # The buffers start as garbage: what lies beyond the tokens is neither read nor written.
    garbage = {
        "key": rng.standard_normal((2, layer.kv_num_heads, capacity, layer.head_size)).astype(kind),
        "value": rng.standard_normal((2, layer.kv_num_heads, capacity, layer.head_size)).astype(kind),
        "sink_scores": rng.standard_normal((2, len(layer.calibrated_heads), capacity, 1)).astype(np.float32),
    }
    pasts = {name: array.copy() for name, array in garbage.items()}
    start, state = 0, {}
    for stop in stops:
        chunk = feed_next(layer, feeds, state, start, stop)
        expected = expect(layer, chunk)
        assert not expected.ambiguous
        presents = pasts if in_place else {name: np.zeros_like(array) for name, array in garbage.items()}
        inputs = chunk | {f"past_{name}": array for name, array in pasts.items()}
        output = run_bound(session, inputs, {f"present_{name}": array for name, array in presents.items()})
        np.testing.assert_allclose(output, expected.output, rtol=tolerance, atol=tolerance)
        for name, present in presents.items():
            state[f"present_{name}"] = present[:, :, :stop].copy()
            np.testing.assert_allclose(present[:, :, :stop], getattr(expected, f"present_{name}"), rtol=3e-6, atol=3e-6)
            np.testing.assert_array_equal(present[:, :, stop:], garbage[name][:, :, stop:])
        start, pasts = stop, presents


def test_a_call_leaves_its_inputs_alone():
    layer = Layer()
    feeds = make_feeds(layer, ones(1, 9), 3, spare=6)
    before = {name: array.copy() for name, array in feeds.items()}
    run(layer, feeds)
    for name, array in before.items():
        np.testing.assert_array_equal(feeds[name], array)


# ---------------------------------------------------------------------------------------------------------------------
# float16 and bfloat16.


def average_of_pairs(storage, pairs):
    """The kernel's (a + b) / 2 in float32, rounded to storage: two tokens with equal logits. `pairs` (2, N)."""
    layer = Layer(1, 1, pairs.shape[1], calibrated_heads=())
    feeds = make_feeds(layer, ones(1, 2), 2, storage=storage)
    feeds["query"][:] = 0
    feeds["value"] = pairs[None]
    return run(layer, feeds, storage)["output"][0, 1].astype(pairs.dtype)


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_every_16_bit_number_is_read_and_rounded_to_nearest_even(storage):
    numbers = np.arange(2**16, dtype=np.uint16).view(STORAGE[storage][1])
    numbers = numbers[np.isfinite(numbers.astype(np.float32)) & (np.abs(numbers.astype(np.float32)) < 1e38)]
    same = average_of_pairs(storage, np.stack([numbers, numbers]))
    np.testing.assert_array_equal(same, numbers)
    pairs = np.stack([numbers[:-1], numbers[1:]])  # neighbours: their mean is half-way, a tie
    means = 0.5 * pairs[0].astype(np.float32) + 0.5 * pairs[1].astype(np.float32)
    np.testing.assert_array_equal(average_of_pairs(storage, pairs), means.astype(numbers.dtype))


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_the_largest_numbers_do_not_round_to_infinity(storage):
    layer = Layer(1, 1, 8, calibrated_heads=())
    feeds = make_feeds(layer, ones(1, 50), 50, storage=storage)
    feeds["value"][:] = ml_dtypes.finfo(STORAGE[storage][1]).max
    np.testing.assert_array_equal(run(layer, feeds, storage)["output"], feeds["value"].astype(np.float32))


@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_non_finite_numbers_stay_what_they_are(storage):
    special = np.array([np.inf, -np.inf, np.nan, 1], STORAGE[storage][1])
    average = average_of_pairs(storage, np.stack([special, special]))
    np.testing.assert_array_equal(average.astype(np.float32), special.astype(np.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input.

BAD_ATTRIBUTES = [
    ({"num_heads": None}, "attribute num_heads is missing"),
    ({"scale": None}, "attribute scale is missing"),
    ({"calibrated_heads": None}, "attribute calibrated_heads is missing"),
    ({"beta": None}, "attribute beta is missing"),
    ({"threshold": None}, "attribute threshold is missing"),
    ({"softcap": 30}, "attribute softcap has another type than expected: it has to be a float"),
    ({"num_heads": 0}, "num_heads is 0 and kv_num_heads is 2, expected both to be positive"),
    ({"kv_num_heads": 3}, "num_heads is 4, expected a multiple of kv_num_heads, 3"),
    ({"kv_num_heads": -2}, "num_heads is 4 and kv_num_heads is -2, expected both to be positive"),
    ({"num_heads": -(2**63), "kv_num_heads": -1}, "expected both to be positive"),
    ({"kv_num_heads": 2**63 - 1}, "num_heads is 4, expected a multiple of kv_num_heads, 9223372036854775807"),
    ({"num_heads": 4098}, "num_heads is 4098, expected at most 4096"),
    ({"num_heads": 2**28}, "num_heads is 268435456, expected at most 4096"),
    ({"num_heads": 2**62, "kv_num_heads": 2**62}, "num_heads is 4611686018427387904, expected at most 4096"),
    ({"num_heads": 2**40, "calibrated_heads": [2**39]}, "num_heads is 1099511627776, expected at most 4096"),
    ({"sliding_window": -(2**63)}, "sliding_window is -9223372036854775808, expected -1 (none) or a positive number"),
    ({"scale": float("inf")}, "scale is inf, expected a finite number"),
    ({"scale": float("nan")}, "scale is nan, expected a finite number"),
    ({"softcap": float("nan")}, "softcap is nan, expected 0 (none) or a positive number"),
    ({"softcap": float("inf")}, "softcap is inf, expected 0 (none) or a positive number"),
    ({"threshold": float("nan")}, "threshold is nan, expected 0 or more"),
    ({"softcap": -1.5}, "softcap is -1.5, expected 0 (none) or a positive number"),
    ({"sliding_window": 0}, "sliding_window is 0, expected -1 (none) or a positive number"),
    ({"calibrated_heads": [0, 4]}, "calibrated_heads has head 4, expected 0 to 3"),
    ({"calibrated_heads": [-1]}, "calibrated_heads has head -1, expected 0 to 3"),
    ({"calibrated_heads": [-(2**63)]}, "calibrated_heads has head -9223372036854775808, expected 0 to 3"),
    ({"calibrated_heads": [0] * 100_000}, "calibrated_heads has head 0 twice"),
    ({"calibrated_heads": [3, 3]}, "calibrated_heads has head 3 twice"),
    ({"beta": [0.1, 0.2, 0.3]}, "beta has 3 values, expected 1 or 2"),
    ({"beta": [2.5]}, "beta has 2.5, expected 0 to 2"),
    ({"beta": [0.5, float("nan")]}, "beta has nan, expected 0 to 2"),
    ({"threshold": -0.25}, "threshold is -0.25, expected 0 or more"),
    ({"sink_logits": [1.0, 2.0]}, "sink_logits has 2 values, expected 1 or 4, one for each query head"),
    ({"sink_logits": [0.0, float("nan"), 0.0, 0.0]}, "sink_logits has nan, expected numbers"),
    ({"sink_logits": [float("-inf")]}, "sink_logits has -inf, expected numbers"),
    ({"sink_logits": 1.5}, "sink_logits has 0 values, expected 1 or 4"),
    ({"threshold_mode": "percent"}, 'threshold_mode is "percent", expected "absolute" or "relative"'),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ATTRIBUTES, ids=[message for _, message in BAD_ATTRIBUTES])
def test_bad_attributes(changes, message):
    layer = Layer()
    attributes = {name: value for name, value in (layer.attributes | changes).items() if value is not None}
    with pytest.raises(Exception, match="CalibratedAttention: ") as error:
        make_session(make_model(layer, attributes=attributes))
    assert message in str(error.value)


def test_optional_attributes_have_defaults():
    layer = Layer()
    required = {n: v for n, v in layer.attributes.items() if n not in ("softcap", "sliding_window", "threshold_mode")}
    feeds = make_feeds(layer, ones(1, 12), 12)
    outputs = make_session(make_model(layer, attributes=required)).run(None, feeds)
    np.testing.assert_array_equal(outputs[0], run(layer, feeds)["output"])


@pytest.mark.parametrize("calibrated_heads", [(), (0, 3)])
@pytest.mark.parametrize("sequence", [3, 60])
def test_heads_without_a_learned_sink_are_as_if_there_were_none(calibrated_heads, sequence):
    layer = Layer(calibrated_heads=calibrated_heads)
    feeds = make_feeds(layer, ones(2, 80), sequence)
    expected = run(layer, feeds)
    for sink_logits in ((NO_SINK_LOGIT,), (NO_SINK_LOGIT,) * 4):
        for name, output in run(replace(layer, sink_logits=sink_logits), feeds).items():
            np.testing.assert_array_equal(output, expected[name])
    one = run(replace(layer, sink_logits=(NO_SINK_LOGIT, 1.0, NO_SINK_LOGIT, NO_SINK_LOGIT)), feeds)["output"]
    is_same = (one == expected["output"]).reshape(2, sequence, 4, -1).all((0, 1, 3))
    assert is_same.tolist() == [True, False, True, True]


@pytest.mark.parametrize("beta", [0.0, 1.7])
@pytest.mark.parametrize("sequence", [1, 40])
@pytest.mark.parametrize("logit", [3.0, 12.0, 60.0])
def test_learned_sinks_that_draw_nearly_everything(logit, sequence, beta):
    """What is left for the keys, and for those of them that are no later sinks, must not drown in rounding."""
    layer = Layer(1, 1, 8, 1.0, calibrated_heads=(0,), beta=(beta,), threshold=1e-4, sink_logits=(logit,))
    feeds = make_feeds(layer, ones(1, 40), sequence, seed=6, gain=0.1)
    feeds["past_sink_scores"] *= 0.0
    feeds["query"][:, :, 0] = 1.0
    feeds["key"][:, :, 0] = feeds["past_key"][..., 0] = 0.0
    (feeds["key"] if sequence > 1 else feeds["past_key"][:, 0])[:, 1, 0] = np.log(30.0)
    feeds["value"] *= 1e3
    feeds["past_value"] *= 1e3
    check(layer, feeds)


BAD_INPUTS = [
    ({"query": (2, 96)}, "query has shape (2, 96), expected 3 dimensions: (batch, sequence, num_heads * head_size)"),
    ({"query": (2, 3, 34)}, "query has shape (2, 3, 34), expected a last dimension that is a multiple of num_heads, 4"),
    ({"query": (2, 3, 0)}, "query has shape (2, 3, 0), expected a last dimension that is a multiple of num_heads, 4"),
    (
        {"key": (2, 4, 16)},
        "key has shape (2, 4, 16), expected (2, 3, 16) = (batch, sequence, kv_num_heads * head_size)",
    ),
    ({"key": (2, 3, 32)}, "key has shape (2, 3, 32), expected (2, 3, 16)"),
    (
        {"value": (2, 3, 17)},
        "value has shape (2, 3, 17), expected a last dimension that is a multiple of kv_num_heads, 2",
    ),
    ({"value": (2, 4, 16)}, "value has shape (2, 4, 16), expected (2, 3, 16)"),
    (
        {"past_key": (2, 5, 8)},
        "past_key has shape (2, 5, 8), expected 4 dimensions: (batch, kv_num_heads, past, head_size)",
    ),
    ({"past_key": (2, 4, 5, 8)}, "past_key has shape (2, 4, 5, 8), expected (2, 2, 5, 8)"),
    ({"past_value": (2, 2, 6, 8)}, "past_value has shape (2, 2, 6, 8), expected (2, 2, 5, 8)"),
    ({"past_value": (2, 2, 5, 9)}, "past_value has shape (2, 2, 5, 9), expected (2, 2, 5, 8)"),
    ({"past_sink_scores": (2, 2, 6, 1)}, "past_sink_scores has shape (2, 2, 6, 1), expected (2, 2, 5, 1)"),
    ({"past_sink_scores": (2, 1, 5, 1)}, "past_sink_scores has shape (2, 1, 5, 1), expected (2, 2, 5, 1)"),
    ({"attention_mask": (8,)}, "attention_mask has shape (8), expected 2 dimensions: (batch, past + sequence)"),
    ({"attention_mask": (1, 8)}, "attention_mask has shape (1, 8), expected (2, 8)"),
    ({"attention_mask": (2, 2)}, "attention_mask has 2 positions, expected at least the 3 of query"),
    ({"attention_mask": (2, 9)}, "past_key has room for 5 tokens, but attention_mask (9 positions) and query (3) say"),
    ({"attention_mask": (2, 0)}, "attention_mask has 0 positions, expected at least the 3 of query"),
    (
        {"query": (2**31, 0, 32)},
        "query has shape (2147483648, 0, 32): its batch is 2147483648, expected at most 2147483647",
    ),
    (
        {"query": (0, 2**40, 32)},
        "query has shape (0, 1099511627776, 32): its sequence is 1099511627776, expected at most",
    ),
    ({"query": (0, 3, 4 * 65537)}, "query has shape (0, 3, 262148): its head size is 65537, expected at most 65536"),
    ({"query": (0, 3, 2**50)}, "query has shape (0, 3, 1125899906842624): its head size is 281474976710656"),
    ({"value": (0, 3, 2**50)}, "value has shape (0, 3, 1125899906842624): its head size is 562949953421312"),
    ({"past_key": (0, 2, 2**40, 8)}, "past_key has shape (0, 2, 1099511627776, 8): its past is 1099511627776"),
    ({"attention_mask": (0, 2**40)}, "attention_mask has shape (0, 1099511627776): its length is 1099511627776"),
]


@pytest.mark.parametrize(("shapes", "message"), BAD_INPUTS, ids=[message for _, message in BAD_INPUTS])
def test_bad_inputs(shapes, message):
    layer = Layer()
    feeds = make_feeds(layer, ones(2, 8), 3)
    for name, shape in shapes.items():
        feeds[name] = np.ones(shape, feeds[name].dtype)
    with pytest.raises(Exception, match="CalibratedAttention: ") as error:
        run(layer, feeds)
    assert message in str(error.value)
    check(layer, make_feeds(layer, ones(2, 8), 3))  # the session goes on working


def test_heads_that_are_wide_together_are_refused():
    layer = Layer(64, 1, 16384, calibrated_heads=())
    with pytest.raises(Exception, match=r"its head size times num_heads is 1048640, expected at most 1048576"):
        run(layer, make_feeds(layer, ones(1, 1), 1, value_size=16385))


# What a hostile node or input may make the library ask for, or take: each is a few bytes large.
GREEDY = {
    "heads": (Layer(2**28, 2**28, calibrated_heads=(3,)), {}),
    "sinks of heads": (Layer(2**28, 2**28, calibrated_heads=(), sink_logits=(1.0,)), {}),
    "sequences without tokens": (Layer(), {"batch": 10_000_000, "sequence": 0}),
    "sequences that are too many to count": (Layer(), {"batch": 2**40, "sequence": 0}),
}


def greedy_call(name):
    """One call of a layer of `GREEDY`, and the megabytes and seconds that it took."""
    layer, sizes = GREEDY[name]
    batch, sequence = sizes.get("batch", 1), sizes.get("sequence", 1)
    feeds = {
        "query": (batch, sequence, 32),
        "key": (batch, sequence, 16),
        "value": (batch, sequence, 16),
        "past_key": (batch, 2, 0, 8),
        "past_value": (batch, 2, 0, 8),
        "past_sink_scores": (batch, 2, 0, 1),
        "attention_mask": (batch, sequence),
    }
    feeds = {n: np.ones(feeds[n], np.int64 if n == "attention_mask" else np.float32) for n in layer.input_names}
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    message = ""
    try:
        make_session(make_model(layer)).run(None, feeds)
    except Exception as error:
        message = str(error)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, time.process_time() - began, message


@pytest.fixture(scope="module")
def another_process():
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("name", GREEDY)
def test_a_small_call_takes_little(name, another_process):
    megabytes, seconds, message = another_process.submit(greedy_call, name).result()
    assert message == "" or "expected at most" in message
    assert megabytes < 200
    assert seconds < 2


def test_errors_name_the_operator_that_failed():
    layer = Layer(calibrated_heads=())
    feeds = make_feeds(layer, ones(2, 9), 3)
    feeds["attention_mask"] = ones(2, 12)
    with pytest.raises(Exception, match=r" Attention: past_key has room for 6 tokens"):
        run(layer, feeds)


@pytest.mark.parametrize("name", Layer().input_names)
def test_an_omitted_input_is_refused(name):
    with pytest.raises(Exception, match=r"CalibratedAttention|Input"):
        make_session(make_model(Layer(), omit=name))


# ---------------------------------------------------------------------------------------------------------------------
# Memory that is shared.


def buffers_of(layer, sequence, past, room):
    """Inputs of a call, and garbage for its outputs, all in memory of their own."""
    feeds = make_feeds(layer, ones(2, past + sequence), sequence, seed=14, spare=room - past)
    outputs = {name: np.full_like(feeds[name.replace("present", "past")], 7) for name in layer.output_names[1:]}
    return feeds, {"output": np.full((2, sequence, layer.num_heads * layer.head_size), 7, np.float32)} | outputs


def run_in(session, inputs, outputs):
    """Runs on these arrays, which may share memory in any way."""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    session.run_with_iobinding(binding)


def place(first, second, offset):
    """Copies in one piece of memory: `second` begins `offset` bytes after the first one."""
    begin = max(0, -offset)
    memory = np.zeros(begin + abs(offset) + first.nbytes + second.nbytes, np.uint8)

    def copy(array, at):
        place = memory[at : at + array.nbytes].view(array.dtype).reshape(array.shape)
        place[...] = array
        return place

    return copy(first, begin), copy(second, begin + offset)


PAIRS = [(output, other) for output in Layer().output_names for other in Layer().input_names]
PAIRS += [(output, other) for output in Layer().output_names for other in Layer().output_names if output < other]


@pytest.mark.parametrize(("output", "other"), PAIRS)
def test_outputs_in_memory_that_is_read_or_written_are_refused(output, other):
    layer = Layer()
    session = session_of(layer)
    inputs, outputs = buffers_of(layer, 3, 5, 9)
    owner = inputs if other in inputs else outputs
    size, output_size, is_past = owner[other].nbytes, outputs[output].nbytes, other == output.replace("present", "past")
    # By whole tokens, as a caller would that moves a window over one buffer; by a number; in the middle; at the edges.
    for offset in (8, -8, 64, size // 16 * 8, size - 8, 8 - output_size, *([] if is_past else [0])):
        placed, moved = place(owner[other], outputs[output], offset)
        bound = (inputs | {other: placed}, outputs) if other in inputs else (inputs, outputs | {other: placed})
        with pytest.raises(
            Exception, match=f"the memory of ({other} and {output}|{output} and {other}) overlaps: bind"
        ):
            run_in(session, bound[0], bound[1] | {output: moved})
    expected = run(layer, inputs)[output]
    for offset in (size, -output_size):
        placed, moved = place(owner[other], outputs[output], offset)
        bound = (inputs | {other: placed}, outputs) if other in inputs else (inputs, outputs | {other: placed})
        run_in(session, bound[0], bound[1] | {output: moved})
        np.testing.assert_array_equal(moved, expected)


def test_a_past_that_has_to_grow_is_not_extended_in_place():
    layer = Layer()
    inputs, outputs = buffers_of(layer, 3, 5, 5)
    outputs["present_key"] = np.zeros((2, 2, 8, 8), np.float32)
    inputs["past_key"] = outputs["present_key"].reshape(-1)[: 2 * 2 * 5 * 8].reshape(2, 2, 5, 8)
    for name, size in (("present_value", 8), ("present_sink_scores", 1)):
        outputs[name] = np.zeros((2, 2, 8, size), np.float32)
    with pytest.raises(Exception, match="past and present keys are the same memory, which has room for 5 tokens"):
        run_in(session_of(layer), inputs, outputs)


# ---------------------------------------------------------------------------------------------------------------------
# The library in ONNX Runtime.


def inferred_shapes(layer, shapes, storage="float32"):
    session = make_session(make_model(layer, storage, shapes=shapes, cast=False))
    return {output.name: output.shape for output in session.get_outputs()}


@pytest.mark.parametrize("storage", STORAGE)
def test_shapes_are_inferred(storage):
    layer = Layer()
    shapes = {
        "query": ["batch", "sequence", 32],
        "past_key": ["batch", 2, "past", 8],
        "past_value": ["batch", 2, "past", 8],
        "past_sink_scores": ["batch", 2, "past", 1],
        "attention_mask": ["batch", "total"],
    }
    assert inferred_shapes(layer, shapes, storage) == {
        "output": ["batch", "sequence", 32],
        "present_key": ["batch", 2, "max(past, total)", 8],
        "present_value": ["batch", 2, "max(past, total)", 8],
        "present_sink_scores": ["batch", 2, "max(past, total)", 1],
    }
    shapes["past_key"] = ["batch", 2, 0, 8]
    assert inferred_shapes(layer, shapes, storage)["present_key"] == ["batch", 2, "total", 8]
    shapes["attention_mask"] = ["batch", 64]
    assert inferred_shapes(layer, shapes, storage)["present_key"] == ["batch", 2, 64, 8]
    shapes["past_key"] = ["batch", 2, 100, 8]
    assert inferred_shapes(layer, shapes, storage)["present_key"] == ["batch", 2, 100, 8]


def test_declared_output_shapes_win_over_inferred_ones():
    shapes = {
        "past_key": ["batch", 2, "past", 8],
        "attention_mask": ["batch", "total"],
        "present_key": ["batch", 2, "cache", 8],
    }
    assert inferred_shapes(Layer(), shapes)["present_key"] == ["batch", 2, "cache", 8]


def test_names_of_dimensions_do_not_grow_along_a_chain_of_nodes():
    layer = Layer(calibrated_heads=())
    model = onnx.load_from_string(make_model(layer, shapes={"past_key": ["batch", 2, "past", 8]}))
    first = model.graph.node[0]
    for i in range(60):
        node = model.graph.node.add()
        node.CopyFrom(first)
        node.input[3] = model.graph.node[-2].output[1]
        node.output[:] = [f"{name}_{i}" for name in layer.output_names]
        model.graph.input[5].type.CopyFrom(helper.make_tensor_type_proto(TensorProto.INT64, ["batch", f"total_{i}"]))
    model.graph.output[1].name = model.graph.node[-1].output[1]
    length = make_session(model.SerializeToString()).get_outputs()[1].shape
    assert all(len(str(dimension)) < 250 for dimension in length)


def test_sessions_side_by_side():
    one, two = Layer(threshold=0.05), Layer(8, 1, 32, threshold=0.05, calibrated_heads=(7,))
    for _ in range(2):
        for layer in (one, two):
            session = make_session(make_model(layer))
            feeds = make_feeds(layer, ones(2, 12), 12)
            np.testing.assert_array_equal(session.run(None, feeds)[0], run(layer, feeds)["output"])


def test_eight_threads_on_one_session():
    layer = Layer(threshold=0.05)
    session = session_of(layer)
    prompts = [make_feeds(layer, ones(2, 20 + i), 20 + i, seed=i) for i in range(8)]
    alone = [session.run(None, feeds) for feeds in prompts]
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        return all(
            all(np.array_equal(x, y) for x, y in zip(session.run(None, prompts[i]), alone[i], strict=True))
            for _ in range(10)
        )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_library_path():
    path = library_path()
    assert path.is_absolute()
    assert path.stem == "libact_ops"


def test_library_path_says_what_to_do(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(act_export.ops, "__path__", [str(tmp_path)])
    with pytest.raises(LibraryNotFoundError, match=r"pip install"):
        library_path()


def test_the_uncalibrated_operator_is_ordinary_attention():
    calibrated = Layer(beta=(1.0,), threshold=0.05)
    plain = replace(calibrated, calibrated_heads=())
    feeds = make_feeds(calibrated, ones(2, 40), 40)
    np.testing.assert_allclose(run(plain, feeds)["output"], run(calibrated, feeds)["output"], rtol=1e-5, atol=1e-6)
    assert onnx.load_from_string(make_model(plain)).graph.node[0].op_type == "Attention"
