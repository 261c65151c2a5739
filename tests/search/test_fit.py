"""Fitted strengths: the definition's own gradient, and what a few steps of it do."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from close import assert_close, assert_logits_close
from planted import planted_task, reference_scores, words_checkpoint
from transformers import PreTrainedModel

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.search import SearchOptions, Threshold, search_heads
from act_export.search.answers import RANK, EncodedTask, encode_task
from act_export.search.fit import FittedAttention, fit_strengths
from act_export.search.gates import likelihood_gradient
from act_export.search.processes import Workers
from act_export.search.proposals import strengths_by_head, with_strengths
from act_export.search.rank import rank_heads
from act_export.tasks import EncodedExample
from act_export.tasks.remedies import Remedy

PLANTED = Calibration({0: (1,)}, beta=0.0, gamma=4.0)
SIZES = (12, 12, 4)
OPTIONS = SearchOptions(methods=("fit",), fit_steps=(1, 8), batch_tokens=200)


def every_head(strengths: torch.Tensor, threshold: Threshold) -> Calibration:
    """The calibration file with these beta and gamma (2, layers, heads)."""
    layers, heads = strengths.shape[1:]
    by_head = {
        (layer, head): (strengths[0, layer, head].item(), strengths[1, layer, head].item())
        for layer, head in product(range(layers), range(heads))
    }
    return replace(with_strengths(by_head, threshold, None), model=None)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_it_is_the_definition(name: str, request: pytest.FixtureRequest) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    ids = torch.tensor([[0, 0, 5, 17, 99, 5, 40, 5, 3], [9, 8, 7, 8, 8, 7, 1, 2, 2]])
    mask = (ids > 0).long()
    threshold = Threshold(0.08)
    logs = (torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)) * 0.4).clamp(max=0.6)
    with torch.no_grad(), attention_hook(model, FittedAttention(logs, threshold)) as hooked:
        fitted = hooked(ids, mask)
        longer = hooked(ids[:, :1], torch.cat([mask, mask.new_ones(2, 1)], 1), fitted.state)
    with torch.no_grad(), attention_hook(model, ReferenceAttention(every_head(logs.exp(), threshold))) as hooked:
        expected = hooked(ids, mask)
        after = hooked(ids[:, :1], torch.cat([mask, mask.new_ones(2, 1)], 1), expected.state)
    assert_logits_close(fitted.logits[mask > 0], expected.logits[mask > 0], 2e-5)
    assert_logits_close(longer.logits, after.logits, 2e-5)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return words_checkpoint()


@pytest.fixture(scope="module", params=[(" w97", " w98"), (" w97 w5", " w98 w9 w4 w4")], ids=["one token", "several"])
def task(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> EncodedTask:
    return encode_task(
        checkpoint, planted_task(checkpoint, PLANTED, choices=request.param, sizes=SIZES, length_normalized=True)
    )


def log_likelihood(
    checkpoint: Checkpoint,
    examples: list[EncodedExample],
    strengths: torch.Tensor,
    remedy: Remedy | None = None,
) -> float:
    """Mean over the examples, each alone and token by token, through the reference hook."""
    rows = reference_scores(checkpoint, every_head(strengths, Threshold()), examples, length_normalized=True)
    sharpness, offsets = remedy or (1.0, (0.0, 0.0))
    moved = [sharpness * torch.tensor(row).double() + torch.tensor(offsets) for row in rows]
    right = [row.log_softmax(0)[e.answer] for row, e in zip(moved, examples, strict=True)]
    return torch.stack(right).mean().item()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("remedy", [None, Remedy(2.0, (0.7, -0.7))], ids=["as it is", "with a remedy"])
def test_the_gradient_is_finite_differences(checkpoint: Checkpoint, task: EncodedTask, remedy: Remedy | None) -> None:
    examples = list(task.splits[RANK])
    logs = (torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(2)) * 0.3).clamp(max=0.6)
    gradient = likelihood_gradient(
        checkpoint.model, FittedAttention(logs, Threshold()), logs, examples, length_normalized=True, remedy=remedy
    ).gradient
    gradient = gradient / len(examples)
    logs = logs.detach().double()
    step = 2e-3
    measured = torch.zeros_like(logs)
    for place in product(range(2), range(2), range(4)):
        moved = torch.zeros_like(logs)
        moved[place] = step
        above, below = (log_likelihood(checkpoint, examples, (logs + sign * moved).exp(), remedy) for sign in (1, -1))
        measured[place] = (above - below) / (2 * step)
    assert measured.abs().max() > 1e-2
    torch.testing.assert_close(gradient, measured, atol=2e-3, rtol=2e-2)


def test_at_one_the_gradient_is_the_rankings(checkpoint: Checkpoint, task: EncodedTask) -> None:
    ((effects,),) = rank_heads(checkpoint, [task], OPTIONS, Workers()).own
    examples = list(task.splits[RANK])
    logs = torch.zeros(2, 2, 4)
    gradient = likelihood_gradient(
        checkpoint.model, FittedAttention(logs, Threshold()), logs, examples, length_normalized=True
    ).gradient
    gradient = gradient / len(examples)
    assert effects.slopes is not None
    assert_close(gradient, effects.slopes, 1e-5)


def fit(checkpoint: Checkpoint, task: EncodedTask, options: SearchOptions, l2: float = 0.0) -> dict[int, torch.Tensor]:
    ((effects,),) = rank_heads(checkpoint, [task], options, Workers()).own
    assert effects.slopes is not None
    return fit_strengths(checkpoint, [task], effects.slopes, Threshold(), l2, options, Workers())


def test_steps_make_the_right_answers_likelier(checkpoint: Checkpoint, task: EncodedTask) -> None:
    examples = list(task.splits[RANK])
    found = fit(checkpoint, task, OPTIONS)
    assert list(found) == [1, 8]
    plain, first, last = (
        log_likelihood(checkpoint, examples, strengths) for strengths in (torch.ones(2, 2, 4), found[1], found[8])
    )
    assert plain + 0.01 < first < last
    assert found[8][0].max() <= 2


def test_penalties_keep_strengths_near_one(checkpoint: Checkpoint, task: EncodedTask) -> None:
    free = fit(checkpoint, task, OPTIONS)[8].log().abs()
    held = fit(checkpoint, task, OPTIONS, l2=10.0)[8].log().abs()
    assert held.mean() < free.mean() / 2


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_l1_leaves_strengths_with_small_derivatives_at_one(
    checkpoint: Checkpoint, task: EncodedTask, share: float
) -> None:
    """After the first step exactly those with at least this share of the largest have moved, each as it should."""
    ((effects,),) = rank_heads(checkpoint, [task], OPTIONS, Workers()).own
    slopes = effects.slopes
    assert slopes is not None
    found = fit(checkpoint, task, replace(OPTIONS, fit_steps=(1,), fit_l1=share))[1]
    large = slopes.abs() > share * slopes.abs().max()
    assert 0 < large.sum() < slopes.numel()
    assert torch.equal(found != 1, large)
    assert torch.equal(found[large] > 1, slopes[large] > 0)


def test_gradient_checkpointing_changes_memory_not_the_fit(checkpoint: Checkpoint, task: EncodedTask) -> None:
    options = replace(OPTIONS, fit_steps=(2,))
    saved: list[int] = []
    found = []
    for saving in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            found.append(fit(checkpoint, task, replace(options, gradient_checkpointing=saving))[2])
            found.append(torch.tensor(sum(saved)))
        saved.clear()
    torch.testing.assert_close(found[0], found[2], atol=1e-4, rtol=1e-4)
    assert found[3] < found[1]


def test_a_search_finds_strengths_that_answer_unseen_questions(checkpoint: Checkpoint) -> None:
    planted = planted_task(checkpoint, Calibration({0: (1, 2)}, 0.3, gamma=4.0))
    options = replace(OPTIONS, fit_steps=(3, 12))
    result = search_heads(checkpoint, [planted], options)
    found, report = result.calibrations["planted"], result.reports["planted"]
    assert found.provenance is not None
    assert found.provenance.method == "fit"
    assert report.own is not None
    assert report.own.interval[0] > 0
    assert set(report.choose_accuracy) == {"plain", "fit: 8 heads after 3 steps", "fit: 8 heads after 12 steps"}
    assert len(set(strengths_by_head(found).values())) > 4
    again = Calibration.from_json(found.to_json())
    assert (again.beta, again.gamma) == (found.beta, found.gamma)
