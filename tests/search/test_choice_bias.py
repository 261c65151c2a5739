from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.search.choice_bias import same_choices, without_choice_bias
from act_export.tasks import EncodedExample
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


def test_choices_must_be_the_same_in_every_example() -> None:
    first = EncodedExample((1,), ((2,), (3,)), 0)
    assert same_choices([first, EncodedExample((9,), ((2,), (3,)), 1)])
    assert not same_choices([first, EncodedExample((1,), ((3,), (2,)), 0)])
