"""The definition with learned sink logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attention_maps import MARGIN, by_loop
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st

from act_export.calibration.reference_operator import attention_probabilities, calibrated_attention

SIZES = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.4}


def gpt_oss_attention(query, key, value, mask, sinks, scale):
    """The model's own attention: (batch, sequence, heads, size), and its map."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = torch.nn.Module()
    module.sinks, module.num_key_value_groups = sinks, query.shape[1] // key.shape[1]
    length = mask.shape[1]
    visible = mask.bool()[:, None, None, :] & torch.ones(length, length, dtype=torch.bool).tril()
    added = torch.zeros(visible.shape, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
    return eager_attention_forward(module.eval(), query, key, value, added, scale)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 6), st.sampled_from([0.5, 3.0, 40.0]))
@settings(max_examples=40, deadline=None)
def test_learned_sinks_are_those_of_gpt_oss(seed, length, left, spread):
    rng = np.random.default_rng(seed)
    sinks = torch.from_numpy(spread * rng.standard_normal(4))
    query, key, value = (torch.from_numpy(rng.standard_normal((2, length, n * 8))) for n in (4, 2, 2))
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : min(left, length - 1)] = 0
    heads = [x.view(2, length, -1, 8).transpose(1, 2) for x in (query, key, value)]
    expected, A = gpt_oss_attention(*heads, mask, sinks, SIZES["scale"])
    cache = torch.zeros(2, 2, 0, 8, dtype=torch.float64)
    real = mask.bool()
    for given_as in (sinks, sinks.tolist()):
        result = calibrated_attention(
            query, key, value, cache, cache, torch.zeros(2, 0, 0, 1), mask, **SIZES, sink_logits=given_as
        )
        torch.testing.assert_close(result.output[real], expected.flatten(2)[real], atol=1e-12, rtol=0)
    own = attention_probabilities(
        heads[0], heads[1].repeat_interleave(2, 1), real, scale=SIZES["scale"], sink_logits=sinks
    )
    torch.testing.assert_close(own.transpose(1, 2)[real], A.transpose(1, 2)[real], atol=1e-12, rtol=0)
    assert (own.sum(-1) < 1 + 1e-12).all()


def test_calibration_keeps_what_a_learned_sink_left_of_a_row():
    rng = np.random.default_rng(8)
    query, key, value = (torch.from_numpy(rng.standard_normal((1, 12, n * 8))) for n in (4, 2, 2))
    cache, mask = torch.zeros(1, 2, 0, 8, dtype=torch.float64), torch.ones(1, 12)
    sinks = torch.tensor([1.0, -0.5, 2.0, 0.0], dtype=torch.float64)
    options = {**SIZES, "calibrated_heads": [2], "sink_logits": sinks}
    state = (torch.zeros(1, 1, 0, 1), mask, torch.tensor([[[0.4, 1.0, 0.05]]], dtype=torch.float64))
    result = calibrated_attention(query, key, value, cache, cache, *state, **options)
    heads = [x.view(1, 12, -1, 8).transpose(1, 2) for x in (query, key, value)]
    _, A = gpt_oss_attention(*heads, mask, sinks, SIZES["scale"])
    calibrated, sums, later, closest = by_loop(A[0, 2].numpy(), beta=0.4, threshold=0.05)
    assert closest > MARGIN
    assert later
    assert_close(result.present_sink_scores[0, 0, :, 0], sums, 1e-6)
    np.testing.assert_allclose(result.output[0].view(12, 4, 8)[:, 2], calibrated @ heads[2][0, 1].numpy(), atol=1e-12)


def test_learned_sinks_are_differentiable():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    real = torch.ones(1, 3, dtype=torch.bool)

    def probabilities(q, k, s):
        return attention_probabilities(q, k, real, scale=0.7, sink_logits=s)

    inputs = [x.requires_grad_() for x in (query, key, sinks)]
    assert torch.autograd.gradcheck(probabilities, inputs)


def test_a_wrong_number_of_sink_logits_is_an_error():
    query = torch.zeros(1, 4, 2, 8)
    with pytest.raises(ValueError, match=r"sink_logits has shape \(3,\); 4 heads need 1 or one each"):
        attention_probabilities(query, query, torch.ones(1, 2, dtype=torch.bool), scale=1.0, sink_logits=[0.0] * 3)
