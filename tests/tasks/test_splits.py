from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks import Example, TaskError, prompt_digest, split_examples, unused

sizes = st.integers(1, 8)


def examples(count: int) -> list[Example]:
    return [Example(f"prompt {index}", (" a", " b"), index % 2) for index in range(count)]


@given(rank=sizes, choose=sizes, report=sizes, spare=st.integers(0, 8), seed=st.integers(0, 5), shuffle=st.randoms())
def test_splits_are_disjoint_and_depend_on_seed_and_content_only(
    rank: int, choose: int, report: int, spare: int, seed: int, shuffle: random.Random
) -> None:
    data = examples(rank + choose + report + spare)
    splits = split_examples(data, rank=rank, choose=choose, report=report, seed=seed)
    assert (len(splits.rank), len(splits.choose), len(splits.report)) == (rank, choose, report)
    drawn = {*splits.rank, *splits.choose, *splits.report}
    assert len(drawn) == rank + choose + report
    assert drawn <= set(data)
    again = data + data
    shuffle.shuffle(again)
    assert split_examples(again, rank=rank, choose=choose, report=report, seed=seed) == splits


def test_another_seed_draws_other_splits() -> None:
    data = examples(40)
    first, second = (split_examples(data, rank=10, choose=10, report=10, seed=seed) for seed in (0, 1))
    assert set(first.rank) != set(second.rank)


def test_the_first_of_two_equal_prompts_counts() -> None:
    data = [*examples(3), Example("prompt 1", (" c", " d"), 0)]
    splits = split_examples(data, rank=1, choose=1, report=1)
    assert {*splits.rank, *splits.choose, *splits.report} == set(examples(3))


def test_too_few_prompts_are_refused_with_the_counts() -> None:
    with pytest.raises(
        TaskError, match=r"there are 9 different prompts; 2 to rank heads, 3 to choose how many and 5 .* make 10"
    ):
        split_examples(examples(9) * 2, rank=2, choose=3, report=5)


@pytest.mark.parametrize("name", ["rank", "choose", "report"])
def test_a_split_without_examples_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match=f"the {name} split has 0 examples"):
        split_examples(examples(9), **{"rank": 2, "choose": 2, "report": 2, name: 0})


def test_a_prompts_digest_stays_what_it_is() -> None:
    """Calibration files have them."""
    assert prompt_digest("a prompt é") == "8ffc9a32"


def test_used_prompts_are_left_out_whatever_their_answer() -> None:
    data = examples(6)
    splits = split_examples(data, rank=1, choose=2, report=2)
    used = [prompt_digest(example.prompt) for example in (*splits.rank, *splits.choose)]
    left = unused(data, used)
    assert left == [example for example in data if example not in (*splits.rank, *splits.choose)]
    assert len(left) == 3
    assert unused([Example(data[0].prompt, (" c", " d"), 1)], [prompt_digest(data[0].prompt)]) == []
    assert unused(data, []) == data
