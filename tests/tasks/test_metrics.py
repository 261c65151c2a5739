from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks.metrics import UNANSWERABLE, exact_match, normalize_answer, token_f1

words = st.lists(st.sampled_from(["cat", "dog", "red", "blue", "Denver", "1876"]), min_size=1, max_size=6)


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Denver Broncos.", "denver broncos"),
        ("  an  apple, a day ", "apple day"),
        ("theatre", "theatre"),
        ("it's A-Z", "its az"),
        ("“quoted”", "“quoted”"),  # only ASCII marks, as the official script has it
        ("a.", ""),
    ],
)
def test_answers_are_normalized(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("Denver Broncos", ("the Denver Broncos", "Broncos"), 1, 1),
        ("Broncos of Denver", ("Denver Broncos",), 0, 0.8),  # 2 of 3 and 2 of 2 words
        ("Broncos", ("Denver Broncos", "Carolina Panthers"), 0, 2 / 3),
        ("red red", ("red",), 0, 2 / 3),  # a word counts as often as it is in both
        ("green", ("red",), 0, 0),
        ("", ("red",), 0, 0),
    ],
)
def test_an_answer_is_measured_against_its_best_reference(
    prediction: str, references: tuple[str, ...], exact: float, f1: float
) -> None:
    assert exact_match(prediction, references) == exact
    assert token_f1(prediction, references) == pytest.approx(f1)


@pytest.mark.parametrize("references", [(UNANSWERABLE,), (), ("",)])
@pytest.mark.parametrize(
    ("prediction", "right"), [("unanswerable", 1), (" Unanswerable.", 1), ("", 1), ("the", 1), ("unanswerable red", 0)]
)
def test_no_answer_is_right_only_where_there_is_none(
    prediction: str, right: float, references: tuple[str, ...]
) -> None:
    assert exact_match(prediction, references) == token_f1(prediction, references) == right
    if right:
        assert exact_match(prediction, ("red",)) == token_f1(prediction, ("red",)) == 0
        assert exact_match(prediction, ("red", UNANSWERABLE)) == 0  # some found an answer, so there is one


@given(said=words, right=words, other=words)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(said: list[str], right: list[str], other: list[str]) -> None:
    prediction, reference = " ".join(said), " ".join(right)
    f1 = token_f1(prediction, (reference,))
    assert 0 <= f1 <= 1
    assert f1 == token_f1(reference, (prediction,))
    assert (f1 == 1) == (sorted(map(str.lower, said)) == sorted(map(str.lower, right)))
    assert exact_match(prediction, (reference,)) <= f1
    assert token_f1(prediction, (reference, " ".join(other))) == max(f1, token_f1(prediction, (" ".join(other),)))
    remaining = list(right)
    shared = 0
    for word in said:
        if word in remaining:
            remaining.remove(word)
            shared += 1
    precision, recall = shared / len(said), shared / len(right)
    assert f1 == pytest.approx(2 * precision * recall / (precision + recall) if shared else 0)
