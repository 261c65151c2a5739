"""The questions that a model is tried on, split for several searches; to be had before any model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from act_export.errors import ActExportError
from act_export.search.request import SearchTask
from act_export.tasks import Example, Questions, TaskExamples
from act_export.tasks.splits import USUAL_ROWS, drawn, split_folds
from act_export.tasks.statistics import detectable_gain

SEARCHES = 3


@dataclass(frozen=True)
class TrialData:
    """Questions to try a model on.

    Attributes:
        name: What to call them.
        different: How many different questions there are.
        searches: Their splits, one for each search.
        chance: Accuracy of always giving the most frequent answer, or of guessing where questions have different
            choices; None where answers are generated.
    """

    name: str
    different: int
    searches: tuple[SearchTask, ...]
    chance: float | None

    @property
    def reported(self) -> int:
        """Questions that accuracies come from."""
        return sum(len(task.splits.report) for task in self.searches)

    @property
    def detectable(self) -> float:
        """The smallest gain that these questions can tell from luck, about."""
        return detectable_gain(self.reported)

    @property
    def recommended(self) -> int:
        """Different questions from which on splits have their usual sizes."""
        return USUAL_ROWS


def trial_data(questions: Questions, *, searches: int = SEARCHES) -> TrialData:
    """The questions of one task or file, split for each search.

    Raises:
        ActExportError: If there isn't one source.
        TaskError: If there is no such task or file, its questions can't be had, or there are too few.
    """
    if len(questions.sources) != 1:
        raise ActExportError(
            f"{len(questions.sources)} sets of questions are named; name one, with --data FILE.jsonl or --task NAME"
        )
    if searches < 2:
        raise ActExportError(f"--searches is {searches}; it must be at least 2")
    (task,) = questions.load()
    seed = questions.drawing_seed
    splits = split_folds(task.examples, searches, seed=seed)
    tasks = [SearchTask(task.name, of, task.length_normalized, task.generation, questions) for of in splits]
    return TrialData(task.name, len(drawn(task.examples, seed)), tuple(tasks), _chance(task))


def _chance(task: TaskExamples) -> float | None:
    if task.generation is not None:
        return None
    examples: Sequence[Example] = task.examples
    if len({example.choices for example in examples}) == 1:
        return Counter(example.answer for example in examples).most_common(1)[0][1] / len(examples)
    return sum(1 / len(example.choices) for example in examples) / len(examples)
