from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.search.answers import Answers
from act_export.search.choose import Choice, candidate_calibrations, choose, heads_with_betas, other_heads
from act_export.search.request import Threshold

MODEL = ModelIdentity("llama", 3, 4, "sha256:0")
THRESHOLD = Threshold(3.0, "relative")
effects_of_heads = st.lists(st.integers(-9, 9), min_size=12, max_size=12, unique=True).map(
    lambda values: torch.tensor(values, dtype=torch.float64).view(3, 4)
)


def answers(credits: list[float], log_likelihood: float = -1.0) -> Answers:
    return Answers(((),) * len(credits), tuple(credits), log_likelihood)


def right(correct: int, total: int = 40, log_likelihood: float = -1.0) -> Answers:
    """The first questions are answered rightly."""
    return answers([1.0] * correct + [0.0] * (total - correct), log_likelihood)


def choice_of(plain: Answers, *tried: Answers) -> Choice:
    candidates = [Calibration({0: tuple(range(count))}) for count in range(1, len(tried) + 1)]
    return choose(candidates, [plain], [[one] for one in tried])


@given(effects=effects_of_heads, counts=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_candidates_are_the_heads_with_the_largest_positive_effects(effects: torch.Tensor, counts: list[int]) -> None:
    helpful = int((effects > 0).sum())
    candidates = candidate_calibrations({0.4: effects}, counts, THRESHOLD, MODEL)
    sizes = [candidate.num_calibrated_heads for candidate in candidates]
    assert sizes == sorted({min(count, helpful) for count in counts} - {0})
    for size, candidate in zip(sizes, candidates, strict=True):
        assert (candidate.beta, candidate.threshold, candidate.threshold_mode) == (0.4, 3.0, "relative")
        assert candidate.model == MODEL
        chosen = {effects[layer, head].item() for layer, heads in candidate.heads.items() for head in heads}
        assert chosen == set(sorted(effects.flatten().tolist())[-size:])


@given(
    effects=st.dictionaries(st.sampled_from([0.0, 0.4, 1.2, 1.7]), effects_of_heads, min_size=1),
    counts=st.sets(st.integers(1, 14), min_size=1, max_size=3),
)
def test_each_beta_is_tried_alone_and_with_each_on_the_other_side_of_1(
    effects: dict[float, torch.Tensor], counts: set[int]
) -> None:
    candidates = candidate_calibrations(effects, sorted(counts), THRESHOLD, MODEL)
    weak, strong = ([beta for beta in effects if (beta < 1) == below] for below in (True, False))
    expected = set()
    for way in [*((beta,) for beta in effects), *product(weak, strong)]:
        best = {
            divmod(index, 4): max((effects[beta].flatten()[index].item(), -beta, beta) for beta in way)
            for index in range(12)
        }
        for first, second in product(way, way):  # of equal effects either may be taken
            assume(first == second or not (effects[first] == effects[second]).any())
        ordered = sorted(best, key=lambda head: -best[head][0])
        assume(len({value for value, *_ in best.values()}) == 12)
        for count in counts:
            helpful = [head for head in ordered if best[head][0] > 0][:count]
            if helpful:
                expected.add(frozenset((head, best[head][2]) for head in helpful))
    found = [frozenset(heads_with_betas(candidate).items()) for candidate in candidates]
    assert set(found) == expected
    assert len(found) == len(expected)
    for candidate in candidates:
        assert isinstance(candidate.beta, float) == (len(set(heads_with_betas(candidate).values())) == 1)


def test_no_candidate_where_no_head_helps() -> None:
    effects = {0.4: torch.zeros(3, 4), 1.5: torch.full((3, 4), float("-inf"))}
    assert candidate_calibrations(effects, (1, 5), THRESHOLD, MODEL) == []
    choice = choose([], [right(20)], [])
    assert choice.chosen.calibration.heads == {}
    assert (len(choice.candidates), choice.p) == (1, 1.0)


def test_the_most_accurate_candidate_is_chosen() -> None:
    choice = choice_of(right(20), right(28), right(36), right(30))
    assert choice.chosen.calibration.heads == {0: (0, 1)}
    assert choice.p < 0.01
    assert [candidate.calibration.num_calibrated_heads for candidate in choice.candidates] == [0, 1, 2, 3]
    assert [candidate.accuracy for candidate in choice.candidates] == [0.5, 0.7, 0.9, 0.75]


def test_of_equally_accurate_candidates_the_likelier_answers_win_then_the_first() -> None:
    choice = choice_of(right(20), right(36, log_likelihood=-0.6), right(36, log_likelihood=-0.1), right(36))
    assert choice.chosen.calibration.heads == {0: (0, 1)}
    assert choice_of(right(20), right(36), right(36)).chosen.calibration.heads == {0: (0,)}


@pytest.mark.parametrize("correct", [4, 20, 22])
def test_no_head_is_chosen_where_the_gain_may_be_luck(correct: int) -> None:
    choice = choice_of(right(20), right(correct), right(correct))
    assert choice.chosen.calibration.heads == {}
    assert choice.p > 0.05


def test_trying_more_makes_a_chance_finding_no_likelier() -> None:
    """Answers that are as often right as the plain ones, 40 candidates: the best gains, by luck."""
    random = np.random.default_rng(0)
    refused = luckier = 0
    for _ in range(20):
        plain, *tried = (answers(random.integers(0, 2, 60).astype(float).tolist()) for _ in range(41))
        choice = choice_of(plain, *tried)
        luckier += max(candidate.accuracy for candidate in choice.candidates) > choice.candidates[0].accuracy + 0.05
        refused += not choice.chosen.calibration.heads
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
    p = choose([Calibration({0: (0,)})], [plain, right(1, other)], [[after, right(1, other)]]).p
    signs = np.array(list(product([-1, 1], repeat=len(changes))))
    assert p == pytest.approx((signs.sum(1) >= sum(changes)).mean(), abs=0.02)


def test_every_task_counts_the_same_however_many_questions_it_has() -> None:
    """A gain of 30 of 40 questions and a loss of all 6: no gain on average, though more answers are right."""
    large, small = right(10, 40), right(6, 6)
    choice = choose([Calibration({0: (0,)})], [large, small], [[right(40, 40), right(0, 6)]])
    assert choice.chosen.calibration.heads == {}
    assert choice.candidates[1].accuracy == 0.5 < choice.candidates[0].accuracy
    assert choice.p > 0.5
    kept = choose([Calibration({0: (0,)})], [large, small], [[right(40, 40), right(5, 6)]])
    assert kept.chosen.calibration.heads == {0: (0,)}
    # Without weights the 6 questions would hardly count: a loss of 3 of them, against 12 of 40 gained, is a draw.
    luck = choose([Calibration({0: (0,)})], [right(20, 40), small], [[right(32, 40), right(3, 6)]])
    assert luck.chosen.calibration.heads == {}
    assert luck.p > 0.05


def test_credits_between_right_and_wrong_count() -> None:
    plain, after = answers([0.25] * 20), answers([0.75] * 19 + [0.0])
    choice = choose([Calibration({0: (0,)})], [plain], [[after]])
    assert choice.chosen.calibration.heads == {0: (0,)}
    assert choice.chosen.accuracy == pytest.approx(0.7125)


@given(
    heads=st.dictionaries(st.integers(0, 2), st.sets(st.integers(0, 3), min_size=1).map(sorted).map(tuple), min_size=1),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_random_heads_are_as_many_with_the_same_betas(
    heads: dict[int, tuple[int, ...]], data: st.DataObject, seed: int
) -> None:
    beta = {layer: tuple(data.draw(st.sampled_from([0.0, 0.4, 1.5])) for _ in of) for layer, of in heads.items()}
    calibration = Calibration(heads, beta, 3.0, "relative", MODEL)
    other = other_heads(calibration, MODEL, seed=seed)
    assert sorted(heads_with_betas(other).values()) == sorted(heads_with_betas(calibration).values())
    assert (other.threshold, other.threshold_mode) == (3.0, "relative")
    other.check_fits(MODEL)
    assert other == other_heads(calibration, MODEL, seed=seed)


def test_random_heads_are_drawn_from_all() -> None:
    calibration = Calibration({0: (0, 1)}, 0.4, model=MODEL)
    drawn = [other_heads(calibration, MODEL, seed=seed) for seed in range(60)]
    assert {head for other in drawn for head in heads_with_betas(other)} == set(product(range(3), range(4)))
    assert all(other.beta == 0.4 for other in drawn)
