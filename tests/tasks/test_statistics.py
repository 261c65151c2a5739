from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks.statistics import accuracy_interval, best_gain_p, gain_interval, mcnemar_p, mean_interval

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def from_counts(gained: int, lost: int, same: int = 10) -> tuple[list[bool], list[bool]]:
    return [False] * gained + [True] * lost + [True] * same, [True] * gained + [False] * lost + [True] * same


@given(total=st.integers(1, 500), data=st.data())
def test_accuracy_interval_holds_the_accuracy_and_mirrors(total: int, data: st.DataObject) -> None:
    correct = data.draw(st.integers(0, total))
    low, high = accuracy_interval(correct, total)
    assert 0 <= low <= correct / total <= high <= 1
    mirrored_low, mirrored_high = accuracy_interval(total - correct, total)
    assert (1 - mirrored_high, 1 - mirrored_low) == pytest.approx((low, high))


def test_accuracy_interval_of_a_textbook() -> None:
    # Newcombe (1998), "Two-sided confidence intervals for the single proportion", table I, method 3
    assert accuracy_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert accuracy_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_accuracy_interval_refuses_what_is_no_accuracy(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
        accuracy_interval(correct, total)


@given(answers=pairs)
def test_gain_interval_is_antisymmetric_and_within_bounds(answers: list[tuple[bool, bool]]) -> None:
    plain, calibrated = zip(*answers, strict=True)
    low, high = gain_interval(plain, calibrated)
    assert -1 <= low <= high <= 1
    gain = (sum(calibrated) - sum(plain)) / len(plain)
    assert low - 1e-9 <= gain <= high + 1e-9 or len(answers) < 5
    swapped = gain_interval(calibrated, plain)
    tolerance = 4 / len(plain)  # a quantile may fall on the neighbouring count, and these are other draws
    assert (-swapped[1], -swapped[0]) == pytest.approx((low, high), abs=tolerance)


def test_gain_interval_agrees_with_the_normal_approximation() -> None:
    plain, calibrated = from_counts(gained=60, lost=20, same=320)
    low, high = gain_interval(plain, calibrated)
    deviation = math.sqrt(80 / 400 - 0.1**2) / math.sqrt(400)
    assert (low, high) == pytest.approx((0.1 - 1.96 * deviation, 0.1 + 1.96 * deviation), abs=0.006)


def test_gain_interval_of_no_change_is_a_point() -> None:
    assert gain_interval([True, False, True], [True, False, True]) == (0, 0)


@given(gained=st.integers(0, 30), lost=st.integers(0, 30))
def test_mcnemar_is_the_binomial_test(gained: int, lost: int) -> None:
    outcomes = [math.comb(gained + lost, k) for k in range(gained + lost + 1)]
    as_uneven = sum(count for k, count in enumerate(outcomes) if abs(2 * k - gained - lost) >= abs(gained - lost))
    assert mcnemar_p(*from_counts(gained, lost)) == pytest.approx(as_uneven / sum(outcomes))


@given(gained=st.integers(0, 20), lost=st.integers(0, 20))
def test_best_gain_of_one_candidate_is_mcnemar_one_sided(gained: int, lost: int) -> None:
    changed = gained + lost
    exact = sum(math.comb(changed, k) for k in range(gained, changed + 1)) / 2**changed
    plain, calibrated = from_counts(gained, lost)
    assert best_gain_p(plain, [calibrated]) == pytest.approx(exact, abs=0.025)


def test_best_gain_pays_for_the_number_of_candidates() -> None:
    generator = np.random.default_rng(0)
    plain = generator.random(100) < 0.5
    candidates = generator.random((20, 100)) < 0.5
    alone = min(best_gain_p(plain, candidate[None]) for candidate in candidates)
    together = best_gain_p(plain, candidates)
    assert 3 * alone < together
    copies = np.repeat(candidates[:1], 20, axis=0)
    assert best_gain_p(plain, copies) == best_gain_p(plain, candidates[:1])


def test_best_gain_is_seldom_significant_where_there_is_none() -> None:
    generator = np.random.default_rng(1)
    found = 0
    for _ in range(60):
        plain = generator.random(60) < 0.6
        flips = generator.random((6, 60)) < 0.2
        candidates = np.where(flips, generator.random((6, 60)) < 0.6, plain)
        found += best_gain_p(plain, candidates) < 0.05
    assert found <= 8  # 3 are expected; more than 8 has probability 0.005


@pytest.mark.parametrize(("plain", "calibrated"), [([], []), ([True], [True, False]), ([[True]], [[True]])])
def test_answers_that_are_no_pairs_are_refused(plain: list[bool], calibrated: list[bool]) -> None:
    with pytest.raises(ValueError, match="are not pairs"):
        mcnemar_p(plain, calibrated)


groups = st.lists(st.lists(st.floats(-1, 1), min_size=1, max_size=40), min_size=1, max_size=4)


@given(groups=groups, seed=st.integers(0, 9))
def test_the_interval_lies_within_the_numbers_and_around_the_mean(groups: list[list[float]], seed: int) -> None:
    low, high = mean_interval(groups, seed=seed)
    assert np.mean([min(group) for group in groups]) - 1e-9 <= low
    assert high <= np.mean([max(group) for group in groups]) + 1e-9
    assert low <= high
    assert (low, high) == mean_interval([group[::-1] for group in groups], seed=seed)


def test_it_agrees_with_the_interval_of_right_and_wrong() -> None:
    random = np.random.default_rng(1)
    plain, calibrated = random.random((2, 300)) < np.array([[0.5], [0.6]])
    mine = mean_interval([(calibrated.astype(float) - plain).tolist()])
    assert mine == pytest.approx(gain_interval(plain, calibrated), abs=0.01)


@pytest.mark.in_turn(3)
def test_it_covers_the_true_mean_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(100):
        samples = [random.beta(2, 5, size=60).tolist(), random.beta(5, 2, size=120).tolist()]
        low, high = mean_interval(samples)
        covered += low <= (2 / 7 + 5 / 7) / 2 <= high
    assert 88 <= covered <= 100


def test_groups_weigh_the_same_whatever_their_size() -> None:
    low, high = mean_interval([[1.0] * 1000, [0.0]])
    assert low == high == 0.5


@pytest.mark.parametrize("nothing", [[], [[1.0], []]])
def test_there_must_be_numbers(nothing: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="no group of numbers, or one is empty"):
        mean_interval(nothing)
