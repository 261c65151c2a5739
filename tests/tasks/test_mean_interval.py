from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks.statistics import gain_interval, mean_interval

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
