"""The native library in ONNX Runtime against a float64 loop over the definition."""

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from native_calls import STORAGE, Layer, check, expect, make_feeds, make_model, ones, run
from onnx import helper

from act_export.calibration.reference_operator import calibrated_attention
from act_export.ops import functions
from act_export.ops.schema import NO_SINK_LOGIT


@pytest.mark.parametrize("sequence", [1, 2, 65])
@pytest.mark.parametrize(("num_heads", "kv_num_heads", "head_size"), [(2, 2, 32), (6, 2, 8), (8, 1, 80)])
def test_prompt(sequence, num_heads, kv_num_heads, head_size):
    layer = Layer(
        num_heads,
        kv_num_heads,
        head_size,
        head_size**-0.5,
        calibrated_heads=(1, 0),
        beta=(0.4, 1.5),
        gamma=(3.0, 0.5),
        threshold=0.05,
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


@pytest.mark.parametrize("sequence", [3, 20])
def test_whatever_is_not_zero_in_the_mask_is_real(sequence):
    layer = Layer(threshold=0.05, sliding_window=9, gamma=(4.0, 0.3))
    mask = ones(2, 20)
    mask[0, :7] = 0
    mask[1, [3, 4, 19]] = 0
    feeds = make_feeds(layer, mask, sequence, seed=15)
    expected = run(layer, feeds)
    for number in (-1, 2, 256, 2**63 - 1, -(2**63), 2**32):
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
    layer = replace(Layer(scale=0.3, beta=(1.0,), gamma=(5.0, 0.3)), **changes)
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
    relative = draw(st.booleans())
    layer = Layer(
        num_heads,
        kv_num_heads,
        head_size=draw(st.sampled_from([8, 32, 80])),
        scale=draw(st.sampled_from([0.05, 0.3, 1.0])),
        softcap=draw(st.sampled_from([0.0, 1.5, 30.0])),
        sliding_window=draw(st.sampled_from([-1, 1, 2, 7, 40])),
        calibrated_heads=heads,
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
    feeds = make_feeds(layer, rows, sequence, draw(st.integers(0, 2**20)), storage, spare)
    feeds["calibration"] = draw_calibration(draw, draw(st.sampled_from([1, batch])), len(heads), relative)
    return layer, feeds, storage


def draw_calibration(draw, sequences, heads, relative):
    strengths = st.tuples(
        st.sampled_from([0.0, 0.4, 1.0, 1.5, 2.0]),
        st.sampled_from([1 / 16, 0.3, 1.0, 1.0, 5.0, 16.0]),
        st.sampled_from([0.5, 1.1, 2.0] if relative else [0.0, 0.03, 0.11, 0.3]),
    )
    drawn = [draw(strengths) for _ in range(sequences * heads)]
    return np.array(drawn, np.float32).reshape(sequences, heads, 3)


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


@settings(max_examples=300, deadline=None, derandomize=True)
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
