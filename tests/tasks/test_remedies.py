from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from act_export.tasks import EncodedExample
from act_export.tasks.remedies import (
    fitted_offsets,
    fitted_temperature,
    remedied_log_likelihoods,
    same_choices,
    share_choices,
    with_offsets,
    with_temperature,
    without_choice_bias,
)
from act_export.tasks.scoring import predicted_choice

number = st.floats(-9, 9)
rows = st.lists(st.tuples(number, number, number), min_size=1, max_size=8)


@given(scores=rows, others=rows, bias=st.tuples(number, number, number))
def test_a_constant_bias_disappears(
    scores: list[tuple[float, ...]], others: list[tuple[float, ...]], bias: tuple[float, ...]
) -> None:
    def biased(row: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value + lean for value, lean in zip(row, bias, strict=True))

    # a bias moves the normalizer too, by the same for all choices of a row, so differences within a row are compared
    for clean, leaning in zip(
        without_choice_bias(scores, others),
        without_choice_bias([biased(row) for row in scores], [biased(row) for row in others]),
        strict=True,
    ):
        assert [value - leaning[0] for value in leaning] == pytest.approx(
            [value - clean[0] for value in clean], abs=1e-9
        )


def test_a_leaning_model_becomes_right() -> None:
    questions = [(-2.0, -1.0), (-3.0, -1.0)] * 4  # always the second, but less surely for the even ones
    assert [predicted_choice(row) for row in questions] == [1] * 8
    assert [predicted_choice(row) for row in without_choice_bias(questions, questions)] == [0, 1] * 4


@given(scores=rows)
def test_by_itself_each_question_has_the_mean_of_the_others(scores: list[tuple[float, ...]]) -> None:
    for index, row in enumerate(without_choice_bias(scores)):
        others = scores[:index] + scores[index + 1 :]
        expected = without_choice_bias([scores[index]], others or [(0.0, 0.0, 0.0)])[0]
        assert [value - row[0] for value in row] == pytest.approx([value - expected[0] for value in expected], abs=1e-9)


def test_choices_must_be_the_same_in_every_example() -> None:
    first = EncodedExample((1,), ((2,), (3,)), 0)
    assert same_choices([first, EncodedExample((9,), ((2,), (3,)), 1)])
    assert not same_choices([first, EncodedExample((1,), ((3,), (2,)), 0)])


def missed(scores: Sequence[Sequence[float]], answers: Sequence[int], offsets: Sequence[float], sharpness: float = 1):
    """Sum of -log p(answer), as in a textbook."""
    total = 0.0
    for row, answer in zip(scores, answers, strict=True):
        moved = [sharpness * (score + offset) for score, offset in zip(row, offsets, strict=True)]
        total += max(moved) + math.log(math.fsum(math.exp(each - max(moved)) for each in moved)) - moved[answer]
    return total


wide = st.floats(-60, 60)


@st.composite
def answered(draw: st.DrawFn, choices: int | None = None) -> tuple[list[tuple[float, ...]], list[int]]:
    count = choices or draw(st.integers(2, 5))
    found = draw(st.lists(st.tuples(*[wide] * count), min_size=1, max_size=12))
    return found, draw(st.lists(st.integers(0, count - 1), min_size=len(found), max_size=len(found)))


@given(of=answered())
def test_no_step_from_the_offsets_makes_right_answers_likelier(of: tuple[list[tuple[float, ...]], list[int]]) -> None:
    scores, answers = of

    def loss(offsets: Sequence[float]) -> float:
        return missed(scores, answers, offsets) + 0.05 * sum(offset * offset for offset in offsets)

    offsets = fitted_offsets(scores, answers)
    assert sum(offsets) == pytest.approx(0, abs=1e-6)
    for index in range(len(offsets)):
        ahead, behind = (
            loss([offset + step * (place == index) for place, offset in enumerate(offsets)]) for step in (1e-4, -1e-4)
        )
        assert (ahead - behind) / 2e-4 == pytest.approx(0, abs=2e-5)
        assert min(ahead, behind) > loss(offsets)


@settings(max_examples=20)
@given(of=answered(choices=2))
def test_two_offsets_are_those_of_a_grid(of: tuple[list[tuple[float, ...]], list[int]]) -> None:
    scores, answers = of
    grid = np.linspace(-60, 60, 24_001)
    odds = np.array([row[1] - row[0] for row in scores])
    signs = np.array([1 if answer else -1 for answer in answers])
    losses = np.logaddexp(0, -signs[:, None] * (odds[:, None] + 2 * grid)).sum(0) + 0.05 * 2 * grid**2
    assert fitted_offsets(scores, answers)[1] == pytest.approx(grid[losses.argmin()], abs=0.005)


def test_offsets_set_a_leaning_model_right() -> None:
    questions = [(-2.0, -1.0), (-3.0, -1.0)] * 20
    offsets = fitted_offsets(questions, [0, 1] * 20)
    assert [predicted_choice(row) for row in with_offsets(questions, offsets)] == [0, 1] * 20
    assert with_offsets([(1.0, 2.0)], (0.5, -0.5)) == [(1.5, 1.5)]


@settings(max_examples=30)
@given(of=answered())
def test_the_temperature_is_that_of_a_grid(of: tuple[list[tuple[float, ...]], list[int]]) -> None:
    scores, answers = of
    found = fitted_temperature(scores, answers)
    flat = [0.0] * len(scores[0])
    least = missed(scores, answers, flat, 1 / found)
    for temperature in np.geomspace(0.01, 100, 200):
        assert least <= missed(scores, answers, flat, 1 / temperature) + 1e-9
    assert 0.01 - 1e-9 <= found <= 100 + 1e-9


@given(of=answered(), temperature=st.floats(0.1, 10))
def test_a_temperature_changes_no_answer(of: tuple[list[tuple[float, ...]], list[int]], temperature: float) -> None:
    scores, _ = of
    for row, sure in zip(scores, with_temperature(scores, temperature), strict=True):
        assert sure == pytest.approx([score / temperature for score in row])
        assert predicted_choice(sure) == predicted_choice(row)


def test_an_overconfident_models_temperature_is_known() -> None:
    """Right in 3 of 4 at odds of exp(10): its odds should be 3."""
    found = fitted_temperature([(0.0, 10.0)] * 4, [1, 1, 1, 0])
    assert found == pytest.approx(10 / math.log(3))
    assert fitted_temperature([(0.0, 1.0)], [1]) == pytest.approx(0.01)
    assert fitted_temperature([(0.0, 1.0)], [0]) == pytest.approx(100)


@settings(max_examples=20)
@given(of=answered(choices=2), sharpness=st.sampled_from([0.01, 0.05, 0.3, 1.0, 2.5]))
def test_no_remedy_makes_right_answers_likelier(
    of: tuple[list[tuple[float, ...]], list[int]], sharpness: float
) -> None:
    """Of a grid, each point as in a textbook."""
    scores, answers = of
    least = -sum(remedied_log_likelihoods(scores, answers, offsets=True))
    halves = np.array([(second - first) / 2 for first, second in scores])
    scale, lean = float(halves.std()) or 1.0, float(halves.mean())
    for offset in (-4.0, -1.0, -0.2, 0.0, 0.2, 1.0, 4.0):
        sharp = [(sharpness * first, sharpness * second) for first, second in scores]
        far = 0.05 * (2 * (offset + sharpness * lean) ** 2 + (sharpness * scale - 1) ** 2)
        assert least <= missed(sharp, answers, (-offset, offset)) + far + 0.06  # where it ignores scores it starts at 0


@pytest.mark.parametrize("factor", [0.01, 0.3, 3.0, 100.0])
def test_neither_lean_nor_confidence_counts_beyond_a_remedy(factor: float) -> None:
    rng = np.random.default_rng(0)
    answers = rng.integers(0, 3, 100).tolist()
    scores = rng.normal(size=(100, 3)) + np.eye(3)[answers]
    for offsets in (True, False):
        plain = remedied_log_likelihoods(scores.tolist(), answers, offsets=offsets)
        lean = [4.0, -1.0, 0.0] if offsets else [0.0] * 3
        leaning = remedied_log_likelihoods((factor * scores + lean).tolist(), answers, offsets=offsets)
        assert leaning == pytest.approx(plain, abs=0.1)
        assert np.mean(leaning) == pytest.approx(np.mean(plain), abs=0.005)
        better = remedied_log_likelihoods((scores + 0.5 * np.eye(3)[answers]).tolist(), answers, offsets=offsets)
        assert np.mean(better) > np.mean(plain) + 0.05


def test_a_model_that_is_wrong_for_sure_is_worth_as_much_as_one_that_knows_nothing() -> None:
    answers = [0, 1, 1, 1] * 20
    wrong = [(-1.0, 0.0) if answer == 0 else (0.0, -1.0) for answer in answers]
    shares = [math.log(0.25), *[math.log(0.75)] * 3] * 20
    assert remedied_log_likelihoods(wrong, answers, offsets=True) == pytest.approx(shares, abs=0.02)


def test_where_choices_differ_only_confidence_is_put_right() -> None:
    scores = [(0.0, 10.0), (0.0, 10.0, -20.0), (0.0, 10.0), (0.0, 10.0)]
    found = remedied_log_likelihoods(scores * 20, [1, 1, 1, 0] * 20, offsets=False)
    assert found == pytest.approx(([math.log(0.75)] * 3 + [math.log(0.25)]) * 20, abs=0.1)


def test_questions_with_fewer_choices_share_them() -> None:
    letters = [((1,), (2,)), ((1,), (2,), (3,)), ((1,),)]
    examples = [EncodedExample((9,), choices, 0) for choices in letters]
    assert share_choices(examples)
    assert not same_choices(examples)
    assert not share_choices([*examples, EncodedExample((9,), ((2,), (1,)), 0)])
    assert not share_choices([])


@given(of=answered(choices=3), other=answered(choices=2))
def test_a_missing_choice_is_one_that_nothing_makes_likely(
    of: tuple[list[tuple[float, ...]], list[int]], other: tuple[list[tuple[float, ...]], list[int]]
) -> None:
    """All remedies treat a question with fewer choices as one whose others have no probability."""
    scores, answers = [*of[0], *other[0]], [*of[1], *other[1]]
    whole = [*of[0], *[(*row, -1e4) for row in other[0]]]
    assert fitted_offsets(scores, answers) == pytest.approx(fitted_offsets(whole, answers), abs=1e-6)
    for ragged, padded in zip(
        with_offsets(scores, (1.0, -2.0, 0.5)), with_offsets(whole, (1.0, -2.0, 0.5)), strict=True
    ):
        assert ragged == pytest.approx(padded[: len(ragged)])
    few, many = (without_choice_bias(rows, of[0]) for rows in (scores, whole))
    for ragged, padded in zip(few, many, strict=True):
        assert ragged == pytest.approx(padded[: len(ragged)], abs=1e-6)
    found = remedied_log_likelihoods(scores, answers, offsets=True)
    assert all(math.isfinite(each) and each <= 0 for each in found)
    assert with_offsets([(0.0, 1.0, 2.0)], (1.0,)) == [(1.0, 1.0, 2.0)]


def test_a_model_that_says_nothing_leans_to_nothing_however_many_choices_there_are() -> None:
    nothing = [(0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0)]
    for rows in (without_choice_bias(nothing), without_choice_bias(nothing, nothing[:1])):
        for row in rows:
            assert row == pytest.approx([math.log(1 / len(row))] * len(row))
