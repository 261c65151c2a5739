"""The reference against an independent loop in float64, and its properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from attention_maps import MARGIN, by_loop, map_by_loop
from close import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from act_export.calibration.reference import (
    calibrate_probabilities,
    calibrate_with_state,
    later_sinks,
    visible_rows,
)
from act_export.calibration.reference_operator import calibrated_attention


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
@settings(max_examples=150, deadline=None)
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


@st.composite
def calls(draw):
    sequence, past, batch = draw(st.integers(1, 8)), draw(st.integers(0, 6)), 2
    strengths = st.tuples(
        st.sampled_from([0.0, 0.4, 1.0, 1.0, 1.6]),
        st.sampled_from([1 / 16, 0.3, 1.0, 1.0, 4.0, 16.0]),
        st.sampled_from([0.0, 0.05, 0.2, 0.6]),
    )
    calibrations = draw(st.sampled_from([1, batch]))
    masks = st.lists(st.sampled_from([0, 1, 1]), min_size=past + sequence, max_size=past + sequence)
    return {
        "rng": np.random.default_rng(draw(st.integers(0, 2**32 - 1))),
        "mask": np.array([draw(masks) for _ in range(batch)]),
        "past": past,
        "calibration": [[draw(strengths) for _ in range(2)] for _ in range(calibrations)],
        "options": {
            "scale": draw(st.sampled_from([0.35, -1.0])),
            "softcap": draw(st.sampled_from([0.0, 2.0])),
            "sliding_window": draw(st.sampled_from([-1, 1, 3, 50])),
            "sink_logits": draw(st.sampled_from([(), (0.5, -1.0, 3.0, 0.0)])),
            "threshold_mode": draw(st.sampled_from(["absolute", "relative"])),
        },
    }


@given(calls())
@settings(max_examples=200, deadline=None)
def test_attention_equals_a_loop_over_the_definition(call):
    rng, mask, past, options = (call[name] for name in ("rng", "mask", "past", "options"))
    batch, total = mask.shape
    query = rng.standard_normal((batch, 4, total - past, 4))
    keys, values = rng.standard_normal((2, batch, 2, total, 4))
    past_sums = rng.random((batch, 2, past, 1))
    heads, window = (3, 0), options["sliding_window"]

    def flat(x):
        return torch.from_numpy(x).transpose(1, 2).flatten(2)

    result = calibrated_attention(
        flat(query),
        flat(keys[:, :, past:]),
        flat(values[:, :, past:]),
        torch.from_numpy(keys[:, :, :past]),
        torch.from_numpy(values[:, :, :past]),
        torch.from_numpy(past_sums),
        torch.from_numpy(mask),
        torch.tensor(call["calibration"], dtype=torch.float64),
        num_heads=4,
        kv_num_heads=2,
        calibrated_heads=heads,
        **options,
    )
    for b in range(batch):
        for h in range(4):
            logits = options["scale"] * query[b, h] @ keys[b, h // 2].T
            if options["softcap"]:
                logits = options["softcap"] * np.tanh(logits / options["softcap"])
            c = heads.index(h) if h in heads else None
            beta, gamma, tau = (1.0, 1.0, 0.0) if c is None else call["calibration"][b % len(call["calibration"])][c]
            sink = options["sink_logits"][h] if options["sink_logits"] else None
            A = map_by_loop(logits, real=mask[b], window=window, gamma=gamma, sink=sink)
            sums = np.pad(past_sums[b, c, :, 0], (0, total - past)) if c is not None else None
            if beta != 1:
                rule = {"mode": options["threshold_mode"], "real": mask[b], "window": window}
                A, sums, _, closest = by_loop(A, beta=beta, threshold=tau, past_sums=sums, **rule)
                assume(closest > MARGIN)
            np.testing.assert_allclose(result.output[b, :, 4 * h : 4 * h + 4], A @ values[b, h // 2], atol=1e-12)
            if c is not None:
                assert_close(result.present_sink_scores[b, c, :, 0], sums, 1e-6)


def test_gamma_alone_is_zerotunings():
    """There the initial token's probability is multiplied by gamma; then all are divided by (gamma - 1) a[0] + 1."""
    rng = np.random.default_rng(9)
    query, key, value = (torch.from_numpy(rng.standard_normal((1, 7, 4))) for _ in range(3))
    none = torch.zeros(1, 1, 0, 4, dtype=torch.float64)
    for gamma in (0.2, 1.0, 9.0):
        found = calibrated_attention(
            *(query, key, value, none, none, torch.zeros(1, 1, 0, 1), torch.ones(1, 7)),
            torch.tensor([[[1.0, gamma, 0.0]]], dtype=torch.float64),
            num_heads=1,
            kv_num_heads=1,
            scale=0.7,
            calibrated_heads=[0],
        )
        a = map_by_loop(0.7 * (query[0] @ key[0].T).numpy(), real=[True] * 7)
        tuned = a.copy()
        tuned[:, 0] *= gamma
        tuned /= (gamma - 1) * a[:, :1] + 1
        np.testing.assert_allclose(found.output[0], tuned @ value[0].numpy(), atol=1e-14)
        assert not found.present_sink_scores.any()


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
        "sliding_window": window,
    }
    calibration = torch.tensor([[[0.4, 3.0, 0.1], [1.7, 0.2, 0.1]]])

    def run(tensors, mask):
        cache = torch.zeros(1, kv_heads, 0, size, dtype=torch.float64)
        sums = torch.zeros(1, 2, 0, 1)
        return calibrated_attention(*tensors, cache, cache, sums, mask, calibration, **options)

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_compute_in_float32(dtype):
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal((1, 9, 16))).to(dtype) for _ in range(3))
    cache, sums, mask = torch.zeros(1, 2, 0, 8, dtype=dtype), torch.zeros(1, 1, 0, 1), torch.ones(1, 9)
    options = {"num_heads": 2, "kv_num_heads": 2, "scale": 0.3, "calibrated_heads": [1]}
    state = (sums, mask, torch.tensor([[[0.4, 2.0, 0.1]]]))
    half = calibrated_attention(q, k, v, cache, cache, *state, **options)
    full = calibrated_attention(*(x.float() for x in (q, k, v, cache, cache)), *state, **options)
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


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([[[2.5, 1.0, 0.1]]], "beta is"),
        ([[[0.4, 17.0, 0.1]]], "gamma is"),
        ([[[0.4, math.nan, 0.1]]], "gamma is"),
        ([[[0.4, 1.0, -0.1]]], "threshold is"),
        ([[[0.4, 1.0]]], r"calibration has shape \(1, 1, 2\); 3 sequences and 1 calibrated heads need \(1, 1, 3\) or"),
        ([[[0.4, 1.0, 0.1]]] * 2, r"calibration has shape \(2, 1, 3\)"),
    ],
)
def test_a_wrong_calibration_is_named(calibration, message):
    x, cache = torch.zeros(3, 1, 4), torch.zeros(3, 1, 0, 4)
    state = (torch.zeros(3, 1, 0, 1), torch.ones(3, 1), torch.tensor(calibration))
    with pytest.raises(ValueError, match=message):
        calibrated_attention(
            x, x, x, cache, cache, *state, num_heads=1, kv_num_heads=1, scale=1.0, calibrated_heads=[0]
        )


def test_more_rows_than_columns_is_an_error():
    with pytest.raises(ValueError, match="5 rows but only 4 columns"):
        calibrate_probabilities(torch.zeros(5, 4), beta=0.4, threshold=0.1)
