"""A task is data: a JSON file that says how a row becomes a question, and where the rows come from."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_export.errors import others_errors, shown
from act_export.json_file import parse_object
from act_export.limits import time_limit
from act_export.tasks.examples import MOST_CHOICES, Generation, TaskError
from act_export.tasks.row_form import RowForm
from act_export.tasks.sources import FileSource, HubSource
from act_export.tasks.task_definition import GENERATION, LETTER, LIKELIHOOD, Derived, Format, Task
from act_export.tasks.template import Template

METRICS = ("exact", "f1")
_MOST_NEW_TOKENS = 1_000_000

_EVERY = {"name", "description", "scoring", "shot", "shots_alike", "key", "unique", "derived", "hub", "path", "package"}
_KINDS = {
    "labels": {"labels", "answer", "instruction", "template"},
    "options": {"options", "answer", "formats"},
    "references": {"references", "no_reference", "generation", "instruction", "template"},
}
_FORM = {"fields", "labels", "pattern"}
_HUB = {"dataset", "config", "revision", "split", "shots"} | _FORM
_PATH = {"file", "split", "shots"} | _FORM


def read_task(text: str | bytes, origin: Path) -> Task:
    """The task of a task file.

    Args:
        text: The file's.
        origin: The file: paths in it begin at its folder, and it has the task's name where the text has none.

    Raises:
        TaskError: If it isn't a task, naming the file and the place.
    """
    document = parse_object(text, f"the task file {origin}", error=TaskError)
    try:
        return _task(document, origin)
    except (TaskError, ValueError) as error:
        raise TaskError(f"{origin} is no task: {error}") from error


def _task(document: Mapping[str, Any], origin: Path) -> Task:
    kinds = [name for name in _KINDS if name in document]
    if len(kinds) != 1:
        raise ValueError(f"it has {' and '.join(kinds) or 'none'} of {', '.join(_KINDS)}; it must have one of them")
    kind = kinds[0]
    _known(document, _EVERY | _KINDS[kind], f"a task with {kind}")
    answer = "" if kind == "references" else _text(document, "answer")
    formats = _formats(document, kind)
    derived = {name: _derived(value, name) for name, value in _object(document, "derived", {}).items()}
    labels = tuple(_texts(document, "labels")) if kind == "labels" else ()
    if kind == "labels" and (not 2 <= len(labels) <= MOST_CHOICES or len(set(labels)) < len(labels)):
        raise ValueError(f"labels are {shown(list(labels))}; there must be 2 to {MOST_CHOICES}, all different")
    if kind == "options" and len(formats) > 1 and "key" not in document:
        raise ValueError('it lacks "key", a template of the question that is the same in every format')
    task = Task(
        name=_text(document, "name", origin.stem),
        description=_text(document, "description", ""),
        formats=formats,
        scoring=_text(document, "scoring", next(iter(formats))),
        source=_source(document, origin.parent, answer),
        answer=answer,
        labels=labels,
        options=_options(document) if kind == "options" else (),
        references=_text(document, "references") if kind == "references" else "",
        no_reference=_text(document, "no_reference", ""),
        generation=_generation(_object(document, "generation")) if kind == "references" else None,
        derived=derived,
        shot=Template(_text(document, "shot", "{prompt}{answer}\n\n")),
        shots_alike=_template(document, "shots_alike"),
        key=_template(document, "key"),
        unique=_template(document, "unique"),
        package=_text(_object(document, "package", {}), "requirement", ""),
    )
    if task.scoring not in task.scorings:
        raise ValueError(f"scoring is {shown(task.scoring)}; it must be one of {', '.join(task.scorings)}")
    if task.shot.fields != {"prompt", "answer"}:
        raise ValueError(f"shot is {shown(task.shot.text)}; it must have a place for each of {{prompt}} and {{answer}}")
    return task


def _formats(document: Mapping[str, Any], kind: str) -> dict[str, Format]:
    if kind != "options":
        form = Format(Template(_text(document, "instruction", "")), Template(_text(document, "template")))
        formats = {GENERATION if kind == "references" else LIKELIHOOD: form}
    else:
        formats = {}
        for name, part in _object(document, "formats").items():
            if name not in (LETTER, LIKELIHOOD):
                raise ValueError(f"formats has {shown(name)}; it may have {LETTER!r} and {LIKELIHOOD!r}")
            if not isinstance(part, dict):
                raise ValueError(f"the format {name!r} is {shown(part)}; it must be an object")
            _known(
                part, {"instruction", "template"} | ({"choice"} if name == LIKELIHOOD else set()), f"format {name!r}"
            )
            choice = Template(_text(part, "choice", " {option}")) if name == LIKELIHOOD else None
            formats[name] = Format(Template(_text(part, "instruction", "")), Template(_text(part, "template")), choice)
            if choice is not None and "option" not in choice.fields:
                raise ValueError(f"choice is {choice.text!r}; it must have a place for {{option}}")
            if name == LETTER and "options" not in formats[name].template.fields:
                raise ValueError("the template of the format 'letter' has no place for {options}")
        if not formats:
            raise ValueError(f"formats is empty; it must have {LETTER!r}, {LIKELIHOOD!r} or both")
    for form in formats.values():
        if not form.template.text or form.template.text[-1].isspace():
            raise ValueError(
                f"the template {shown(form.template.text)} must be a text that doesn't end with a space; choices begin "
                f"with theirs"
            )
    return formats


def _source(document: Mapping[str, Any], folder: Path, answer: str) -> HubSource | FileSource:
    if ("hub" in document) == ("path" in document):
        raise ValueError('it must say where its rows come from: "hub" or "path", one of them')
    if "hub" in document:
        hub = _object(document, "hub")
        _known(hub, _HUB, "hub")
        return HubSource(
            _text(hub, "dataset"),
            _text(hub, "split"),
            _text(hub, "config", ""),
            _text(hub, "revision", ""),
            _text(hub, "shots", ""),
            row_form(hub, answer),
        )
    path = {"file": document["path"]} if isinstance(document["path"], str) else _object(document, "path")
    _known(path, _PATH, "path")
    file = folder / _text(path, "file")
    return FileSource(file, _text(path, "split", ""), _text(path, "shots", ""), row_form(path, answer))


def row_form(part: Mapping[str, Any], answer: str) -> RowForm:
    """The row form of a source in a task file.

    Args:
        part: Has "fields", and maybe "labels" and "pattern"; without "fields" rows are used as they are.
        answer: The task's field with the right choice.

    Raises:
        ValueError: Naming what is wrong.
    """
    fields = _object(part, "fields", {})
    if not all(isinstance(theirs, str) for theirs in fields.values()):
        raise ValueError(f"fields is {shown(fields)}; it must have the name of a field for each")
    for name in ("labels", "pattern"):
        if name in part and not fields:
            raise ValueError(f'"{name}" needs "fields"')
    if "labels" in part and answer not in fields:
        raise ValueError(f'"labels" says how {answer!r} is named, which is none of fields: {shown(list(fields))}')
    pattern = None
    if "pattern" in part:
        given = _object(part, "pattern")
        _known(given, {"field", "regex"}, "pattern")
        pattern = (_text(given, "field"), _text(given, "regex"))
        what = f"the regex {shown(pattern[1])}"
        with others_errors(f"{what} can't be read", error=TaskError), time_limit(2, what, error=TaskError):
            re.compile(pattern[1])
    return RowForm(fields, answer, _text(part, "labels", ""), pattern)


def _generation(part: Mapping[str, Any]) -> Generation:
    _known(part, {"max_new_tokens", "stop", "metric"}, "generation")
    count = part.get("max_new_tokens", 50)
    if type(count) is not int or not 1 <= count <= _MOST_NEW_TOKENS:
        raise ValueError(f"max_new_tokens is {shown(count)}; it must be a number from 1 to {_MOST_NEW_TOKENS}")
    metric = _text(part, "metric", "f1")
    if metric not in METRICS:
        raise ValueError(f"metric is {shown(metric)}; it must be {' or '.join(METRICS)}")
    return Generation(count, tuple(_texts(part, "stop")) if "stop" in part else ("\n",), metric)


def _derived(part: Any, name: str) -> Derived:
    if not isinstance(part, dict):
        raise ValueError(f"derived {name!r} is {shown(part)}; it must be an object")
    _known(part, {"field", "values"}, f"derived {name!r}")
    values = _object(part, "values")
    if not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"values of derived {shown(name)} are {shown(values)}; they must be texts")
    return Derived(_text(part, "field"), values)


def _options(document: Mapping[str, Any]) -> str | tuple[str, ...]:
    return document["options"] if isinstance(document["options"], str) else tuple(_texts(document, "options"))


def _template(document: Mapping[str, Any], name: str) -> Template | None:
    return Template(_text(document, name)) if name in document else None


def _known(part: Mapping[str, Any], names: set[str], what: str) -> None:
    unknown = [name for name in part if name not in names]
    if unknown:
        raise ValueError(f"{what} has no {shown(unknown[0])}; it may have {', '.join(sorted(names))}")


def _text(part: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = part.get(name, default)
    if value is None:
        raise ValueError(f"it lacks {name!r}")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be a text")
    return value


def _texts(part: Mapping[str, Any], name: str) -> list[str]:
    value = part.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{name} is {shown(value)}; it must be a list of texts that are not empty")
    return value


def _object(part: Mapping[str, Any], name: str, default: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    value = part.get(name, default)
    if value is None:
        raise ValueError(f"it lacks {name!r}")
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}; it must be an object")
    return value
