from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks import Example, Splits, TaskError, prompt_digest, question_digests, split_examples, unused
from act_export.tasks.splits import drawn, normal_form, sameness

sizes = st.integers(1, 8)


def examples(count: int) -> list[Example]:
    return [Example(f"prompt {index}", (" a", " b"), index % 2) for index in range(count)]


def parts(splits: Splits) -> list[tuple[Example, ...]]:
    return [splits.rank, splits.choose, splits.report]


@given(rank=sizes, choose=sizes, report=sizes, spare=st.integers(0, 8), seed=st.integers(0, 5), shuffle=st.randoms())
def test_splits_are_disjoint_and_depend_on_seed_and_content_only(
    rank: int, choose: int, report: int, spare: int, seed: int, shuffle: random.Random
) -> None:
    data = examples(max(6, rank + choose + report + spare))
    splits = split_examples(data, rank=rank, choose=choose, report=report, seed=seed)
    assert (len(splits.rank), len(splits.choose), len(splits.report)) == (rank, choose, report)
    drawn = {*splits.rank, *splits.choose, *splits.report}
    assert len(drawn) == rank + choose + report
    assert drawn <= set(data)
    assert splits.duplicates == 0
    again = data + data
    shuffle.shuffle(again)
    other = split_examples(again, rank=rank, choose=choose, report=report, seed=seed)
    assert other == splits
    assert other.duplicates == len(data)


def test_another_seed_draws_other_splits() -> None:
    data = examples(40)
    first, second = (split_examples(data, rank=10, choose=10, report=10, seed=seed) for seed in (0, 1))
    assert set(first.rank) != set(second.rank)


def test_the_first_of_two_equal_prompts_counts() -> None:
    data = [*examples(3), Example("prompt 1", (" c", " d"), 0)]
    splits = split_examples(data, rank=1, choose=1, report=1)
    assert {*splits.rank, *splits.choose, *splits.report} == set(examples(3))


def test_a_question_is_drawn_by_its_key_whatever_the_prompt() -> None:
    data = examples(60)
    reworded = [Example(f"Say: {e.prompt}", (" A", " B"), e.answer, key=e.prompt) for e in data]
    for one, other in zip(parts(split_examples(data)), parts(split_examples(reworded)), strict=True):
        assert [example.prompt for example in one] == [example.key for example in other]


@pytest.mark.parametrize(
    ("available", "expected"),
    [(24, (4, 6, 14)), (56, (11, 15, 30)), (463, (95, 127, 241)), (464, (96, 128, 240)), (2000, (96, 128, 240))],
)
def test_splits_are_as_large_as_the_data_allows(available: int, expected: tuple[int, ...]) -> None:
    assert tuple(map(len, parts(split_examples(examples(available))))) == expected


def test_a_given_size_is_kept_and_the_others_share_the_rest() -> None:
    assert tuple(map(len, parts(split_examples(examples(100), rank=50)))) == (50, 17, 33)
    assert tuple(map(len, parts(split_examples(examples(1000), report=700)))) == (96, 128, 700)


def test_too_few_prompts_are_refused_with_the_counts() -> None:
    with pytest.raises(
        TaskError, match=r"there are 9 different prompts; 2 to rank heads, 3 to choose how many and 5 .* make 10"
    ):
        split_examples(examples(9) * 2, rank=2, choose=3, report=5)
    with pytest.raises(TaskError, match=r"there are 23 different prompts; 24 are needed, and 464 for splits"):
        split_examples(examples(23) * 2)
    with pytest.raises(TaskError, match=r"there are 30 different prompts; 30 to rank heads"):
        split_examples(examples(30), rank=30)


@pytest.mark.parametrize("name", ["rank", "choose", "report"])
def test_a_split_without_examples_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match=f"the {name} split has 0 examples"):
        split_examples(examples(9), **{"rank": 2, "choose": 2, "report": 2, name: 0})


@given(rare=st.integers(3, 9), common=st.integers(30, 80), seed=st.integers(0, 20))
def test_a_rare_answer_is_in_every_split(rare: int, common: int, seed: int) -> None:
    data = [Example(f"prompt {index}", (" a", " b"), int(index < rare)) for index in range(rare + common)]
    splits = split_examples(data, seed=seed)
    counts = [Counter(example.answer for example in split) for split in parts(splits)]
    assert all(count[1] for count in counts)
    assert sum(map(len, parts(splits))) == rare + common
    assert len({example.prompt for split in parts(splits) for example in split}) == rare + common
    shuffled = list(data)
    random.Random(seed).shuffle(shuffled)
    assert split_examples(shuffled, seed=seed) == splits


def test_answers_are_not_evened_out_where_every_split_has_them() -> None:
    data = examples(30)
    order = [example for split in parts(split_examples(data)) for example in split]
    assert [example.answer for example in order] != sorted(example.answer for example in order)
    assert order == [e for split in parts(split_examples(data, rank=6, choose=8, report=16)) for e in split]


@pytest.mark.parametrize("rare", [1, 2])
def test_an_answer_that_cannot_be_in_every_split_is_named(rare: int) -> None:
    data = [Example(f"prompt {index}", (" no", " maybe"), int(index < rare)) for index in range(40)]
    with pytest.raises(
        TaskError, match=rf"{rare} of 40 different prompts have the answer ' maybe', too few for one in"
    ):
        split_examples(data)


def test_the_place_of_an_answer_among_other_choices_matters_to_no_split() -> None:
    data = [Example(f"prompt {index}", (f" {index}", " b"), int(index == 0)) for index in range(40)]
    assert sum(map(len, parts(split_examples(data)))) == 40


def test_no_group_is_in_two_splits() -> None:
    data = [Example(f"prompt {index}", (" a", " b"), index % 2, group=f"passage {index // 3}.") for index in range(120)]
    splits = split_examples(data)
    groups = [{example.group for example in split} for split in parts(splits)]
    assert not groups[0] & groups[1] | groups[1] & groups[2] | groups[0] & groups[2]
    assert splits.duplicates == 80


def test_a_prompts_digest_stays_what_it_is() -> None:
    """Calibration files have them."""
    assert prompt_digest("a prompt é") == "65878c49"


def test_used_prompts_are_left_out_whatever_their_answer() -> None:
    data = examples(6)
    splits = split_examples(data, rank=1, choose=2, report=2)
    used = [prompt_digest(example.prompt) for example in (*splits.rank, *splits.choose)]
    left = unused(data, used)
    assert left == [example for example in data if example not in (*splits.rank, *splits.choose)]
    assert len(left) == 3
    assert unused([Example(data[0].prompt, (" c", " d"), 1)], [prompt_digest(data[0].prompt)]) == []
    assert unused(data, []) == data


def test_a_question_about_a_used_passage_is_used() -> None:
    first, second, third = (
        Example(f"prompt {index}", (" a", " b"), 0, key=f"key {index}", group=group)
        for index, group in enumerate(("one", "One!", "two"))
    )
    assert unused([first, second, third], question_digests(first)) == [third]
    assert unused([second, third], question_digests(first)) == [third]  # the used question needn't be there
    assert unused([first, second, third], [prompt_digest("key 0")]) == [second, third]
    assert unused([first, second, third], [prompt_digest("prompt 0")]) == [first, second, third]


def test_a_copy_that_differs_in_case_and_space_is_used() -> None:
    data = examples(6)
    used = {digest for example in data for digest in question_digests(example)}
    assert unused([replace(example, prompt=f" {example.prompt.upper()} ") for example in data], used) == []


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
