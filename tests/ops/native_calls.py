"""Calls of the native operators, and what the definition says of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import ml_dtypes
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from act_export.ops.library import library_path

STORAGE = {
    "float32": (TensorProto.FLOAT, np.float32, 1e-5),
    "float16": (TensorProto.FLOAT16, np.float16, 2e-3),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16, 1.6e-2),
}


@dataclass(frozen=True)
class Layer:
    """Attributes of one node, and how its calls are calibrated. No calibrated heads: the operator `Attention`."""

    num_heads: int = 4
    kv_num_heads: int = 2
    head_size: int = 8
    scale: float = 0.35
    softcap: float = 0.0
    sliding_window: int = -1
    calibrated_heads: tuple[int, ...] = (0, 3)
    threshold_mode: str = "absolute"
    sink_logits: tuple[float, ...] = ()
    beta: tuple[float, ...] = (0.4,)  # of all calibrated heads, or of each
    gamma: tuple[float, ...] = (1.0,)
    threshold: float = 0.1

    @property
    def operator(self):
        return "CalibratedAttention" if self.calibrated_heads else "Attention"

    @property
    def attributes(self):
        names = ["num_heads", "kv_num_heads", "scale", "softcap", "sliding_window"]
        if self.calibrated_heads:
            names += ["calibrated_heads", "threshold_mode"]
        if self.sink_logits:
            names += ["sink_logits"]
        return {name: getattr(self, name) for name in names}

    @property
    def input_names(self):
        sinks, strengths = (["past_sink_scores"], ["calibration"]) if self.calibrated_heads else ([], [])
        return ["query", "key", "value", "past_key", "past_value", *sinks, "attention_mask", *strengths]

    @property
    def output_names(self):
        sinks = ["present_sink_scores"] if self.calibrated_heads else []
        return ["output", "present_key", "present_value", *sinks]

    @property
    def calibration(self):
        """For all sequences: (1, calibrated heads, 3)."""
        strengths = np.empty((1, len(self.calibrated_heads), 3), np.float32)
        for column, values in enumerate((self.beta, self.gamma, self.threshold)):
            strengths[..., column] = values
        return strengths


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
    strengths = np.broadcast_to(feeds["calibration"].astype(np.float64), (batch, len(layer.calibrated_heads), 3))
    found = Expected(output.reshape(batch, sequence, layer.num_heads * value_size), keys, values, sums, False, 0, 0)

    for b in range(batch):
        real = [j for j in range(total) if mask[b, j]]
        for h in range(layer.num_heads):
            kv_head = h // (layer.num_heads // layer.kv_num_heads)
            c = layer.calibrated_heads.index(h) if h in layer.calibrated_heads else None
            beta, gamma, threshold = (1.0, 1.0, 0.0) if c is None else strengths[b, c]
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
                    if columns[0] == real[0]:
                        weights[0] *= gamma
                    attention[i, columns] = weights / (weights.sum() + np.exp(sink - highest))

            if c is not None:
                column_sums = sums[b, c, :total, 0]
                column_sums[past:] = 0
            if beta != 1:
                for i in range(sequence):
                    if mask[b, past + i]:
                        column_sums += attention[i]
                attention = calibrate(layer, beta, threshold, attention, column_sums, real, found)
            output[b, :, h] = attention @ values[b, kv_head, :total]
    return found


def calibrate(layer, beta, threshold, attention, column_sums, real, found):
    tau = threshold / len(real) if layer.threshold_mode == "relative" and real else threshold
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


def make_model(layer, storage="float32", shapes=None, attributes=None, cast=True, omit=None):
    """One node between float32 graph inputs and outputs (`cast`), or inputs and outputs in its own storage type."""
    kind = STORAGE[storage][0]
    kinds = dict.fromkeys(layer.input_names + layer.output_names, kind)
    kinds |= dict.fromkeys(("past_sink_scores", "present_sink_scores", "calibration"), TensorProto.FLOAT)
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
        "calibration": layer.calibration,
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
