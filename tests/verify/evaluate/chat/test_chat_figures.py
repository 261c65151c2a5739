"""Figures of answers against counting by hand, and what is called worse."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.verify.evaluate.chat.conversation import Turn
from act_export.verify.evaluate.chat.figures import compare_chats, distinct, figures_of, is_right, repeated
from act_export.verify.evaluate.chat.questions import ChatQuestion

few_tokens = st.lists(st.integers(0, 2), max_size=14)


def turn(tokens=(1, 2, 3), *, text="said", ended=True, log_likelihood=-0.5) -> Turn:
    return Turn(text, tuple(tokens), ended, log_likelihood)


@given(few_tokens)
def test_distinct_is_counted_by_looking_back(tokens):
    first = [token for at, token in enumerate(tokens) if token not in tokens[:at]]
    assert distinct(tokens, 1) == (len(first) / len(tokens) if tokens else 1)
    pairs = list(pairwise(tokens))
    new = [pair for at, pair in enumerate(pairs) if pair not in pairs[:at]]
    assert distinct(tokens, 2) == (len(new) / len(pairs) if pairs else 1)


@given(few_tokens)
def test_repeated_is_found_by_trying_every_gram(tokens):
    best = 0
    for gram in product(range(3), repeat=4):
        covered, times = [False] * len(tokens), 0
        for at in range(len(tokens) - 3):
            if tuple(tokens[at : at + 4]) == gram:
                times += 1
                covered[at : at + 4] = [True] * 4
        best = max(best, sum(covered) if times > 1 else 0)
    assert repeated(tokens) == (best / len(tokens) if best else 0)


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The sum is 60.", "60", 1),
        ("60 eggs", "He gets 60.0", 1),
        ("60 or 61", "60", 0),
        ("It costs $1,234,567.50", "1234567.5", 1),
        ("1,2,3", "3", 1),
        ("x = -5", "5", 0),
        ("x = -5", "-5", 1),
        ("10-5", "5", 1),
        ("about .5", "0.5", 1),
        ("9" * 400, "9" * 399 + "8", 0),
        ("The Paris!", "paris", 1),
        ("The capital is Paris.", "paris", 0),
        ("No number", "7", 0),
        ("7", "no number", 0),
        ("Uncertain.", "Uncertain", 1),
        ("\u0663", "3", 0),
        ("", "unanswerable", 1),
    ],
)
def test_what_is_right(text, reference, right):
    assert is_right(text, reference) == right


def test_longer_answers_are_compared_as_far_as_the_shorter_goes():
    short, long = [1, 2, 3, 4], [1, 2, 3, 4, 1, 2, 3, 4]
    found = figures_of(turn(short), turn(long, ended=False, log_likelihood=-1.0), "")
    assert found == {
        "tokens": (4, 8),
        "at_limit": (0, 1),
        "distinct_1": (1, 1),
        "distinct_2": (1, 1),
        "repeated": (0, 1),
        "log_likelihood": (-0.5, -1.0),
    }


def test_an_answer_without_tokens():
    found = figures_of(turn([]), turn([5] * 8), "7")
    assert (found["distinct_1"], found["repeated"], found["right"]) == ((1, 1), (0, 1), (0, 0))


def conversations(number, **second):
    """Questions of two turns, the plain answers, and others whose second turn differs."""
    questions = [ChatQuestion(each, "", ("a", "b"), ("", "4")) for each in range(number)]
    plain = [(turn(text="a"), turn(text="4")) for _ in questions]
    return questions, plain, [(first, turn(**{"text": "4", **second})) for first, _ in plain]


def changes_of(comparison):
    return {change.figure.name: change for change in comparison.changes}


def test_nothing_changed():
    questions, plain, same = conversations(9)
    comparison = compare_chats("c", questions, plain, same)
    assert (comparison.answers, comparison.differing, comparison.worse) == (18, 0, ())
    assert comparison.verdict == "no worse than plain within luck"
    for change in comparison.changes:
        assert (change.difference, change.interval, change.p) == (0, (0, 0), 1 if change.figure.better else None)


def test_a_change_is_by_question_the_mean_over_its_turns():
    questions, plain, other = conversations(4, tokens=(1, 2, 3, 4, 5), text="so 5")
    comparison = compare_chats("c", questions, plain, other)
    found = changes_of(comparison)
    assert (found["tokens"].plain, found["tokens"].calibrated, found["tokens"].difference) == (3, 4, 1)
    assert found["tokens"].interval == (1, 1)
    assert (found["right"].plain, found["right"].calibrated, found["right"].questions) == (1, 0, 4)
    assert (comparison.answers, comparison.differing) == (8, 4)


def test_without_a_reference_nothing_is_right():
    questions, plain, other = conversations(4)
    bare = [ChatQuestion(each.id, "", each.turns, ("", " ")) for each in questions]
    assert "right" not in changes_of(compare_chats("c", bare, plain, other))


@pytest.mark.parametrize(
    ("second", "worse"),
    [
        ({"ended": False}, "answers at the limit"),
        ({"tokens": (5,) * 3}, "distinct-1, distinct-2"),
        ({"tokens": range(40)}, ""),
        ({"tokens": [*range(4)] * 9}, "most repeated 4-gram"),
        ({"log_likelihood": -0.69}, ""),
        ({"log_likelihood": -0.8}, "log-likelihood of a token"),
        ({"text": "5"}, "as the reference"),
        ({"ended": False, "text": "5"}, "answers at the limit, as the reference"),
    ],
)
def test_what_is_worse_on_every_question_is_worse_beyond_luck(second, worse):
    verdict = compare_chats("c", *conversations(12, **second)).verdict
    assert verdict == (f"worse than plain beyond luck: {worse}" if worse else "no worse than plain within luck")


def test_what_is_better_is_not_worse():
    questions, plain, other = conversations(12, ended=False, text="5", log_likelihood=-3.0)
    assert compare_chats("c", questions, other, plain).verdict == "no worse than plain within luck"


def test_p_is_that_of_all_ways_to_exchange_the_models():
    questions, plain, other = conversations(10)
    other = [(first, turn(text="4", ended=at < 7)) for at, (first, _) in enumerate(other)]
    # Three of ten got worse: all exchanges of these that are as bad are one of eight.
    assert changes_of(compare_chats("c", questions, plain, other))["at_limit"].p == pytest.approx(1 / 8, abs=0.02)


def test_a_few_questions_tell_nothing_whatever_happens():
    for number, told in ((6, False), (7, True)):
        comparison = compare_chats("c", *conversations(number, ended=False))
        assert comparison.can_tell is told
        assert comparison.verdict.startswith("worse" if told else "6 questions are too few")
