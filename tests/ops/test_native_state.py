"""State of the native operators: chunks, buffers, types and shapes."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from native_calls import (
    STORAGE,
    Layer,
    check,
    expect,
    make_feeds,
    make_model,
    make_session,
    ones,
    run,
)
from onnx import TensorProto, helper


@pytest.mark.parametrize("shape", [(0, 4), (0, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize(("past", "spare"), [(0, 0), (3, 0), (0, 5), (3, 5)])
@pytest.mark.parametrize("calibrated_heads", [(), (0, 3)])
def test_empty(shape, past, spare, calibrated_heads):
    batch, sequence = shape
    layer = Layer(calibrated_heads=calibrated_heads)
    check(layer, make_feeds(layer, ones(batch, past + sequence), sequence, spare=spare))


def feed_next(layer, feeds, state, start, stop):
    """Feeds of tokens start ... stop - 1 of a prompt, on the cache that earlier calls left."""
    chunk = {name: feeds[name][:, start:stop] for name in ("query", "key", "value")}
    for name in ("key", "value", "sink_scores"):
        chunk[f"past_{name}"] = state[f"present_{name}"] if state else feeds[f"past_{name}"]
    return chunk | {"attention_mask": feeds["attention_mask"][:, :stop], "calibration": feeds["calibration"]}


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("stops", [(9, 10, 11, 12, 13), (4, 8, 12, 16), (1, 2, 3, 20)])
def test_decode_and_chunks_with_running_sums(stops, window):
    layer = Layer(sliding_window=window, threshold=0.115, gamma=(0.5, 3.0))
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


@pytest.mark.parametrize("window", [-1, 5])
@pytest.mark.parametrize("spare", [0, 9])
def test_calibrations_change_from_call_to_call(spare, window):
    layer = Layer(sliding_window=window)
    feeds = make_feeds(layer, ones(2, 20), 20, seed=20, spare=spare)
    feeds["attention_mask"][1, :2] = 0
    plain, gamma_alone, strong = [1, 1, 0], [1, 6, 0], [1.7, 0.2, 0.1]
    calls = {  # tokens so far, and strengths of the two heads in each sequence, or in both
        9: [[plain, gamma_alone], [[0.4, 1, 0.12], plain]],
        10: [[[0.4, 3, 0.1], plain]],
        13: [[strong, [0, 1, 0.05]], [gamma_alone, strong]],
        14: [[plain, plain]],
        20: [[[0.4, 1, 0.1], strong]],
    }
    start, state, sinks = 0, {}, 0
    for stop, strengths in calls.items():
        chunk = feed_next(layer, feeds, state, start, stop) | {"calibration": np.array(strengths, np.float32)}
        sinks += check(layer, chunk).later_sinks
        start, state = stop, run(layer, chunk)
    assert sinks > 0


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
        "calibration": [None, 2, 3],
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


@pytest.mark.parametrize("sequence", [1, 40])
def test_heads_with_strengths_of_1_are_those_of_the_uncalibrated_operator(sequence):
    calibrated = Layer(beta=(1.0,), threshold=0.05)
    plain = replace(calibrated, calibrated_heads=())
    feeds = make_feeds(calibrated, ones(2, 40), sequence)
    np.testing.assert_array_equal(run(plain, feeds)["output"], run(calibrated, feeds)["output"])
    assert onnx.load_from_string(make_model(plain)).graph.node[0].op_type == "Attention"
