from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks import TaskError, load_task, split_examples
from act_export.tasks.shots import with_shots
from act_export.tasks.splits import drawn
from act_export.tasks.task_definition import Question

TASK = load_task("cb")
BODY = "Premise: {} Hypothesis: h. Answer:"


def questions(count: int, word: str = "premise") -> list[Question]:
    return [
        TASK.question({"premise": f"{word} {index}", "hypothesis": "h", "label": index % 3}) for index in range(count)
    ]


def shot_numbers(prompt: str, word: str = "premise") -> list[int]:
    *shots, _ = prompt.split("\n\n")[1:]
    return [int(shot.split(f"{word} ")[1].split()[0]) for shot in shots]


@given(count=st.integers(40, 60), shots=st.integers(0, 8), seed=st.integers(0, 3))
def test_shots_are_set_aside(count: int, shots: int, seed: int) -> None:
    asked = questions(count)
    examples = with_shots("cb", asked, None, shots=shots, seed=seed)
    assert len(examples) == count - shots
    numbers = shot_numbers(examples[0].prompt)
    assert len(set(numbers)) == shots
    for example in examples:
        assert shot_numbers(example.prompt) == numbers
        assert not any(example.prompt.endswith(BODY.format(f"premise {number}")) for number in numbers)
    zero_shot = {question.example.question for question in asked}
    assert {example.question for example in examples} < zero_shot or shots == 0


def test_where_there_is_data_to_spare_the_splits_stay() -> None:
    asked = questions(500)
    plain = split_examples((question.example for question in asked), seed=2)
    few = split_examples(with_shots("cb", asked, None, shots=5, seed=2), seed=2)
    for one, other in ((plain.rank, few.rank), (plain.choose, few.choose), (plain.report, few.report)):
        assert [example.question for example in one] == [example.question for example in other]


def test_shots_carry_their_answers() -> None:
    (example, *_) = with_shots("cb", questions(40), None, shots=3, seed=0)
    for shot, number in zip(example.prompt.split("\n\n")[1:], shot_numbers(example.prompt), strict=False):
        assert shot == BODY.format(f"premise {number}") + (" Yes", " No", " Maybe")[number % 3]


def test_another_seed_draws_other_shots() -> None:
    draws = {tuple(shot_numbers(with_shots("cb", questions(40), None, shots=3, seed=s)[0].prompt)) for s in range(5)}
    assert len(draws) > 1


def test_shots_come_from_a_pool_without_the_questions() -> None:
    asked = questions(30)
    pool = [*questions(5), *questions(6, "training")]
    examples = with_shots("cb", asked, pool, shots=6, seed=0)
    assert len(examples) == 30
    assert sorted(shot_numbers(examples[0].prompt, "training")) == list(range(6))


def test_what_a_pool_lacks_is_set_aside() -> None:
    examples = with_shots("cb", questions(30), [*questions(5), *questions(1, "training")], shots=3, seed=0)
    assert len(examples) == 28


def test_no_passage_is_in_shot_and_question() -> None:
    task = load_task("boolq")
    asked = [
        task.question({"passage": f"passage {index // 2}.", "question": f"question {index}", "label": 0})
        for index in range(80)
    ]
    examples = with_shots("boolq", asked, None, shots=4, seed=0)
    assert len(examples) == 72
    for example in examples:
        assert example.prompt.count(example.group) == 1


def test_shots_are_of_the_questions_subject() -> None:
    task = load_task("mmlu")

    def question(index: int, subject: str) -> Question:
        row = {"question": f"question {index} of {subject}", "subject": subject, "options": ["a", "b"], "answer": 0}
        return task.question(row)

    asked = [question(index, subject) for index in range(20) for subject in ("law", "art")]
    examples = with_shots("mmlu", asked, [question(index, "law") for index in range(20, 30)], shots=2, seed=0)
    assert len(examples) == 38
    for example in examples:
        subject = "law" if "law" in example.question else "art"
        assert example.prompt.count(f"of {subject}\n") == 3
    with pytest.raises(TaskError, match="mmlu has 20 questions with 'law' for 21 few-shot"):
        with_shots("mmlu", asked, None, shots=21, seed=0)


def test_too_few_rows_to_spare_are_refused_with_the_counts() -> None:
    assert len(with_shots("cb", questions(28), None, shots=4, seed=0)) == 24
    with pytest.raises(TaskError, match=r"cb has 23 different questions left to ask .*; 24 are needed"):
        with_shots("cb", questions(28), None, shots=5, seed=0)
    with pytest.raises(TaskError, match="cb has 28 questions for 29 few-shot examples"):
        with_shots("cb", questions(28), None, shots=29, seed=0)


def test_the_shots_are_the_last_of_the_draw() -> None:
    asked = questions(40)
    order = [question.question for question in drawn((q.example for q in asked), 1)]
    left = {example.question for example in with_shots("cb", asked, None, shots=4, seed=1)}
    assert set(order[-4:]).isdisjoint(left)
    assert set(order[:-4]) == left
