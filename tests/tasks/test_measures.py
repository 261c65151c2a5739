from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks.measures import (
    Measures,
    auroc,
    balanced_accuracy,
    expected_calibration_error,
    measure,
    negative_log_likelihood,
)

# Eighths: sums of them are exact, so equals stay equals
number = st.integers(-40, 40).map(lambda eighths: eighths / 8)
Scored = tuple[list[tuple[float, ...]], list[int]]


@st.composite
def scored(draw: st.DrawFn, *, choices: int | None = None) -> Scored:
    count = choices or draw(st.integers(2, 4))
    rows = draw(st.lists(st.tuples(*[number] * count), min_size=1, max_size=25))
    answers = draw(st.lists(st.integers(0, count - 1), min_size=len(rows), max_size=len(rows)))
    return rows, answers


def shares(row: Sequence[float]) -> list[float]:
    total = math.fsum(map(math.exp, row))
    return [math.exp(score) / total for score in row]


@given(of=scored())
def test_each_answer_counts_the_same_however_often_it_occurs(of: Scored) -> None:
    rows, answers = of
    recalls = []
    for answer in set(answers):
        said = [row.index(max(row)) for row, right in zip(rows, answers, strict=True) if right == answer]
        recalls.append(said.count(answer) / len(said))
    assert balanced_accuracy(rows, answers) == pytest.approx(sum(recalls) / len(recalls))
    oftener = [index for index, answer in enumerate(answers) if answer == answers[0]] * 3
    more = [rows[index] for index in oftener], [answers[index] for index in oftener]
    assert balanced_accuracy(rows + more[0], answers + more[1]) == pytest.approx(balanced_accuracy(rows, answers))


@given(choices=st.integers(2, 5), data=st.data())
def test_one_answer_always_is_right_by_chance(choices: int, data: st.DataObject) -> None:
    always = data.draw(st.integers(0, choices - 1))
    others = data.draw(st.lists(st.integers(0, choices - 1), max_size=20))
    answers = [*range(choices), *others]
    row = tuple(float(index == always) for index in range(choices))
    assert balanced_accuracy([row] * len(answers), answers) == pytest.approx(1 / choices)
    assert auroc([row] * len(answers), answers) == 0.5


@given(of=scored())
def test_auroc_is_the_share_of_pairs_in_order(of: Scored) -> None:
    rows, answers = of
    areas = []
    for answer in range(len(rows[0])):
        # in another order of the others: within a row they may be summed in any
        odds = [row[answer] - math.log(math.fsum(map(math.exp, row[:answer] + row[answer + 1 :]))) for row in rows]
        has, lacks = (
            [value for value, right in zip(odds, answers, strict=True) if (right == answer) is wanted]
            for wanted in (True, False)
        )
        if has and lacks:
            wins = sum(1 if abs(mine - other) < 1e-9 else 2 * (mine > other) for mine in has for other in lacks)
            areas.append(wins / 2 / len(has) / len(lacks))
    found = auroc(rows, answers)
    if not areas:
        assert found is None
    elif len(rows[0]) == 2 or len({tuple(sorted(row)) for row in rows}) == len(rows):
        assert found == pytest.approx(sum(areas) / len(areas))


@given(of=scored(choices=2), lean=number)
def test_a_lean_to_one_of_two_answers_changes_no_auroc(of: Scored, lean: float) -> None:
    rows, answers = of
    assert auroc([(row[0] + 10 * lean, row[1]) for row in rows], answers) == auroc(rows, answers)


def test_auroc_tells_questions_apart_that_are_all_but_certain() -> None:
    rows = [(0.0, 200.0 + surer) for surer in range(4)]
    assert auroc(rows, [0, 0, 1, 1]) == 1
    assert auroc(rows, [1, 1, 0, 0]) == 0


@given(of=scored())
def test_likelihood_is_that_of_the_right_answer_among_the_choices(of: Scored) -> None:
    rows, answers = of
    logs = [math.log(shares(row)[answer]) for row, answer in zip(rows, answers, strict=True)]
    assert negative_log_likelihood(rows, answers) == pytest.approx(-math.fsum(logs) / len(logs))
    moved = [tuple(score - 7 for score in row) for row in rows]
    assert negative_log_likelihood(moved, answers) == pytest.approx(negative_log_likelihood(rows, answers))


@given(of=scored())
def test_calibration_error_is_the_gap_of_each_fifteenth(of: Scored) -> None:
    rows, answers = of
    error = 0.0
    confident = [max(shares(row)) for row in rows]
    for low in range(15):
        inside = [i for i, p in enumerate(confident) if low / 15 < p <= (low + 1) / 15]
        if inside:
            right = sum(rows[i].index(max(rows[i])) == answers[i] for i in inside) / len(inside)
            error += len(inside) / len(rows) * abs(right - math.fsum(confident[i] for i in inside) / len(inside))
    assert expected_calibration_error(rows, answers) == pytest.approx(error, abs=1e-12)


def test_by_hand() -> None:
    rows = [tuple(map(math.log, pair)) for pair in ((0.9, 0.1), (0.9, 0.1), (0.6, 0.4), (0.2, 0.8))]
    answers = [0, 1, 0, 1]
    assert measure(rows, answers, same_choices=True) == Measures(
        pytest.approx(3 / 4),
        pytest.approx(2.5 / 4),  # of the pairs 0.9 = 0.9, 0.9 > 0.2, 0.6 < 0.9, 0.6 > 0.2
        pytest.approx(-(math.log(0.9) + math.log(0.1) + math.log(0.6) + math.log(0.8)) / 4),
        pytest.approx((2 * 0.4 + 0.4 + 0.2) / 4),
    )


def test_what_isnt_defined_is_none() -> None:
    rows, answers = [(1.0, 2.0, 0.0), (1.0, 0.0)], [1, 0]
    found = measure(rows, answers, same_choices=False)
    assert (found.balanced_accuracy, found.auroc) == (1, None)
    assert measure([(1.0, 2.0)] * 3, [1] * 3, same_choices=True).auroc is None


@pytest.mark.parametrize(("rows", "answers"), [([], []), ([(0.0, 1.0)], [])])
def test_what_is_no_answers_is_refused(rows: list[tuple[float, ...]], answers: list[int]) -> None:
    with pytest.raises(ValueError, match=f"{len(rows)} rows of scores with 0 right answers"):
        measure(rows, answers, same_choices=True)
