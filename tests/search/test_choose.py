from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.calibration.file import Calibration
from act_export.search.answers import Answers
from act_export.search.choose import Choice, choose
from act_export.search.proposals import Proposal
from act_export.tasks.remedies import remedied_log_likelihoods


def answers(credits: list[float], log_likelihood: float = -1.0) -> Answers:
    return Answers(((),) * len(credits), tuple(credits), log_likelihood)


def right(correct: int, total: int = 40, log_likelihood: float = -1.0) -> Answers:
    """The first questions are answered rightly."""
    return answers([1.0] * correct + [0.0] * (total - correct), log_likelihood)


def proposal(count: int = 1) -> Proposal:
    return Proposal("act", f"act: {count} heads", Calibration({0: tuple(range(count))}))


def heads_chosen(choice: Choice) -> dict[int, tuple[int, ...]]:
    return dict(choice.chosen.proposal.calibration.heads) if choice.chosen.proposal is not None else {}


def choice_of(plain: Answers, *tried: Answers) -> Choice:
    proposals = [proposal(count) for count in range(1, len(tried) + 1)]
    return choose(proposals, [plain], [[one] for one in tried])


def test_the_plain_model_where_nothing_is_proposed() -> None:
    choice = choose([], [right(20)], [])
    assert heads_chosen(choice) == {}
    assert (len(choice.candidates), choice.p) == (1, 1.0)


def test_the_most_accurate_candidate_is_chosen() -> None:
    choice = choice_of(right(20), right(28), right(36), right(30))
    assert heads_chosen(choice) == {0: (0, 1)}
    assert choice.p < 0.01
    assert [c.proposal.label if c.proposal else None for c in choice.candidates] == [
        None,
        "act: 1 heads",
        "act: 2 heads",
        "act: 3 heads",
    ]
    assert [candidate.accuracy for candidate in choice.candidates] == [0.5, 0.7, 0.9, 0.75]


def test_of_equally_accurate_candidates_the_likelier_answers_win_then_the_first() -> None:
    choice = choice_of(right(20), right(36, log_likelihood=-0.6), right(36, log_likelihood=-0.1), right(36))
    assert heads_chosen(choice) == {0: (0, 1)}
    assert heads_chosen(choice_of(right(20), right(36), right(36))) == {0: (0,)}


@pytest.mark.parametrize("correct", [4, 20, 22])
def test_no_head_is_chosen_where_the_gain_may_be_luck(correct: int) -> None:
    choice = choice_of(right(20), right(correct), right(correct))
    assert heads_chosen(choice) == {}
    assert choice.p > 0.05


def test_trying_more_makes_a_chance_finding_no_likelier() -> None:
    """Answers that are as often right as the plain ones, 40 candidates: the best gains, by luck."""
    random = np.random.default_rng(0)
    refused = luckier = 0
    for _ in range(20):
        plain, *tried = (answers(random.integers(0, 2, 60).astype(float).tolist()) for _ in range(41))
        choice = choice_of(plain, *tried)
        luckier += max(candidate.accuracy for candidate in choice.candidates) > choice.candidates[0].accuracy + 0.05
        refused += not heads_chosen(choice)
    assert luckier >= 10
    assert refused >= 17


@given(
    changes=st.lists(st.sampled_from([-1, 1]), min_size=1, max_size=10),
    unchanged=st.integers(0, 20),
    other=st.integers(1, 30),
)
def test_the_test_is_exact_for_one_candidate_whatever_another_task_adds(
    changes: list[int], unchanged: int, other: int
) -> None:
    """McNemar's one-sided p, by counting; a task where nothing changes alters nothing."""
    plain = answers([float(change < 0) for change in changes] + [1.0] * unchanged)
    after = answers([float(change > 0) for change in changes] + [1.0] * unchanged)
    p = choose([proposal()], [plain, right(1, other)], [[after, right(1, other)]]).p
    signs = np.array(list(product([-1, 1], repeat=len(changes))))
    assert p == pytest.approx((signs.sum(1) >= sum(changes)).mean(), abs=0.02)


def test_every_task_counts_the_same_however_many_questions_it_has() -> None:
    """A gain of 30 of 40 questions and a loss of all 6: no gain on average, though more answers are right."""
    large, small = right(10, 40), right(6, 6)
    choice = choose([proposal()], [large, small], [[right(40, 40), right(0, 6)]])
    assert heads_chosen(choice) == {}
    assert choice.candidates[1].accuracy == 0.5 < choice.candidates[0].accuracy
    assert choice.p > 0.5
    kept = choose([proposal()], [large, small], [[right(40, 40), right(5, 6)]])
    assert heads_chosen(kept) == {0: (0,)}
    # Without weights the 6 questions would hardly count: a loss of 3 of them, against 12 of 40 gained, is a draw.
    luck = choose([proposal()], [right(20, 40), small], [[right(32, 40), right(3, 6)]])
    assert heads_chosen(luck) == {}
    assert luck.p > 0.05


def test_credits_between_right_and_wrong_count() -> None:
    plain, after = answers([0.25] * 20), answers([0.75] * 19 + [0.0])
    choice = choose([proposal()], [plain], [[after]])
    assert heads_chosen(choice) == {0: (0,)}
    assert choice.chosen.accuracy == pytest.approx(0.7125)


def test_likelier_answers_that_are_no_more_often_right_are_refused() -> None:
    """All answers a little likelier, as p says beyond luck; the same 30 of 40 right."""
    plain, after = right(30), right(30)
    worths = {id(plain): np.linspace(-2, -1, 40), id(after): np.linspace(-1.9, -0.8, 40)}

    def worth(_: int, of: Answers) -> list[float]:
        return worths[id(of)].tolist()

    def credit(_: int, of: Answers) -> tuple[float, ...]:
        return of.credits

    assert heads_chosen(choose([proposal()], [plain], [[after]], worth)) == {0: (0,)}
    refused = choose([proposal()], [plain], [[after]], worth, credit)
    assert (heads_chosen(refused), refused.p, len(refused.candidates)) == ({}, 1.0, 2)
    more = right(31)
    worths[id(more)] = worths[id(after)]
    assert heads_chosen(choose([proposal()], [plain], [[more]], worth, credit)) == {0: (0,)}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("questions", "choices", "signal"), [(48, 5, 0.5), (48, 2, 0.0), (128, 2, 1.0)])
def test_beyond_a_remedy_chance_is_seldom_taken_for_a_gain(questions: int, choices: int, signal: float) -> None:
    """Candidates as good as the leaning plain model, each in its own way and with its own lean and confidence."""
    rng = np.random.default_rng(0)
    found = 0
    for _ in range(100):
        right = rng.integers(0, choices, questions)
        common = rng.normal(size=(questions, choices)) + signal * np.eye(choices)[right]

        def model(common: np.ndarray = common) -> list[tuple[float, ...]]:
            own = rng.normal(size=common.shape) * 0.5
            scores = rng.uniform(0.3, 5) * (common + own) + rng.normal(size=common.shape[1]) * 3
            return [tuple(row) for row in scores.tolist()]

        plain, *tried = (Answers(tuple(model()), (0.0,) * questions, 0.0) for _ in range(5))
        choice = choose(
            [proposal(count) for count in range(1, 5)],
            [plain],
            [[one] for one in tried],
            lambda _, of, right=right: remedied_log_likelihoods(of.scores, right.tolist(), offsets=True),
        )
        found += choice.chosen.proposal is not None
    assert found <= 11  # of 5 on average: more is drawn once in 200 times
