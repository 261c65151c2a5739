"""Few-shot examples: questions with their answers, in front of every other question."""

from __future__ import annotations

from collections.abc import Sequence

from act_export.tasks.examples import Example, TaskError
from act_export.tasks.splits import MINIMUM, drawn, sameness
from act_export.tasks.task_definition import Question


def with_shots(
    name: str, questions: Sequence[Question], pool: Sequence[Question] | None, *, shots: int, seed: int
) -> tuple[Example, ...]:
    """The questions as examples, each after the same few-shot examples.

    Shots from a pool of their own are the first of its draw that aren't among the questions. Without a pool, or where
    it has too few, they are the questions that come last in the draw of this seed, and those are left out: where there
    is data to spare, the splits of this seed are the same as without shots.

    Args:
        name: The task's, for messages.
        questions: At least one.
        pool: Questions for nothing else, as those of a training split; None where there are none.
        shots: Number of few-shot examples before each question; where the task says so, alike in something.
        seed: Draws them.

    Raises:
        TaskError: If there are too few rows to spare, with the counts.
    """
    if shots == 0:
        return tuple(question.example for question in questions)
    asked = {same for question in questions for same in sameness(question.example)}
    spare = [question for question in _in_order(pool or (), seed) if asked.isdisjoint(sameness(question.example))]
    candidates = spare + _in_order(questions, seed)[::-1]
    drawn_shots: dict[str, list[Question]] = {question.alike: [] for question in questions}
    for candidate in candidates:
        own = drawn_shots.get(candidate.alike)
        if own is not None and len(own) < shots:
            own.append(candidate)
    for alike, own in drawn_shots.items():
        if len(own) < shots:
            what = f" with {alike!r}" if alike else ""
            raise TaskError(f"{name} has {len(own)} questions{what} for {shots} few-shot examples; ask for fewer shots")
    taken = {same for own in drawn_shots.values() for shot in own for same in sameness(shot.example)}
    left = [question for question in questions if taken.isdisjoint(sameness(question.example))]
    remaining = len(_in_order(left, seed))
    if len(left) < len(questions) and remaining < MINIMUM:
        raise TaskError(
            f"{name} has {remaining} different questions left to ask without those that are few-shot examples; "
            f"{MINIMUM} are needed. Add data, or ask for fewer than {shots} shots"
        )
    texts = {alike: "".join(shot.shot for shot in own) for alike, own in drawn_shots.items()}
    return tuple(question.after(texts[question.alike]) for question in left)


def _in_order(questions: Sequence[Question], seed: int) -> list[Question]:
    by_example = {id(question.example): question for question in questions}
    return [by_example[id(example)] for example in drawn((question.example for question in questions), seed)]
