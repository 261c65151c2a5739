from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks import EncodedExample, Example
from act_export.tasks.label_prior import content_free_examples, without_label_prior
from act_export.verify.evaluate.answers import Evaluation

scores = st.tuples(st.floats(-20, 0), st.floats(-20, 0))


def example(index: int, content_free: str = "N/A is", choices: tuple[str, ...] = (" n", " y")) -> Example:
    return Example(f"{index} is", choices, index % 2, key=f"k{index}", content_free=content_free)


def test_each_content_free_prompt_is_scored_once() -> None:
    examples = [example(0), example(1), example(2, choices=(" a", " b")), example(3, content_free="N/A was")]
    found = content_free_examples(examples)
    assert [(one.prompt, one.choices) for one in found] == [
        ("N/A is", (" n", " y")),
        ("N/A is", (" a", " b")),
        ("N/A was", (" n", " y")),
    ]


def test_there_is_no_control_where_one_question_has_no_content_free_prompt() -> None:
    assert content_free_examples([example(0), example(1, content_free="")]) == ()
    assert content_free_examples([replace(example(0), content_free="")]) == ()


@given(rows=st.lists(scores, min_size=4, max_size=4), first=scores, second=scores)
def test_the_prior_of_its_own_prompt_is_taken_off(
    rows: list[tuple[float, float]], first: tuple[float, float], second: tuple[float, float]
) -> None:
    examples = [example(0), example(1, "N/A was"), example(2), example(3, "N/A was")]
    corrected = without_label_prior(rows, examples, [first, second])
    for row, mine, prior in zip(corrected, rows, (first, second, first, second), strict=True):
        assert row == pytest.approx([mine[0] - prior[0], mine[1] - prior[1]])


def test_a_model_that_always_leans_to_one_answer_is_set_right() -> None:
    leaning = [(-5.0, -1.0), (-6.0, -0.5), (-4.8, -1.1), (-7.0, -0.1)]
    examples = [example(index) for index in range(4)]
    corrected = without_label_prior(leaning, examples, [(-5.5, -0.8)])
    encoded = [EncodedExample((1,), ((2,), (3,)), example.answer) for example in examples]
    plain, control = (Evaluation.of(scores, encoded) for scores in (leaning, corrected))
    assert (plain.accuracy, control.accuracy) == (0.5, 1.0)
    assert control.predictions == (0, 1, 0, 1)
