"""The reference against an independent loop in float64, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_maps import MARGIN, by_loop
from close import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from act_export.calibration.reference import (
    attention_probabilities,
    calibrate_probabilities,
    calibrate_with_state,
    calibrated_attention,
    later_sinks,
    visible_rows,
)


def attention_map(rng, sequence, total, *, peaked=2.0, window=-1, real=None, row_sum=1.0):
    """A causal map of the last `sequence` rows, float64."""
    logits = peaked * rng.standard_normal((sequence, total))
    rows = np.arange(total - sequence, total)[:, None]
    columns = np.arange(total)
    visible = columns <= rows
    if window > 0:
        visible &= columns > rows - window
    if real is not None:
        visible &= real
    weights = np.where(visible, np.exp(logits), 0)
    return row_sum * weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)


@st.composite
def maps(draw):
    total = draw(st.integers(1, 24))
    return {
        "rng": np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        "total": total,
        "sequence": draw(st.integers(1, total)),
        "peaked": draw(st.sampled_from([0.0, 1.0, 4.0])),
        "row_sum": draw(st.sampled_from([1.0, 0.7])),
        "beta": draw(st.sampled_from([0.0, 0.4, 1.0, 1.5, 2.0])),
        "threshold": draw(st.sampled_from([0.0, 0.05, 0.1, 0.3, 1.0])),
        "mode": draw(st.sampled_from(["absolute", "relative"])),
        "window": draw(st.sampled_from([-1, 1, 3, 8, 100])),
        "left": draw(st.integers(0, total)),
        "right": draw(st.integers(0, 4)),
    }


def built(drawn):
    total = drawn["total"]
    real = np.ones(total, bool)
    real[: drawn["left"]] = False
    real[total - min(drawn["right"], total) :] = False
    A = attention_map(
        drawn["rng"],
        drawn["sequence"],
        total,
        peaked=drawn["peaked"],
        window=drawn["window"],
        real=real,
        row_sum=drawn["row_sum"],
    )
    past_sums = drawn["rng"].random(total - drawn["sequence"]) * real[: total - drawn["sequence"]]
    return A, real, past_sums


@given(maps())
@settings(max_examples=300, deadline=None)
def test_equals_a_loop_over_the_definition(drawn):
    A, real, past_sums = built(drawn)
    threshold = drawn["threshold"] * (10 if drawn["mode"] == "relative" else 1)
    expected, sums, sinks, closest = by_loop(
        A,
        beta=drawn["beta"],
        threshold=threshold,
        mode=drawn["mode"],
        real=real,
        past_sums=past_sums,
        window=drawn["window"],
    )
    assume(closest > MARGIN)
    result = calibrate_with_state(
        torch.from_numpy(A),
        beta=drawn["beta"],
        threshold=threshold,
        threshold_mode=drawn["mode"],
        real=torch.from_numpy(real),
        past_column_sums=torch.from_numpy(past_sums),
        sliding_window=drawn["window"],
    )
    np.testing.assert_allclose(result.probabilities.numpy(), expected, atol=1e-12)
    np.testing.assert_allclose(result.column_sums.numpy(), sums, atol=1e-12)
    assert result.sinks.nonzero().flatten().tolist() == sinks


@given(maps())
@settings(max_examples=100, deadline=None)
def test_rows_keep_their_sums_and_nothing_turns_negative(drawn):
    A, real, past_sums = built(drawn)
    out = calibrate_probabilities(
        torch.from_numpy(A),
        beta=drawn["beta"],
        threshold=drawn["threshold"],
        real=torch.from_numpy(real),
        past_column_sums=torch.from_numpy(past_sums),
    ).numpy()
    np.testing.assert_allclose(out.sum(-1), A.sum(-1), atol=1e-12)
    assert (out >= 0).all()


@given(maps())
@settings(max_examples=50, deadline=None)
def test_beta_one_is_the_identity(drawn):
    A, real, _ = built(drawn)
    out = calibrate_probabilities(
        torch.from_numpy(A), beta=1.0, threshold=drawn["threshold"], real=torch.from_numpy(real)
    )
    np.testing.assert_allclose(out.numpy(), A, atol=1e-15)


@given(maps(), st.integers(1, 23))
@settings(max_examples=100, deadline=None)
def test_chunks_end_with_the_statistics_of_the_whole(drawn, cut):
    """The last chunk's rows saw the statistics of the whole prompt, so they come out as in the whole prompt."""
    drawn["sequence"] = drawn["total"]
    cut = min(cut, drawn["total"] - 1)
    assume(cut >= 1)
    A, real, _ = built(drawn)
    settings_ = {"beta": drawn["beta"], "threshold": drawn["threshold"], "sliding_window": drawn["window"]}
    whole = calibrate_with_state(torch.from_numpy(A), real=torch.from_numpy(real), **settings_)
    first = calibrate_with_state(torch.from_numpy(A[:cut, :cut]), real=torch.from_numpy(real[:cut]), **settings_)
    second = calibrate_with_state(
        torch.from_numpy(A[cut:]), real=torch.from_numpy(real), past_column_sums=first.column_sums, **settings_
    )
    torch.testing.assert_close(second.column_sums, whole.column_sums, atol=1e-12, rtol=0)
    seeing = visible_rows(torch.from_numpy(real), drawn["window"]).clamp(min=1)
    assume((whole.column_sums / seeing - drawn["threshold"]).abs().min() > MARGIN)
    torch.testing.assert_close(second.probabilities, whole.probabilities[cut:], atol=1e-12, rtol=0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 5), st.integers(0, 5), st.sampled_from([-1, 3]))
@settings(max_examples=80, deadline=None)
def test_padding_changes_nothing(seed, length, left, right, window):
    rng = np.random.default_rng(seed)
    heads, kv_heads, size = 4, 2, 8
    new = [torch.from_numpy(rng.standard_normal((1, length, n * size))) for n in (heads, kv_heads, kv_heads)]
    options = {
        "num_heads": heads,
        "kv_num_heads": kv_heads,
        "scale": 1.0,
        "calibrated_heads": [0, 3],
        "beta": [0.4, 1.7],
        "threshold": 0.1,
        "sliding_window": window,
    }

    def run(tensors, mask):
        cache = torch.zeros(1, kv_heads, 0, size, dtype=torch.float64)
        sums = torch.zeros(1, 2, 0, 1)
        return calibrated_attention(*tensors, cache, cache, sums, mask, **options)

    alone = run(new, torch.ones(1, length, dtype=torch.long))
    noise = [torch.from_numpy(rng.standard_normal((1, left + right, x.shape[-1]))) for x in new]
    padded = [torch.cat([n[:, :left], x, n[:, left:]], 1) for n, x in zip(noise, new, strict=True)]
    mask = torch.zeros(1, left + length + right, dtype=torch.long)
    mask[:, left : left + length] = 1
    together = run(padded, mask)
    torch.testing.assert_close(together.output[:, left : left + length], alone.output, atol=1e-12, rtol=0)
    assert_close(together.present_sink_scores[:, :, left : left + length], alone.present_sink_scores, 1e-6)
    assert torch.isfinite(together.output).all()


def test_decode_equals_a_loop_with_running_sums():
    rng = np.random.default_rng(5)
    total, sums = 12, np.zeros(0)
    for length in range(1, total + 1):
        A = attention_map(rng, 1, length, peaked=3.0)
        expected, new_sums, _, closest = by_loop(A, beta=0.4, threshold=0.1, past_sums=sums)
        assert closest > MARGIN
        result = calibrate_with_state(
            torch.from_numpy(A), beta=0.4, threshold=0.1, past_column_sums=torch.from_numpy(sums)
        )
        np.testing.assert_allclose(result.probabilities.numpy(), expected, atol=1e-12)
        sums = np.append(new_sums, [])
        np.testing.assert_allclose(result.column_sums.numpy(), sums, atol=1e-12)


def test_agrees_with_the_papers_released_code_on_a_whole_prompt():
    """The released code divides column j by (total - j), scales later sinks by beta and spreads the rest over the row.

    Written from the paper's formulas; it agrees where the initial token is the first sink, as in the released code.
    """
    rng = np.random.default_rng(3)
    A = attention_map(rng, 30, 30, peaked=2.5)
    A[:, 0] += 0.5
    A /= A.sum(-1, keepdims=True)
    scores = A.sum(0) / np.arange(30, 0, -1)
    sinks = [j for j in range(30) if scores[j] > 0.1]
    assert sinks[0] == 0
    assert len(sinks) > 1
    expected = A.copy()
    expected[:, sinks[1:]] *= 0.4
    rest = np.ones(30, bool)
    rest[sinks[1:]] = False
    expected[:, rest] *= 1 + ((A - expected).sum(-1) / A[:, rest].sum(-1))[:, None]
    out = calibrate_probabilities(torch.from_numpy(A), beta=0.4, threshold=0.1)
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-14)


def test_a_strong_beta_is_clamped_to_keep_probabilities_positive():
    A = torch.tensor([[1.0, 0.0], [0.1, 0.9]], dtype=torch.float64)
    out = calibrate_probabilities(A, beta=2.0, threshold=0.5)
    torch.testing.assert_close(out, torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))


def test_rows_whose_mass_is_all_sink_stay_as_they_are():
    A = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(calibrate_probabilities(A, beta=0.4, threshold=0.5), A)


def test_the_initial_token_is_the_first_real_one():
    sums = torch.tensor([0.0, 0.0, 3.0, 2.0])
    real = torch.tensor([False, False, True, True])
    assert later_sinks(sums, real, threshold=0.1).tolist() == [False, False, False, True]


@pytest.mark.parametrize("window", [-1, 1, 2, 5, 9])
def test_visible_rows_counts(window):
    real = torch.tensor([0, 1, 1, 0, 1], dtype=torch.bool)
    counted = [sum(bool(real[i]) for i in range(j, 5) if window < 0 or i < j + window) for j in range(5)]
    assert visible_rows(real, window).tolist() == counted


def test_soft_cap_and_window_in_the_map():
    rng = np.random.default_rng(0)
    query, key = (torch.from_numpy(rng.standard_normal((1, 1, 6, 4))) for _ in range(2))
    real = torch.ones(1, 6, dtype=torch.bool)
    A = attention_probabilities(query, key, real, scale=2.0, softcap=1.5, sliding_window=2)[0, 0].numpy()
    for i in range(6):
        logits = {j: 1.5 * math.tanh(2.0 * float(query[0, 0, i] @ key[0, 0, j]) / 1.5) for j in (i - 1, i) if j >= 0}
        total = sum(math.exp(x) for x in logits.values())
        for j in range(6):
            assert A[i, j] == pytest.approx(math.exp(logits[j]) / total if j in logits else 0, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_compute_in_float32(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 9, 16))).to(dtype) for _ in range(3))
    cache, sums, mask = torch.zeros(1, 2, 0, 8, dtype=dtype), torch.zeros(1, 1, 0, 1), torch.ones(1, 9)
    options = {
        "num_heads": 2,
        "kv_num_heads": 2,
        "scale": 0.3,
        "calibrated_heads": [1],
        "beta": [0.4],
        "threshold": 0.1,
    }
    half = calibrated_attention(q, k, v, cache, cache, sums, mask, **options)
    full = calibrated_attention(*(x.float() for x in (q, k, v, cache, cache)), sums, mask, **options)
    assert half.output.dtype == dtype
    torch.testing.assert_close(half.output, full.output.to(dtype), atol=0, rtol=0)
    torch.testing.assert_close(half.present_sink_scores, full.present_sink_scores, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 2.5}, "beta is 2.5"),
        ({"beta": torch.tensor([0.4, -1.0]).view(-1, 1, 1)}, "beta is"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold_mode": "both"}, "threshold_mode is 'both'"),
        ({"real": torch.ones(3, dtype=torch.bool)}, "real has length 3"),
        ({"past_column_sums": torch.zeros(2)}, "past_column_sums has length 2"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        calibrate_probabilities(torch.eye(4), **{"beta": 0.4, "threshold": 0.1, **changes})


def test_more_rows_than_columns_is_an_error():
    with pytest.raises(ValueError, match="5 rows but only 4 columns"):
        calibrate_probabilities(torch.zeros(5, 4), beta=0.4, threshold=0.1)
