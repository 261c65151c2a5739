"""What a search has computed so far, on disk: an interrupted search goes on where it stopped.

A journal is a folder. `journal.json` says which search it belongs to; `units-PROCESS.jsonl` has a line for each
finished unit of work, {"unit": key, "value": JSON}, written by one process and read by all. Numbers survive exactly
(JSON holds Python floats to the last bit), so a resumed search gives the same answer. A line that was cut off by a
crash counts as not written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from act_export.errors import ActExportError
from act_export.files import write_whole

FORMAT_VERSION = 1
_LARGEST_SHOWN = 60


class JournalError(ActExportError):
    """A journal that belongs to another search, or can't be read or written."""


class Journal:
    """The finished units of one search."""

    def __init__(self, folder: str | os.PathLike[str], search: Mapping[str, Any], *, process: int = 0) -> None:
        """Opens the folder's journal, or begins one.

        Args:
            folder: Made if it isn't there.
            search: All that decides what the units are and what they give; JSON with names as keys.
            process: Number of this process among those that write to the folder.

        Raises:
            JournalError: If the folder has another search's journal, naming what differs, or can't be used.
        """
        self.folder = Path(folder)
        self._path = self.folder / f"units-{process}.jsonl"
        self._file: TextIO | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_or_begin(json.loads(json.dumps(search)))
            self.values: dict[str, Any] = dict(self._read())
        except OSError as error:
            raise JournalError(f"can't use the journal {self.folder}: {error}; pass another with --journal") from error

    def record(self, key: str, value: Any) -> None:
        """Writes a finished unit down, for good before this returns.

        Raises:
            JournalError: If it can't be written.
        """
        line = json.dumps({"unit": key, "value": value}) + "\n"
        try:
            if self._file is None:
                self._file = self._open_at_a_line_start()
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(
                f"can't write to the journal {self._path}: {error}; what it has is safe, the same command goes on from "
                f"there"
            ) from error
        self.values[key] = value

    def close(self) -> None:
        """Closes the file; a later record opens it again."""
        if self._file is not None:
            with suppress(OSError):  # all that counts was written before `record` returned
                self._file.close()
            self._file = None

    def _check_or_begin(self, search: dict[str, Any]) -> None:
        path = self.folder / "journal.json"
        if not path.exists():
            names = [file.name for file in self.folder.iterdir()]
            if any(not name.startswith((".", "journal.json")) for name in names):
                raise JournalError(
                    f"{self.folder} has no journal.json, so it is no journal, and it isn't empty; pass another folder "
                    f"with --journal"
                )
            write_whole(path, json.dumps({"version": FORMAT_VERSION, "search": search}, indent=1) + "\n")
            return
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
            version, before = begun["version"], dict(begun["search"])
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{path} is not a search's description: {error!r}; pass another --journal") from error
        if version != FORMAT_VERSION:
            raise JournalError(
                f"{path} has version {version}; this act-export writes {FORMAT_VERSION}. Pass another folder with "
                f"--journal"
            )
        if before != search:
            raise JournalError(
                f"{self.folder} is the journal of another search: {difference(before, search)}. Pass another folder "
                f"with --journal, or repeat the search that it belongs to; nothing in it was changed"
            )

    def _read(self) -> Iterator[tuple[str, Any]]:
        for path in sorted(self.folder.glob("units-*.jsonl")):
            lines = path.read_bytes().split(b"\n")
            for number, line in enumerate(lines[:-1], start=1):  # what follows the last line's end was cut off
                try:
                    entry = json.loads(line)
                    yield entry["unit"], entry["value"]
                except (ValueError, KeyError, TypeError) as error:
                    raise JournalError(
                        f"{path}, line {number}: not a finished unit: {error!r}; take the line out, and the unit is "
                        f"done again, or pass another folder with --journal"
                    ) from error

    def _open_at_a_line_start(self) -> TextIO:
        cut_off = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        if cut_off:
            whole = self._path.read_bytes().rpartition(b"\n")
            with self._path.open("rb+") as file:
                file.truncate(len(whole[0]) + len(whole[1]))
        return self._path.open("a", encoding="utf-8")


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What tells two searches' descriptions apart: names and both values, shortened."""
    old, new = _flat(before), _flat(now)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return "; ".join(f"{name} was {_short(old.get(name))}, is {_short(new.get(name))}" for name in sorted(names))


def _flat(search: Mapping[str, Any]) -> dict[str, Any]:
    """Values in a mapping count one by one: those of "questions" are "questions of TASK"."""
    flat: dict[str, Any] = {}
    for name, value in search.items():
        flat |= (
            {f"{name} of {of}": inner for of, inner in value.items()} if isinstance(value, Mapping) else {name: value}
        )
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LARGEST_SHOWN else f"{text[:_LARGEST_SHOWN]}..."
