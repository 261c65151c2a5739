"""Members of a JSON object, each taken as it must be, or refused with its name, its value and what to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from act_export.errors import ActExportError, shown
from act_export.json_file import kind_of

LARGEST = 2**31 - 1


class Fields:
    """The members of one object.

    Attributes:
        members: By name.
        what: The object is called so in errors, e.g. "limits of model.onnx".
        error: What is raised.
        advice: What to do, at the end of every message.
    """

    def __init__(
        self, members: Any, what: str, *, error: type[ActExportError] = ActExportError, advice: str = ""
    ) -> None:
        """Takes a value that must be an object.

        Raises:
            ActExportError: Or `error`, if it is none.
        """
        self.what, self.error, self.advice = what, error, advice
        if not isinstance(members, Mapping):
            raise self.refused(f"is {_shown(members)}; it must be an object")
        self.members: Mapping[str, Any] = members

    def refused(self, reason: str) -> ActExportError:
        """The error for this object: what it is called, the reason, and the advice."""
        return self.error(f"{self.what} {reason}" + (f"; {self.advice}" if self.advice else ""))

    def only(self, names: Collection[str]) -> None:
        """Refuses an object with members of other names."""
        unknown = next((name for name in self.members if name not in names), None)
        if unknown is not None:
            raise self.refused(f"has an unknown field {shown(unknown)}; known are {', '.join(sorted(names))}")

    def given(self, name: str) -> bool:
        """Whether there is a member of this name, and it isn't null."""
        return self.members.get(name) is not None

    def value(self, name: str) -> Any:
        """A member of any kind."""
        if name not in self.members:
            raise self.refused(f"has no field {name!r}")
        return self.members[name]

    def text(self, name: str, longest: int = 10_000) -> str:
        """A string, of so many characters at the most."""
        value = self.value(name)
        if not isinstance(value, str):
            raise self._wrong(name, value, "a text")
        if len(value) > longest:
            raise self._wrong(name, value, f"a text of at most {longest} characters")
        return value

    def flag(self, name: str) -> bool:
        """A boolean."""
        value = self.value(name)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def whole(self, name: str, lowest: int = 0, highest: int = LARGEST) -> int:
        """A whole number within limits."""
        value = self.value(name)
        if not _is_whole(value, lowest, highest):
            raise self._wrong(name, value, f"a whole number from {lowest} to {highest}")
        return int(value)

    def number(self, name: str, lowest: float = -math.inf, highest: float = math.inf) -> float:
        """A finite number within limits."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
            raise self._wrong(name, value, "a number")
        if not lowest <= value <= highest:
            raise self._wrong(name, value, f"a number from {lowest:g} to {highest:g}")
        return float(value)

    def wholes(self, name: str, lowest: int = 0, highest: int = LARGEST) -> tuple[int, ...]:
        """A list of whole numbers within limits."""
        value = self.value(name)
        if not isinstance(value, list) or not all(_is_whole(each, lowest, highest) for each in value):
            raise self._wrong(name, value, f"a list of whole numbers from {lowest} to {highest}")
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        return tuple(Fields({name: each}, self.what, error=self.error).number(name) for each in self.items(name))

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of strings."""
        value = self.value(name)
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise self._wrong(name, value, "a list of texts")
        return tuple(value)

    def items(self, name: str) -> list[Any]:
        """A list of anything."""
        value = self.value(name)
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        what = f"{self.what}: {name}"
        return [Fields(each, what, error=self.error, advice=self.advice) for each in self.items(name)]

    def inner(self, name: str) -> Fields:
        """An object."""
        return Fields(self.value(name), f"{self.what}: {name}", error=self.error, advice=self.advice)

    def _wrong(self, name: str, value: Any, wanted: str) -> ActExportError:
        return self.refused(f"has {name} = {_shown(value)}; it must be {wanted}")


def _is_whole(value: Any, lowest: int, highest: int) -> bool:
    return type(value) is int and lowest <= value <= highest


def _shown(value: Any) -> str:
    """A value as JSON has it; a long list or object by its kind and number of members."""
    if isinstance(value, list | dict) and len(value) > 10:
        return f"{'an' if isinstance(value, dict) else 'a'} {kind_of(value)} of {len(value)}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else shown(value)
