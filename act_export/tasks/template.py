"""Texts with places for a row's fields, as in "Question: {question}"."""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from act_export.errors import shortened, shown

CONTENT_FREE = "N/A"

FILTERS: Mapping[str, Callable[[str], str]] = {
    "lower_first": lambda text: text[:1].lower() + text[1:],
    "no_period": lambda text: text.removesuffix("."),
    "spaced": lambda text: text.replace("_", " "),
}


@dataclass(frozen=True)
class Template:
    """A text with places for fields: `{name}`, or `{name:filter}` for the field's value changed by one of `FILTERS`.

    Braces that stand for themselves are written twice, as in `str.format`; nothing else of its syntax is allowed.

    Attributes:
        text: As written.
        fields: Names of the fields it has places for.

    Raises:
        ValueError: If the text is no template, naming the place.
    """

    text: str
    fields: frozenset[str] = field(init=False, compare=False)
    _parts: tuple[tuple[str, str, str], ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        """Parses the text."""
        parts = []
        for literal, name, filter_name, conversion in _parsed(self.text):
            if name is not None and (not name.isidentifier() or conversion):
                raise ValueError(
                    f"{{{shortened(name, 100)}}} in the template {shown(self.text)} isn't the name of a field"
                )
            if filter_name and filter_name not in FILTERS:
                raise ValueError(
                    f"{shown(name)} in the template {shown(self.text)} has the filter {shown(filter_name)}; there is "
                    f"{', '.join(FILTERS)}"
                )
            parts.append((literal, name or "", filter_name or ""))
        object.__setattr__(self, "_parts", tuple(parts))
        object.__setattr__(self, "fields", frozenset(name for _, name, _ in parts if name))

    def render(self, values: Mapping[str, str]) -> str:
        """The text with the fields' values; the content-free value stays as it is in every filter.

        Raises:
            ValueError: If there is no value for a field, naming those there are.
        """
        pieces = []
        for literal, name, filter_name in self._parts:
            pieces.append(literal)
            if name:
                if name not in values:
                    raise ValueError(
                        f"there is no field {name!r}, which the template {shown(self.text)} uses; there is "
                        f"{shortened(', '.join(map(repr, values)), 300)}"
                    )
                value = values[name]
                pieces.append(FILTERS[filter_name](value) if filter_name and value != CONTENT_FREE else value)
        return "".join(pieces)


def _parsed(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    try:
        return list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"the template {shown(text)}: {error}") from error
