from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from close import assert_close
from hypothesis import given
from hypothesis import strategies as st
from planted import planted_task, reference_scores, words_checkpoint, written_by

from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.search import SearchOptions, Threshold
from act_export.search.answers import RANK, EncodedTask, encode_task
from act_export.search.processes import Workers
from act_export.search.rank import first_heads, rank_heads, ranking_cost
from act_export.search.request import RANKINGS
from act_export.tasks.scoring import predicted_choice

THRESHOLD = Threshold(0.1)
OPTIONS = SearchOptions(methods=("act",), ranking="exhaustive", betas=(0.2, 1.5), confirm=3, batch_tokens=100)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return words_checkpoint()


@pytest.fixture(scope="module", params=["one token", "several tokens", "written"])
def task(checkpoint: Checkpoint, request: pytest.FixtureRequest) -> EncodedTask:
    sizes = (8, 4, 4)
    if request.param == "written":
        made = written_by(checkpoint, Calibration({0: (2,)}), sizes=sizes)
    else:
        choices = (" w97", " w98") if request.param == "one token" else (" w97 w5", " w98 w9 w4")
        made = planted_task(checkpoint, None, choices=choices, sizes=sizes, length_normalized=True)
    return encode_task(checkpoint, made)


def naive_effects(checkpoint: Checkpoint, task: EncodedTask, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head switched on in turn, everything run anew through the reference hook."""
    examples = list(task.splits[RANK])
    results = []
    for calibration in (None, *(Calibration({la: (he,)}, beta, 0.1) for la in range(2) for he in range(4))):
        per_token = task.task.length_normalized or task.task.generation is not None
        rows = reference_scores(checkpoint, calibration, examples, length_normalized=per_token)
        gains = [
            torch.tensor(row, dtype=torch.float64).log_softmax(0)[e.answer].item() if len(row) > 1 else row[0]
            for row, e in zip(rows, examples, strict=True)
        ]
        right = sum(predicted_choice(row) == e.answer for row, e in zip(rows, examples, strict=True))
        results.append((sum(gains) / len(gains), right))
    (plain, plain_right), *others = results
    effect = torch.tensor([gain - plain for gain, _ in others], dtype=torch.float64).view(2, 4)
    return effect, torch.tensor([right - plain_right for _, right in others]).view(2, 4)


@pytest.mark.sampled(1)
def test_exhaustive_effects_are_those_of_each_head_alone(checkpoint: Checkpoint, task: EncodedTask) -> None:
    ((effects,),) = rank_heads(checkpoint, [task], OPTIONS, Workers()).own
    assert set(effects.log_likelihood) == set(effects.correct) == {0.2, 1.5}
    for beta in OPTIONS.betas:
        expected, correct = naive_effects(checkpoint, task, beta)
        assert_close(effects.log_likelihood[beta], expected, 1e-5)
        assert torch.equal(effects.correct[beta], correct)
        assert expected.abs().max() > 0.005
    count = len(task.splits[RANK])
    most = 2 * 4 * (1 + 0.5)  # both betas, four heads, from the first layer on and from the second
    assert 2 * count < effects.passes <= count * (1 + most)


def test_confirmed_effects_are_the_exhaustive_ones_of_the_heads_that_gates_rank_first(
    checkpoint: Checkpoint, task: EncodedTask
) -> None:
    gates, confirmed, exhaustive = (
        rank_heads(checkpoint, [task], replace(OPTIONS, ranking=ranking), Workers()).own[0][0]
        for ranking in ("gradient", "gradient+confirm", "exhaustive")
    )
    for beta in OPTIONS.betas:
        first = first_heads(gates.log_likelihood[beta], 3)
        assert 0 < len(first) <= 3
        for layer in range(2):
            for head in range(4):
                effect = confirmed.log_likelihood[beta][layer, head]
                if (layer, head) in first:
                    assert effect == pytest.approx(exhaustive.log_likelihood[beta][layer, head].item(), abs=1e-6)
                else:
                    assert effect == float("-inf")
    assert gates.passes == 3 * len(task.splits[RANK])
    assert gates.passes < confirmed.passes < gates.passes + exhaustive.passes


@pytest.mark.sampled(1)
def test_gates_give_the_slope_of_the_effects_at_beta_1(task: EncodedTask) -> None:
    """One pass serves all betas."""
    checkpoint = words_checkpoint()
    checkpoint.model.double()
    options = replace(OPTIONS, ranking="gradient", betas=(0.3, 1.7, 0.0))
    ((estimated,),) = rank_heads(checkpoint, [task], options, Workers()).own
    assert estimated.correct == {}
    (weaker, _), (stronger, _) = (naive_effects(checkpoint, task, beta) for beta in (1 - 1e-4, 1 + 1e-4))
    slope = (weaker - stronger) / 2e-4
    assert (estimated.log_likelihood[0.0] - slope).norm() < 0.2 * slope.norm()  # the model bends sharply
    assert slope.abs().max() > 0.02
    for beta in (0.3, 1.7):
        torch.testing.assert_close(estimated.log_likelihood[beta], (1 - beta) * estimated.log_likelihood[0.0])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_batches_and_checkpointing_change_nothing_but_rounding(
    checkpoint: Checkpoint, task: EncodedTask, ranking: str
) -> None:
    options = replace(OPTIONS, ranking=ranking)
    ((expected,),) = rank_heads(checkpoint, [task], replace(options, batch_tokens=10_000), Workers()).own
    for changed in (replace(options, batch_tokens=1), replace(options, gradient_checkpointing=True)):
        ((effects,),) = rank_heads(checkpoint, [task], changed, Workers()).own
        for beta in options.betas:
            torch.testing.assert_close(
                effects.log_likelihood[beta], expected.log_likelihood[beta], atol=1e-5, rtol=1e-5
            )
        assert effects.passes == pytest.approx(expected.passes)


@pytest.mark.parametrize("ranking", RANKINGS)
def test_the_planned_cost_is_about_what_is_spent(checkpoint: Checkpoint, task: EncodedTask, ranking: str) -> None:
    options = replace(OPTIONS, ranking=ranking, confirm=100)
    workers = Workers()
    rank_heads(checkpoint, [task], options, workers)
    planned = ranking_cost(task, options, num_layers=2, num_heads=4)
    assert 0.6 < workers.cost_done / planned < 1.6


@given(
    values=st.lists(st.integers(-9, 9), min_size=12, max_size=12, unique=True).map(
        lambda values: torch.tensor(values, dtype=torch.float64).view(3, 4)
    ),
    count=st.integers(0, 20),
)
def test_first_heads_are_those_with_the_largest_positive_effects(values: torch.Tensor, count: int) -> None:
    heads = first_heads(values, count)
    effects = [values[head].item() for head in heads]
    positive = sorted(values[values > 0].tolist(), reverse=True)
    assert effects == positive[:count]
    assert all(isinstance(layer, int) and isinstance(head, int) for layer, head in heads)


def test_of_equal_effects_the_lower_head_comes_first() -> None:
    assert first_heads(torch.tensor([[0.0, 2.0], [2.0, 2.0]]), 2) == [(0, 1), (1, 0)]
    assert first_heads(torch.tensor([[float("-inf"), 2.0], [float("-inf"), 3.0]]), 9) == [(1, 1), (0, 1)]
