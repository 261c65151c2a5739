from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act_export.search.choose import Heads, Scores, candidate_heads, choose_heads
from act_export.tasks import EncodedExample

EXAMPLES = [EncodedExample((1,), ((2,), (3,)), index % 2) for index in range(40)]


def scores(correct: int, margin: float = 1.0) -> Scores:
    """The first `correct` examples are answered rightly; the right answer is ahead, or behind, by the margin."""
    rows = []
    for index, example in enumerate(EXAMPLES):
        row = [0.0, 0.0]
        row[example.answer] = margin if index < correct else -margin
        rows.append(tuple(row))
    return rows


def heads_of(count: int) -> Heads:
    return {0: tuple(range(count))} if count else {}


@given(
    values=st.lists(st.integers(-9, 9), min_size=12, max_size=12, unique=True),
    counts=st.lists(st.integers(1, 20), max_size=5),
)
def test_candidates_are_the_heads_with_the_largest_positive_gradients(values: list[int], counts: list[int]) -> None:
    gradients = torch.tensor(values, dtype=torch.float32).view(3, 4)
    helpful = sum(value > 0 for value in values)
    candidates = candidate_heads(gradients, counts)
    sizes = [sum(map(len, heads.values())) for heads in candidates]
    assert sizes == sorted({min(count, helpful) for count in counts} - {0})
    for size, heads in zip(sizes, candidates, strict=True):
        assert all(list(indices) == sorted(indices) for indices in heads.values())
        chosen = {gradients[layer, head].item() for layer, indices in heads.items() for head in indices}
        assert chosen == set(sorted(values)[-size:])


def test_the_most_accurate_candidate_is_chosen() -> None:
    results = {0: scores(20), 1: scores(28), 2: scores(36), 3: scores(30)}
    choice = choose_heads([heads_of(n) for n in (1, 2, 3)], EXAMPLES, lambda heads: results[len(heads.get(0, ()))])
    assert choice.heads == heads_of(2)
    assert choice.p < 0.01
    assert [candidate.num_heads for candidate in choice.candidates] == [0, 1, 2, 3]
    assert [candidate.accuracy for candidate in choice.candidates] == [0.5, 0.7, 0.9, 0.75]
    assert choice.candidates[0].log_likelihood == pytest.approx(torch.tensor([1.0, -1.0]).sigmoid().log().mean().item())


def test_of_equally_accurate_candidates_the_likelier_answers_win() -> None:
    results = {0: scores(20), 1: scores(36, 0.1), 2: scores(36, 1.0), 3: scores(36, 0.2)}
    choice = choose_heads([heads_of(n) for n in (1, 2, 3)], EXAMPLES, lambda heads: results[len(heads.get(0, ()))])
    assert choice.heads == heads_of(2)


@pytest.mark.parametrize("correct", [4, 20, 22])
def test_no_head_is_chosen_where_the_gain_may_be_luck(correct: int) -> None:
    results = {0: scores(20), 3: scores(correct), 5: scores(correct)}
    choice = choose_heads([heads_of(n) for n in (3, 5)], EXAMPLES, lambda heads: results[len(heads.get(0, ()))])
    assert choice.heads == {}
    assert choice.p > 0.05


def test_no_head_is_chosen_where_none_has_a_positive_gradient() -> None:
    assert candidate_heads(torch.zeros(2, 2)) == []
    choice = choose_heads([], EXAMPLES, lambda heads: scores(20))
    assert choice.heads == {}
    assert [candidate.num_heads for candidate in choice.candidates] == [0]
