"""What the native operators refuse, and where they may write."""

from __future__ import annotations

import multiprocessing
import resource
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from native_calls import (
    Layer,
    check,
    make_feeds,
    make_model,
    make_session,
    ones,
    run,
    session_of,
)

import act_export.ops
from act_export.ops.library import LibraryNotFoundError, library_path

BAD_ATTRIBUTES = [
    ({"num_heads": None}, "attribute num_heads is missing"),
    ({"scale": None}, "attribute scale is missing"),
    ({"calibrated_heads": None}, "attribute calibrated_heads is missing"),
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
    ({"softcap": -1.5}, "softcap is -1.5, expected 0 (none) or a positive number"),
    ({"sliding_window": 0}, "sliding_window is 0, expected -1 (none) or a positive number"),
    ({"calibrated_heads": [0, 4]}, "calibrated_heads has head 4, expected 0 to 3"),
    ({"calibrated_heads": [-1]}, "calibrated_heads has head -1, expected 0 to 3"),
    ({"calibrated_heads": [-(2**63)]}, "calibrated_heads has head -9223372036854775808, expected 0 to 3"),
    ({"calibrated_heads": [0] * 100_000}, "calibrated_heads has head 0 twice"),
    ({"calibrated_heads": [3, 3]}, "calibrated_heads has head 3 twice"),
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
    (
        {"calibration": (2, 3)},
        "calibration has shape (2, 3), expected 3 dimensions: (1 or batch, calibrated heads, 3)",
    ),
    ({"calibration": (3, 2, 3)}, "calibration has shape (3, 2, 3), expected (2, 2, 3)"),
    ({"calibration": (0, 2, 3)}, "calibration has shape (0, 2, 3), expected (2, 2, 3)"),
    ({"calibration": (1, 4, 3)}, "calibration has shape (1, 4, 3), expected (1, 2, 3)"),
    ({"calibration": (2, 2, 1)}, "calibration has shape (2, 2, 1), expected (2, 2, 3)"),
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


@pytest.mark.parametrize("sequence", [1, 20])
def test_strengths_out_of_range_are_refused(sequence):
    layer = Layer()
    feeds = make_feeds(layer, ones(2, 20), sequence)
    fine = np.tile(layer.calibration, (2, 1, 1))
    wrong = {
        "beta {}, expected 0 to 2": (-1e-6, 2.5, np.nan),
        "gamma {}, expected 0.0625 to 16": (0.0, 0.0624, 16.5, -1.0, np.inf, np.nan),
        "threshold {}, expected 0 or more": (-0.25, np.inf, np.nan),
    }
    for column, (message, values) in enumerate(wrong.items()):
        for value in values:
            feeds["calibration"] = fine.copy()
            feeds["calibration"][1, 0, column] = value
            with pytest.raises(Exception, match=r"CalibratedAttention: calibration\[1, 0\] has ") as error:
                run(layer, feeds)
            assert message.format(f"{value:g}") in str(error.value)
    feeds["calibration"] = np.array([[[0, 1 / 16, 0], [2, 16, 3e38]]], np.float32)
    assert np.isfinite(run(layer, feeds)["output"]).all()


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
        "calibration": (1, len(layer.calibrated_heads), 3),
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


@pytest.mark.parametrize(("output", "other"), PAIRS)
def test_outputs_in_memory_that_is_read_or_written_are_refused(output, other):
    layer = Layer()
    session = session_of(layer)
    inputs, outputs = buffers_of(layer, 3, 5, 9)
    owner = inputs if other in inputs else outputs
    size, output_size, is_past = owner[other].nbytes, outputs[output].nbytes, other == output.replace("present", "past")
    # By whole tokens, as a caller would that moves a window over one buffer; by a number; in the middle; at the edges.
    offsets = (8, -8, 64, size // 16 * 8, size - 8, 8 - output_size, *([] if is_past else [0]))
    for offset in (offset for offset in offsets if offset < size):
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
