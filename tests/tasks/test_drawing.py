from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks import Example
from act_export.tasks.splits import drawn, normal_form, sameness


def asking(key: str, group: str = "") -> Example:
    return Example("whatever stands around it", (" a", " b"), 0, key=key, group=group)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is it so?", "is it  so"),
        ("caf\u00e9", "cafe\u0301"),
        ("the \ufb01rst", "the first"),
        ("\u201cno\u201d", '"No"'),
        ("it 's fine .", "It's fine."),
        ("a\nb", "a b"),
    ],
)
def test_copies_of_a_question_are_the_same(one: str, other: str) -> None:
    assert normal_form(one) == normal_form(other)
    assert sameness(asking(one)) == sameness(asking(other))


@pytest.mark.parametrize(
    ("one", "other"), [("3 - 4", "3 + 4"), ("3 * 4", "3 / 4"), ("2*(3+4)", "(2*3)+4"), ("?", "!"), ("x < y", "x > y")]
)
def test_signs_that_change_a_question_are_kept(one: str, other: str) -> None:
    assert sameness(asking(one)).isdisjoint(sameness(asking(other)))


@given(keys=st.lists(st.text("abcAB .", min_size=1), max_size=12), seed=st.integers(0, 3), shuffle=st.randoms())
def test_the_draw_depends_on_questions_and_seed_alone(keys: list[str], seed: int, shuffle: random.Random) -> None:
    order = drawn(map(asking, keys), seed)
    assert len({normal_form(example.question) for example in order}) == len(order)
    assert {normal_form(example.question) for example in order} == set(map(normal_form, keys))
    shuffle.shuffle(keys)
    assert drawn(map(asking, keys), seed) == order


def test_one_question_of_a_group_is_drawn() -> None:
    examples = [asking(f"question {index}", f"Passage {index % 3}.") for index in range(12)]
    order = drawn(examples, 0)
    assert {example.group for example in order} == {"Passage 0.", "Passage 1.", "Passage 2."}
    assert len(order) == 3
    chosen = {example.key for seed in range(10) for example in drawn(examples, seed)}
    assert len(chosen) > 3  # another seed draws another question of the group
