"""From a data set's own rows to the rows that a task's templates read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from act_export.errors import shortened, shown
from act_export.limits import time_limit
from act_export.tasks.examples import TaskError

_SECONDS = 2.0  # that a pattern may take for a row


@dataclass(frozen=True)
class RowForm:
    """Where the fields of a task's row come from.

    Attributes:
        fields: For each field of the task's row the field of the data set; "a.b" is field b inside field a. Empty: the
            rows are used as they are.
        answer: The field of the task's row that has the right choice.
        labels: The data set's field with the names of the choices, where the answer is one of these names; else "".
        pattern: The data set's field and a regular expression for it, whose named groups become fields; else None.
    """

    fields: Mapping[str, str] = field(default_factory=dict)
    answer: str = ""
    labels: str = ""
    pattern: tuple[str, str] | None = None

    def row(self, source: Mapping[str, Any]) -> dict[str, Any]:
        """One row of the task; an answer that is a name becomes its index.

        Raises:
            ValueError: If a field is missing, the pattern doesn't fit, or the answer is none of the names.
        """
        if not self.fields:
            return dict(source)
        if self.pattern is not None:
            name, regex = self.pattern
            text = _field(source, name)
            with time_limit(
                _SECONDS, f"the pattern {shown(regex)} on {shown(text)}", "pass a simpler one", error=TaskError
            ):
                match = re.fullmatch(regex, str(text), re.DOTALL)
            if match is None:
                raise ValueError(f"{name} is {shown(text)}, which doesn't fit the pattern {shown(regex)}")
            source = {**source, **match.groupdict()}
        row = {mine: _field(source, theirs) for mine, theirs in self.fields.items()}
        if self.labels:
            given = _field(source, self.labels)
            if not isinstance(given, list | tuple):
                raise ValueError(f"{self.labels} is {shown(given)}; it must be a list of the choices' names")
            names = [str(name) for name in given]
            if str(row[self.answer]) not in names:
                answer = shown(row[self.answer])
                raise ValueError(f"{self.fields[self.answer]} is {answer}, which is none of {shown(names)}")
            row[self.answer] = names.index(str(row[self.answer]))
        return row


def _field(source: Mapping[str, Any], path: str) -> Any:
    value: Any = source
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(f"there is no field {path!r}; there is {shortened(', '.join(map(repr, source)), 300)}")
        value = value[part]
    return value
