"""Where a task's rows come from: the hub, a file or folder, or what an earlier run kept of the hub's."""

from __future__ import annotations

import codecs
import json
import os
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from act_export.files import cache_folder, write_whole
from act_export.json_file import MOST_VALUES, kind_of, parse_json, read_bytes
from act_export.tasks.examples import TABLES, TaskError, read_rows
from act_export.tasks.row_form import RowForm

if TYPE_CHECKING:
    from datasets import Dataset


_LARGEST_JSON = 1 << 30
SHOT_ROWS = 512  # of a training split, drawn from all of it
_LOADERS = {suffix: suffix[1:] for suffix in TABLES}


class HubError(TaskError):
    """A data set that the hub doesn't give."""


@dataclass(frozen=True)
class HubSource:
    """A data set on the Hugging Face hub.

    Attributes:
        dataset: Its id.
        split: Of the questions, as "validation" or "validation+test".
        config: "" for the only one.
        revision: "" for the newest.
        shots: Split of the few-shot examples; "" to take them from the questions.
        form: From its rows to the task's.
    """

    dataset: str
    split: str
    config: str = ""
    revision: str = ""
    shots: str = ""
    form: RowForm = field(default_factory=RowForm)


@dataclass(frozen=True)
class FileSource:
    """A file, or a folder that the datasets library reads.

    Attributes:
        path: `*.jsonl`, `*.json`, `*.parquet`, `*.arrow`, `*.csv`, or a folder.
        split: Of a folder with several; "" for its only one.
        shots: File, or split of the folder, with the few-shot examples; "" to take them from the questions.
        form: From its rows to the task's.
    """

    path: Path
    split: str = ""
    shots: str = ""
    form: RowForm = field(default_factory=RowForm)


@dataclass(frozen=True)
class Row:
    """The fields of a row, and where it is, for messages."""

    fields: Mapping[str, Any]
    where: str


@dataclass(frozen=True)
class Rows:
    """A task's rows.

    Attributes:
        questions: At least one.
        shots: For few-shot examples; None to take them from the questions.
        place: The questions' file or data set, for messages.
    """

    questions: tuple[Row, ...]
    shots: tuple[Row, ...] | None
    place: str


def rows_path(name: str) -> Path:
    """Where a built-in task's rows are kept: one JSON object per line."""
    return cache_folder() / "tasks" / f"{name}.jsonl"


def cached_rows(name: str, source: HubSource) -> Rows:
    """Rows of a built-in task, from the cache folder, or from the hub and then kept there.

    Raises:
        HubError: If they are neither in the cache nor to be had from the hub.
        TaskError: If they can't be kept.
    """
    path, shots_path = rows_path(name), rows_path(f"{name}.shots")
    if not os.path.isfile(path):  # a folder that may not be read is one without rows
        try:
            found = hub_rows(name, source)
        except HubError as error:
            raise HubError(f"the rows of {name} are not at {path}, and {error}") from error
        if found.shots is not None:  # the questions come last: without them nothing counts as kept
            keep_rows(shots_path, (row.fields for row in found.shots))
        keep_rows(path, (row.fields for row in found.questions))
    questions = _kept(path, name)
    if not questions:
        raise TaskError(f"{path} has no rows; delete it to fetch it anew")
    return Rows(questions, _kept(shots_path, f"{name}.shots") if os.path.isfile(shots_path) else None, str(path))


def hub_rows(name: str, source: HubSource) -> Rows:
    """Rows of a data set on the hub.

    Raises:
        HubError: If the hub doesn't give them, or the datasets library is missing.
        TaskError: Naming the row that doesn't fit.
    """
    try:
        datasets = _datasets(f"{source.dataset} is on the hub")
    except TaskError as error:
        raise HubError(str(error)) from error

    def load(split: str) -> Dataset:
        try:
            return datasets.load_dataset(
                source.dataset, source.config or None, split=split, revision=source.revision or None
            )
        except Exception as error:  # of the network, the disk, parsers, or the data set's own
            raise HubError(
                f"{source.dataset}, split {split}, can't be fetched from the hub ({type(error).__name__}: {error})"
            ) from error

    questions = load(source.split)
    shots = load(source.shots) if source.shots else None
    return Rows(
        _formed(questions.to_list(), source.form, name),
        None if shots is None else _formed(_sample(shots).to_list(), source.form, f"the shots of {name}"),
        source.dataset,
    )


def file_rows(source: FileSource) -> Rows:
    """Rows of a file or folder.

    Raises:
        TaskError: If it can't be read, or naming the row that doesn't fit.
    """
    path = source.path
    if path.is_dir():
        questions = _formed(_folder(path, source.split).to_list(), source.form, path.name)
        shots = _formed(_folder(path, source.shots).to_list(), source.form, path.name) if source.shots else None
    else:
        questions = _file(path, source.form)
        shots = _file(path.parent / source.shots, source.form) if source.shots else None
    if not questions:
        raise TaskError(f"{path} has no rows")
    return Rows(questions, shots, str(path))


def _file(path: Path, form: RowForm) -> tuple[Row, ...]:
    if path.suffix in _LOADERS:
        datasets = _datasets(f"{path.name} is a {path.suffix} file")
        try:
            table = datasets.load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
        except Exception as error:  # of the disk or the parser
            raise TaskError(f"can't read {path}: {type(error).__name__}: {error}") from error
        return _formed(table.to_list(), form, path.name)
    if path.suffix == ".json":
        content = read_bytes(path, error=TaskError, largest_bytes=_LARGEST_JSON)
        if content.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):  # else it is JSON Lines
            whole = parse_json(
                content,
                str(path),
                error=TaskError,
                largest_bytes=_LARGEST_JSON,
                most_values=10 * MOST_VALUES,
                repeats=True,
                infinite=True,
            )
            odd = next((row for row in whole if not isinstance(row, dict)), None)
            if odd is not None:
                raise TaskError(f"{path} lists a {kind_of(odd)}; each row must be a JSON object")
            return _formed(whole, form, path.name)
    rows = [(f"line {number} of {path.name}", row) for number, row in read_rows(path)]
    return tuple(_form(row, form, where) for where, row in rows)


def _folder(path: Path, split: str) -> Dataset:
    datasets = _datasets(f"{path} is a folder")
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = datasets.load_from_disk(str(path))
        else:
            found = datasets.load_dataset(str(path))
    except Exception as error:  # of the disk, parsers, or the data set's own
        raise TaskError(f"can't read {path}: {type(error).__name__}: {error}") from error
    if not isinstance(found, dict):
        return found
    if split not in found and not (split == "" and len(found) == 1):
        wanted = f"no split {split!r}" if split else "more than one split"
        raise TaskError(f'{path} has {wanted}; "split" must be {" or ".join(found)}')
    return found[split] if split else next(iter(found.values()))


def _datasets(why: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"{why}, and reading them needs the datasets library: pip install 'act-export[tasks]'"
        ) from error
    return datasets


def _sample(rows: Dataset) -> Dataset:
    if len(rows) <= SHOT_ROWS:
        return rows
    return rows.select(sorted(random.Random(0).sample(range(len(rows)), SHOT_ROWS)))


def _formed(rows: Iterable[Mapping[str, Any]], form: RowForm, name: str) -> tuple[Row, ...]:
    return tuple(_form(row, form, f"row {number} of {name}") for number, row in enumerate(rows, start=1))


def _form(row: Mapping[str, Any], form: RowForm, where: str) -> Row:
    try:
        return Row(form.row(row), where)
    except ValueError as error:
        raise TaskError(f"{where}: {error}") from error


def _kept(path: Path, name: str) -> tuple[Row, ...]:
    return tuple(Row(row, f"row {number} of {name}") for number, row in read_rows(path))


def keep_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a task's rows to where they are kept.

    Raises:
        TaskError: If that can't be written.
    """
    try:
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), error=TaskError)
    except OSError as error:
        raise TaskError(
            f"can't write {path}: {error}; make the folder writable, or set XDG_CACHE_HOME to one that is"
        ) from error
