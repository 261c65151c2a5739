from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration

CALIBRATIONS = {
    "plain": None,
    "some heads": Calibration({0: (1, 3), 2: (0,)}, beta={0: (0.0, 0.7), 2: (1.8,)}, threshold=0.08),
    "all heads": Calibration(dict.fromkeys(range(3), (0, 1, 2, 3)), beta=0.4, threshold=1.5, threshold_mode="relative"),
}


@pytest.fixture(params=["llama", "mistral", "gemma2", "gpt_oss"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    loaded: PreTrainedModel = request.getfixturevalue(request.param)
    return loaded


@pytest.mark.parametrize("calibration", CALIBRATIONS.values(), ids=CALIBRATIONS.keys())
def test_agrees_with_the_reference_with_padding_and_past(
    model: PreTrainedModel, calibration: Calibration | None
) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 128, (3, 12), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    mask[2, :7] = 0
    results = []
    for hook in (ReferenceAttention(calibration), FastAttention(calibration)):
        logits, state = [], None
        with attention_hook(model, hook) as hooked, torch.no_grad():
            for start, end in ((0, 8), (8, 11), (11, 12)):
                outputs = hooked(ids[:, start:end], mask[:, :end], state)
                logits.append(outputs.logits)
                state = outputs.state
        results.append((torch.cat(logits, 1)[mask > 0], state))
    (expected, expected_state), (actual, actual_state) = results
    torch.testing.assert_close(actual, expected, atol=1e-7, rtol=1e-7)
    real = mask[:, None, :, None].double()
    for mine, reference in zip(actual_state, expected_state, strict=True):
        for name in ("key", "value", "sink_scores"):
            torch.testing.assert_close(
                getattr(mine, name) * real, getattr(reference, name) * real, atol=1e-5, rtol=1e-5, check_dtype=False
            )


def test_is_as_differentiable_as_the_reference(gpt_oss: PreTrainedModel) -> None:
    """Learned sinks take part in what flows back to the layer before, and to themselves."""
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    sinks = [layer.self_attn.sinks.requires_grad_() for layer in gpt_oss.model.layers]
    gradients = []
    for hook in (ReferenceAttention(None), FastAttention(None)):
        with attention_hook(gpt_oss, hook) as hooked:
            gradients.append(torch.autograd.grad(hooked(ids, torch.ones_like(ids)).logits.logsumexp(-1).sum(), sinks))
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-6)
        assert expected.abs().max() > 1e-3


def test_the_calibrations_change_the_model(model: PreTrainedModel) -> None:
    """Else the test above would compare plain with plain."""
    ids = torch.randint(0, 128, (2, 12), generator=torch.Generator().manual_seed(3))
    results = []
    for calibration in CALIBRATIONS.values():
        with attention_hook(model, FastAttention(calibration)) as hooked, torch.no_grad():
            results.append(hooked(ids, torch.ones_like(ids)).logits)
    plain, some, everything = results
    assert (some - plain).abs().max() > 1e-3
    assert (everything - some).abs().max() > 1e-3


@pytest.mark.parametrize("calibration", CALIBRATIONS.values(), ids=CALIBRATIONS.keys())
@pytest.mark.parametrize("hook", [ReferenceAttention, FastAttention])
def test_rows_one_at_a_time_are_those_of_a_call_each(
    model: PreTrainedModel, calibration: Calibration | None, hook: type[FastAttention] | type[ReferenceAttention]
) -> None:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 128, (3, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # a shorter prompt
    mask[2, 11:] = 0  # a shorter continuation
    with attention_hook(model, hook(calibration)) as hooked, torch.no_grad():
        state = hooked(ids[:, :8], mask[:, :8]).state
        at_once = hooked(ids[:, 8:], mask, state, one_at_a_time=True)
    with attention_hook(model, ReferenceAttention(calibration)) as hooked, torch.no_grad():
        logits, state = [], hooked(ids[:, :8], mask[:, :8]).state
        for end in range(9, 15):
            step = hooked(ids[:, end - 1 : end], mask[:, :end], state)
            logits.append(step.logits)
            state = step.state
    real = mask[:, 8:] > 0
    torch.testing.assert_close(at_once.logits[real], torch.cat(logits, 1)[real], atol=1e-7, rtol=1e-7)
    for mine, expected in zip(at_once.state, state, strict=True):
        torch.testing.assert_close(mine.sink_scores[:2], expected.sink_scores[:2], atol=1e-5, rtol=1e-5)
