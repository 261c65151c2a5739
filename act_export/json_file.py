"""Reading JSON that somebody else wrote: one reader for all of it, with limits on what a text may ask for.

A text may be nested without end, hold millions of keys, or numbers that take minutes to read. What is over a limit is
refused with the limit; what isn't JSON, or isn't of the wanted kind, with the place.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from act_export.errors import ActExportError, shown
from act_export.plain_file import open_plain

LARGEST_BYTES = 64 << 20
MOST_VALUES = 2_000_000  # the index of a large mixture of experts names 100,000 tensors
MOST_LEVELS = 64
MOST_DIGITS = 400  # a float has 309 before the point
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(
    text: str | bytes,
    what: str,
    *,
    error: type[ActExportError] = ActExportError,
    advice: str = "",
    largest_bytes: int = LARGEST_BYTES,
    most_values: int = MOST_VALUES,
    repeats: bool = False,
    infinite: bool = False,
) -> Any:
    """The value of a JSON text.

    Args:
        text: As a string, or in UTF-8, with or without a byte order mark.
        what: It is called so in errors, e.g. "config.json of smollm2".
        error: What is raised.
        advice: What to do, at the end of every message.
        largest_bytes: That it may have.
        most_values: Elements and members that it may have in all, by its commas.
        repeats: Whether an object may have a key twice; the last counts, as everywhere in Python.
        infinite: Whether NaN and Infinity, which are no JSON, are read as Python's own reader has them.

    Raises:
        ActExportError: Or `error`, if it isn't JSON or is over a limit, with the reason.
    """
    end = f"; {advice}" if advice else ""

    def refuse(reason: str) -> ActExportError:
        return error(f"{what} {reason}{end}")

    if len(text) > largest_bytes:
        raise refuse(f"has {len(text)} bytes; JSON of more than {largest_bytes} isn't read")

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs) and not repeats:
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise refuse(f"names {shown(twice)} twice, so it can't be told which counts")
        return found

    def whole(digits: str) -> int:
        if len(digits) > MOST_DIGITS:
            raise refuse(f"has a number of {len(digits)} digits, {digits[:20]}...; more than {MOST_DIGITS} aren't read")
        return int(digits)

    def fraction(digits: str) -> float:
        number = float(digits)
        if not math.isfinite(number) and not infinite:
            raise refuse(f"has the number {shown(digits)}, which is too large to compute with")
        return number

    def constant(name: str) -> float:
        if not infinite:
            raise refuse(f"has {name}, which is no number")
        return float(name)

    try:
        plain = (text if isinstance(text, str) else text.decode("utf-8-sig")).removeprefix("\ufeff")
        if plain.count(",") > most_values:  # also those within strings: it is counted before anything is made of it
            raise refuse(f"has more than {most_values} commas; JSON with more of them isn't read")
        found = json.loads(
            plain,
            object_pairs_hook=members,
            parse_int=whole,
            parse_float=fraction,
            parse_constant=constant,
        )
    except RecursionError as cause:
        raise refuse(f"is nested too deeply; at most {MOST_LEVELS} levels are read") from cause
    except ValueError as cause:
        raise error(f"{what} isn't JSON: {cause}{end}") from cause
    if (isinstance(text, str) or _ESCAPED_SURROGATE.search(plain)) and not _is_text(found):
        raise refuse('has half a surrogate pair, as in "\\ud800", which is no text')
    if _levels(found) > MOST_LEVELS:
        raise refuse(f"is nested too deeply; at most {MOST_LEVELS} levels are read")
    return found


def parse_object(text: str | bytes, what: str, **limits: Any) -> dict[str, Any]:
    """As `parse_json`, of a JSON object; anything else is an error too."""
    found = parse_json(text, what, **limits)
    if not isinstance(found, dict):
        error, advice = limits.get("error", ActExportError), limits.get("advice", "")
        raise error(f"{what} is no JSON object but a {kind_of(found)}" + (f"; {advice}" if advice else ""))
    return found


def read_json(path: Path, what: str = "", **limits: Any) -> Any:
    """As `parse_json`, of a file; one that can't be read is an error too.

    Args:
        path: The file.
        what: As in `parse_json`; the path where it is empty.
        limits: As in `parse_json`.
    """
    return parse_json(_content(path, what, limits), what or str(path), **limits)


def read_bytes(
    path: Path,
    what: str = "",
    *,
    error: type[ActExportError] = ActExportError,
    advice: str = "",
    largest_bytes: int = LARGEST_BYTES,
) -> bytes:
    """A file's content, or where it has more than `largest_bytes` one more of them; arguments as of `read_json`.

    Raises:
        ActExportError: Or `error`, if it can't be read, or is a pipe or a device.
    """
    try:
        with open_plain(path) as file:
            return file.read(largest_bytes + 1)
    except (OSError, ValueError) as cause:  # a name with a zero is a ValueError
        end = f"; {advice}" if advice else ""
        raise error(f"can't read {what or path}: {getattr(cause, 'strerror', None) or cause}{end}") from cause


def read_object(path: Path, what: str = "", **limits: Any) -> dict[str, Any]:
    """As `read_json`, of a JSON object; anything else is an error too."""
    return parse_object(_content(path, what, limits), what or str(path), **limits)


def _content(path: Path, what: str, limits: Mapping[str, Any]) -> bytes:
    return read_bytes(path, what, **{key: limits[key] for key in ("error", "advice", "largest_bytes") if key in limits})


def look_up(found: Any, *names: str) -> Any:
    """A field of JSON objects within each other; None where there is none."""
    for name in names:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def kind_of(value: Any) -> str:
    """What JSON calls a value's type."""
    kinds = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _is_text(found: Any) -> bool:
    """Whether all strings can be written in UTF-8."""
    try:
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    except RecursionError:  # which is refused for that
        return True
    return True


def _levels(value: Any) -> int:
    """How deeply lists and objects are nested, counted without recursion."""
    level, layer = 0, [value]
    while layer := [each for each in layer if isinstance(each, dict | list)]:
        level += 1
        if level > MOST_LEVELS:
            break
        layer = [inner for each in layer for inner in (each.values() if isinstance(each, dict) else each)]
    return level
