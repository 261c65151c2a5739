from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.calibration.file import Calibration, Provenance
from act_export.errors import ActExportError
from act_export.tasks import Example, TaskError, prompt_digest, split_examples
from act_export.verify.evaluate.held_out import held_out


def questions(task: str, count: int) -> list[Example]:
    return [
        Example(f"{task} {index}: {index}", (" n", " y"), index % 2, key=f"{task} {index}") for index in range(count)
    ]


FIRST, SECOND, THIRD = (questions(name, 60) for name in ("first", "second", "third"))
DATA = {"first": FIRST, "second": SECOND, "third": THIRD}


def searched(*tasks: str, seed: int = 0) -> Calibration:
    """What a search of these tasks, each with the default splits, leaves behind."""
    splits = [split_examples(DATA[task], seed=seed) for task in tasks]
    used = [prompt_digest(e.question) for split in splits for e in (*split.rank, *split.choose)]
    samples = {
        "rank": sum(len(split.rank) for split in splits),
        "choose": sum(len(split.choose) for split in splits),
        "report": sum(len(split.report) for split in splits),
    }
    return Calibration({}, provenance=Provenance("gates", tasks, samples, seed, notes={"used": sorted(used)}))


@pytest.mark.parametrize("tasks", [("first",), ("first", "second"), ("second", "first", "third")])
@pytest.mark.parametrize("seed", [0, 4])
def test_every_task_of_a_search_is_measured_on_its_own_report_split(tasks: tuple[str, ...], seed: int) -> None:
    calibration = searched(*tasks, seed=seed)
    for task in tasks:
        splits = split_examples(DATA[task], seed=seed)
        assert tuple(held_out(DATA[task], [calibration, None], split="report", task=task)) == splits.report
        others = held_out(DATA[task], [calibration, None], split="held-out", task=task)
        assert set(others) == set(DATA[task]) - {*splits.rank, *splits.choose}


@pytest.mark.parametrize("seed", [None, 3])
def test_another_task_is_measured_on_the_report_split_of_a_default_search(seed: int | None) -> None:
    splits = split_examples(THIRD, seed=seed or 0)
    for calibration in (searched("first", seed=4), searched("first", "second", seed=4), Calibration({}), None):
        assert tuple(held_out(THIRD, [calibration], split="report", seed=seed, task="third")) == splits.report
        others = held_out(THIRD, [calibration], split="held-out", seed=seed, task="third")
        assert set(others) == set(THIRD) - {*splits.rank, *splits.choose}


@given(tasks=st.sets(st.sampled_from(sorted(DATA)), min_size=1), seed=st.integers(0, 5), name=st.text(max_size=5))
def test_no_question_of_a_search_is_counted_whatever_the_data_is_called(tasks: set[str], seed: int, name: str) -> None:
    calibration = searched(*sorted(tasks), seed=seed)
    used = set(calibration.provenance.notes["used"])
    for task in DATA:
        for split in ("report", "held-out"):
            left = held_out(DATA[task], [None, calibration], split=split, task=name)
            assert left
            assert used.isdisjoint(prompt_digest(example.question) for example in left)
            if task in tasks:  # the search is known by its questions
                splits = split_examples(DATA[task], seed=seed)
                assert set(left) >= set(splits.report)


def test_a_question_in_other_words_around_it_is_the_same_question() -> None:
    reworded = [Example(f"Answer: {e.prompt}", (" A", " B"), e.answer, key=e.key) for e in FIRST]
    calibration = searched("first", seed=2)
    splits = split_examples(FIRST, seed=2)
    left = held_out(reworded, [calibration], split="report", task="first")
    assert [example.key for example in left] == [example.key for example in splits.report]


def test_the_seed_must_be_that_of_the_search_of_the_task() -> None:
    calibration = searched("first", seed=5)
    with pytest.raises(ActExportError, match="the seed is 0, but the heads were searched with seed 5"):
        held_out(FIRST, [calibration], split="report", seed=0, task="first")
    assert held_out(SECOND, [calibration], split="report", seed=0, task="second")


def test_the_message_names_the_task_of_which_nothing_is_left() -> None:
    calibration = searched("first")
    used = [e for e in FIRST if prompt_digest(e.question) in calibration.provenance.notes["used"]]
    with pytest.raises(ActExportError, match="all of these examples of first; evaluate on others"):
        held_out(used, [calibration], split="held-out", task="first")


def test_too_few_questions_for_a_report_split() -> None:
    with pytest.raises(TaskError, match=r"the report split can't be drawn: there are 5 .*; or pass another split"):
        held_out(FIRST[:5], [None], split="report", task="first")
    assert held_out(FIRST[:5], [None], split="all", task="first") == FIRST[:5]
