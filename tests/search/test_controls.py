"""What counts as right once a model's lean is taken off."""

from __future__ import annotations

import numpy as np

from act_export.search.answers import CHOOSE, Answers, EncodedTask
from act_export.search.controls import credits_with_remedy
from act_export.search.request import SearchTask
from act_export.tasks import EncodedExample
from act_export.tasks.splits import Splits

RIGHT = np.random.default_rng(0).integers(0, 3, 60)


def task_of(choices: list[tuple[tuple[int, ...], ...]]) -> EncodedTask:
    examples = tuple(EncodedExample((1,), of, int(right)) for of, right in zip(choices, RIGHT, strict=True))
    return EncodedTask(SearchTask("told", Splits((), (), ())), {CHOOSE: examples})


def answers_of(scores: np.ndarray) -> Answers:
    return Answers(tuple(map(tuple, scores.tolist())), (0.0,) * len(scores), 0.0)


def test_a_lean_and_confidence_make_no_answer_wrong() -> None:
    """A model that always names the first choice, though it tells answers apart nine times of ten."""
    told = np.eye(3)[np.where(np.arange(60) % 10 == 0, (RIGHT + 1) % 3, RIGHT)]
    task = task_of([((4,), (5,), (6,))] * 60)
    for factor in (0.2, 1.0, 30.0):
        leaning = factor * (told + np.array([100.0, 0.0, -50.0]))
        assert set(leaning.argmax(1)) == {0}
        credits = credits_with_remedy(task, CHOOSE, answers_of(leaning))
        assert credits == tuple((np.arange(60) % 10 != 0).astype(float).tolist())


def test_without_shared_choices_the_likeliest_counts() -> None:
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(60, 3)) + np.eye(3)[RIGHT]
    task = task_of([((4 + number,), (70 + number,), (140 + number,)) for number in range(60)])
    assert credits_with_remedy(task, CHOOSE, answers_of(scores)) == tuple((scores.argmax(1) == RIGHT).astype(float))
