"""What long work has computed so far, on disk: where it was interrupted, the same work goes on.

A journal is a folder. `journal.json` says which work it belongs to; `units-PROCESS.jsonl` has a line for each
finished unit of it, {"unit": key, "value": JSON, "check": sum}, written by one process and read by all. Numbers
survive exactly (JSON holds Python floats to the last bit), so resumed work gives the same answer. A line that was
cut off by a crash, or that the sum doesn't fit, counts as not written: its unit is computed again. Where a unit has two
lines the last one counts. A process locks its file: the same search can't write to it twice at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from act_export.errors import ActExportError
from act_export.files import check_replaceable, write_whole
from act_export.json_file import parse_object, read_object
from act_export.staging import sweep, try_lock

FORMAT_VERSION = 2
_DESCRIPTION = "journal.json"
_LARGEST_SHOWN = 60


class JournalError(ActExportError):
    """A journal that belongs to other work, or can't be read or written."""


class Journal:
    """The finished units of one search, or other work.

    Attributes:
        folder: Where it is.
        values: By unit.
        damaged: Lines that were left out.
    """

    def __init__(self, folder: str | os.PathLike[str], search: Mapping[str, Any], *, process: int = 0) -> None:
        """Opens the folder's journal, or begins one.

        Args:
            folder: Made if it isn't there.
            search: Or other work: all that decides what the units are and what they give; JSON with names as keys.
            process: Number of this process among those that write to the folder.

        Raises:
            JournalError: If the folder has other work's journal, naming what differs, is in use, or can't be used.
        """
        self.folder = Path(folder)
        self._path = self.folder / f"units-{process}.jsonl"
        self._file: TextIO | None = None
        self.damaged = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            for place in (self.folder / _DESCRIPTION, self._path, *self.folder.glob("units-*.jsonl")):
                check_replaceable(place, error=JournalError)
            self._check_or_begin(json.loads(json.dumps(search)))
            self._open_to_write_later()
            self.values: dict[str, Any] = dict(self._read())
        except OSError as error:
            raise JournalError(f"can't use the journal {self.folder}: {error}; pass another with --journal") from error

    def record(self, key: str, value: Any) -> None:
        """Writes a finished unit down, for good before this returns.

        Raises:
            JournalError: If it can't be written.
        """
        line = json.dumps({"unit": key, "value": value, "check": _sum_of(key, value)}) + "\n"
        try:
            if self._file is None:
                self._file = self._open()
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
        path = self.folder / _DESCRIPTION
        # In this order: another process may begin the journal meanwhile, whose description is its first file.
        is_empty = all(file.name.startswith(".") for file in self.folder.iterdir())
        if not path.exists():
            if not is_empty:
                raise JournalError(
                    f"{self.folder} has no journal.json, so it is no journal, and it isn't empty; pass another folder "
                    f"with --journal"
                )
            write_whole(path, json.dumps({"version": FORMAT_VERSION, "search": search}, indent=1) + "\n")
        begun = read_object(path, error=JournalError, advice="pass another folder with --journal")
        version, before = begun.get("version"), begun.get("search")
        if type(version) is not int or not isinstance(before, dict):
            raise JournalError(f"{path} is no search's description; pass another folder with --journal")
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
            with path.open("rb") as lines:
                for line in lines:
                    if not line.endswith(b"\n"):
                        break  # it was cut off
                    try:
                        entry = parse_object(line, str(path), infinite=True)  # as `record` writes them
                        if type(entry["unit"]) is not str or entry["check"] != _sum_of(entry["unit"], entry["value"]):
                            raise ValueError
                    except (ActExportError, KeyError, ValueError):
                        self.damaged += 1
                    else:
                        yield entry["unit"], entry["value"]

    def _open_to_write_later(self) -> None:
        """A journal that can only be read is good for a search that has all of its units."""
        try:
            self._file = self._open()
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise

    def _open(self) -> TextIO:
        """This process's file, locked, to write on at the start of a line."""
        file = self._path.open("a", encoding="utf-8")
        try:
            if try_lock(file.fileno()) is False:
                raise JournalError(
                    f"another process is using {self._path}; wait until the search that is running has ended, or pass "
                    f"another folder with --journal"
                )
            written = self._path.read_bytes()
            if not written.endswith(b"\n"):
                file.truncate(written.rfind(b"\n") + 1)
        except BaseException:
            file.close()
            raise
        return file


def own_journal(folder: Path, work: Mapping[str, Any], *, process: int = 0) -> Journal | None:
    """A journal that nobody asked for, in a folder in which all work has its own; None where it can't be written to.

    Args:
        folder: Made if it isn't there.
        work: As of `Journal`, and so is the process.
        process: Of several.
    """
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, work]).encode()).hexdigest()[:16]
    try:
        return Journal(folder / digest, work, process=process)
    except JournalError:
        return None


def are_numbers(value: Any, count: int) -> bool:
    """Whether a value, as JSON has it, is a list of so many numbers."""
    return isinstance(value, list) and len(value) == count and all(type(each) in (int, float) for each in value)


def _sum_of(key: Any, value: Any) -> str:
    return hashlib.sha256(json.dumps([key, value]).encode()).hexdigest()[:16]


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
