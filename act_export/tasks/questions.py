"""Which questions to ask, and how: what search, profile and evaluation are told alike."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from act_export.tasks.examples import TaskError, TaskExamples, read_examples
from act_export.tasks.task import load_examples
from act_export.tasks.task_definition import FIRST_TOKEN, GENERATION, LIKELIHOOD, PER_TOKEN

DEFAULT_TASK = "sst2"
MIX = ("sst2", "rte", "csqa", "arc_easy", "obqa")  # of what models are asked: short questions, several forms
_MOST_SHOTS = 10_000
_SEEDS = 2**63


@dataclass(frozen=True)
class Questions:
    """What to ask, and how.

    Attributes:
        tasks: Names of tasks, or paths of task files. What is named twice counts once, as of data.
        data: JSON Lines files of questions. Their prompts stand as they are: no few-shot examples are put before them,
            and of scorings they take "likelihood", "likelihood-per-token" and "first-token" (or, where they have no
            choices, "generation").
        scoring: "letter", "likelihood", "likelihood-per-token", "first-token" or "generation"; None for each task's
            own.
        shots: Few-shot examples before each question.
        chat: A prompt is a user's message in the model's chat template.
        truncate: Prompts that are too long for the model are cut on the left, not refused.
        seed: Draws splits and few-shot examples, so that none of these is in a split. None for 0, or, of a calibrated
            file, for its own search's.
    """

    tasks: tuple[str, ...] = ()
    data: tuple[Path, ...] = ()
    scoring: str | None = None
    shots: int = 0
    chat: bool = False
    truncate: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        """Raises TaskError for a number of shots or a seed below 0, or far too large."""
        object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))
        object.__setattr__(self, "data", tuple(dict.fromkeys(self.data)))
        if not 0 <= self.shots <= _MOST_SHOTS:
            raise TaskError(f"the number of few-shot examples is {self.shots}; it must be 0 to {_MOST_SHOTS}")
        if not 0 <= self.drawing_seed < _SEEDS:
            raise TaskError(f"the seed is {self.seed}; it must be from 0 to {_SEEDS - 1}")

    @property
    def sources(self) -> tuple[str | Path, ...]:
        """Tasks and data files."""
        return self.tasks + self.data

    @property
    def drawing_seed(self) -> int:
        """The seed, 0 where there is none."""
        return self.seed or 0

    def load(self) -> list[TaskExamples]:
        """All questions, by task and data file.

        Raises:
            TaskError: If there is no such task or file, its rows can't be had or don't fit, they can't be scored so,
                there are too few for the few-shot examples, or two sources have the same name.
        """
        found = [
            load_examples(name, scoring=self.scoring, shots=self.shots, seed=self.drawing_seed) for name in self.tasks
        ]
        found += [self._scored(read_examples(path)) for path in self.data]
        names = [task.name for task in found]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise TaskError(f"two of the tasks are called {twice}; rename a file")
        return found

    def _scored(self, data: TaskExamples) -> TaskExamples:
        """A data file's questions, scored as was asked for."""
        if self.shots:
            raise TaskError(
                f"{data.name}: few-shot examples are drawn from the rows of a task; put those of a data file into its "
                f"prompts"
            )
        ways = (LIKELIHOOD, PER_TOKEN, FIRST_TOKEN) if data.generation is None else (GENERATION,)
        if self.scoring not in (None, *ways):
            raise TaskError(
                f"{data.name}: the prompts of a data file stand as they are, so they can't be scored as "
                f"{self.scoring!r}; pass {' or '.join(ways)}, or leave it out"
            )
        examples = tuple(replace(example, first_token=self.scoring == FIRST_TOKEN) for example in data.examples)
        return replace(data, examples=examples, length_normalized=self.scoring == PER_TOKEN)
