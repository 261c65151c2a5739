"""The journal keeps what was recorded, whatever happens to it."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.journal import Journal, JournalError

SEARCH: dict[str, Any] = {"model": "sha256:0", "seed": 0}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@pytest.mark.in_turn(2)
@given(units=st.lists(st.tuples(st.text(), json_values)), closes=st.sets(st.integers(0, 9)), lost=st.integers(0, 400))
def test_what_was_recorded_is_read_and_what_was_cut_off_is_not(
    units: Sequence[tuple[str, Any]], closes: set[int], lost: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("journal")
    journal = Journal(folder, SEARCH)
    for number, (key, value) in enumerate(units):
        journal.record(key, value)
        if number in closes:
            journal.close()
    journal.close()
    assert Journal(folder, SEARCH).values == journal.values == dict(units)
    if not units:
        return
    path = folder / "units-0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: max(0, len(whole) - lost)])
    kept = dict(units[: path.read_bytes().count(b"\n")])
    after = Journal(folder, SEARCH)
    assert after.values == kept
    after.record("new", 1.5)
    after.close()
    assert Journal(folder, SEARCH).values == {**kept, "new": 1.5}
    assert path.read_bytes().count(b"\n") == len(path.read_bytes().splitlines())


def test_processes_write_their_own_files_and_read_all(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path, SEARCH, process=number) for number in (0, 1))
    first.record("a", 1)
    second.record("b", [2])
    assert first.values == {"a": 1}
    assert Journal(tmp_path, SEARCH, process=2).values == {"a": 1, "b": [2]}
    names = ["journal.json", *(f"units-{number}.jsonl" for number in range(3))]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_file_that_another_writes_to_is_refused(tmp_path: Path) -> None:
    first = Journal(tmp_path, SEARCH)
    with pytest.raises(JournalError, match=r"another process is using .*units-0\.jsonl; wait until .*--journal"):
        Journal(tmp_path, SEARCH)
    first.close()
    Journal(tmp_path, SEARCH).record("a", 1)


def test_a_journal_that_can_only_be_read_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path, SEARCH)
    journal.record("a", 1)
    journal.close()

    def refuse(_: Journal) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Journal, "_open", refuse)
    again = Journal(tmp_path, SEARCH)
    assert again.values == {"a": 1}
    with pytest.raises(JournalError, match="can't write to the journal"):
        again.record("b", 2)


def test_a_journal_that_another_process_begins_meanwhile_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_files = Path.iterdir

    def begun_after(folder: Path) -> Iterator[Path]:
        yield from list(list_files(folder))
        monkeypatch.undo()
        Journal(tmp_path, SEARCH, process=0).record("a", 1)

    monkeypatch.setattr(Path, "iterdir", begun_after)
    assert Journal(tmp_path, SEARCH, process=1).values == {"a": 1}


@pytest.mark.parametrize("value", [math.inf, -math.inf, [math.nan, 1.0]])
def test_numbers_that_are_not_finite_are_read_as_they_were_written(tmp_path: Path, value: Any) -> None:
    journal = Journal(tmp_path, SEARCH)
    journal.record("a", value)
    journal.close()
    again = Journal(tmp_path, SEARCH)
    assert (repr(again.values), again.damaged) == (repr({"a": value}), 0)


@pytest.mark.parametrize(
    "garbage",
    [
        b"}{",
        b"",
        b"17",
        b'"unit"',
        b"[]",
        b'{"unit": "b"}',
        b'{"value": 1}',
        b'{"unit": "b", "value": 1}',
        b'{"unit": "b", "value": 1, "check": "0"}',
        b'{"unit": "b", "value": NaN, "check": "0"}',
        b'{"unit": ["b"], "value": 1, "check": "e2ed31b6bca3a1e2"}',
        b"[" * 10_000,
        b"\xff\xfe",
        b"\0\0\0",
    ],
)
def test_a_damaged_line_is_left_out(tmp_path: Path, garbage: bytes) -> None:
    journal = Journal(tmp_path, SEARCH)
    journal.record("a", 1)
    journal.record("c", 3)
    journal.close()
    path = tmp_path / "units-0.jsonl"
    first, second, _ = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([first, garbage, second, b""]))
    before = contents(tmp_path)
    again = Journal(tmp_path, SEARCH)
    assert (again.values, again.damaged) == ({"a": 1, "c": 3}, 1)
    assert contents(tmp_path) == before


def test_no_flipped_bit_changes_a_value(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEARCH)
    value = [0.125, -3.5e-7]
    journal.record("exact 0 1", value)
    journal.close()
    path = tmp_path / "units-0.jsonl"
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert Journal(tmp_path, SEARCH).values in ({}, {"exact 0 1": value})


def test_a_unit_that_is_there_twice_counts_as_the_last(tmp_path: Path) -> None:
    journal = Journal(tmp_path, SEARCH)
    for value in (1, 2):
        journal.record("a", value)
    journal.close()
    assert Journal(tmp_path, SEARCH).values == journal.values == {"a": 2}


def described(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "journal.json").read_text())["search"]
    return found


@pytest.mark.parametrize("name", ["journal.json", "units-0.jsonl", "units-7.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_journal_is_of_files(tmp_path: Path, name: str, kind: str) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    (tmp_path / "elsewhere").write_text("mine")
    (folder / name).symlink_to("../elsewhere") if kind == "link" else os.mkfifo(folder / name)
    with pytest.raises(JournalError, match=f"is a {kind}"):
        Journal(folder, SEARCH).record("a", 1)
    assert (tmp_path / "elsewhere").read_text() == "mine"


def test_a_folder_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("important")
    with pytest.raises(JournalError, match=r"has no journal\.json, so it is no journal, .*--journal"):
        Journal(tmp_path, SEARCH)
    assert contents(tmp_path) == {"thesis.txt": b"important"}
    with pytest.raises(JournalError, match=r"can't use the journal .*thesis\.txt: .*pass another with --journal"):
        Journal(tmp_path / "thesis.txt", SEARCH)


def test_units_without_their_search_are_not_taken(tmp_path: Path) -> None:
    """Nobody knows which search they belong to."""
    journal = Journal(tmp_path, SEARCH)
    journal.record("a", 1)
    (tmp_path / "journal.json").unlink()
    with pytest.raises(JournalError, match=r"has no journal\.json"):
        Journal(tmp_path, SEARCH)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 2}', '{"version": 2, "search": 3}', '{"version": NaN, "search": {}}', "\xff"]
)
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "journal.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(JournalError, match=r"journal\.json (isn't JSON|is no|has NaN).*--journal"):
        Journal(tmp_path, SEARCH)


def test_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "journal.json").write_text(json.dumps({"version": 1, "search": SEARCH}))
    with pytest.raises(JournalError, match=r"has version 1; this act-export writes 2.*--journal"):
        Journal(tmp_path, SEARCH)


def test_a_journal_is_recognised_whatever_its_description_holds(tmp_path: Path) -> None:
    """Tuples and other mappings are what JSON makes of them."""
    described: Mapping[str, Any] = {"betas": (0.4, 1.5), "questions": {"a": ("b",)}}
    Journal(tmp_path, described).record("a", 1)
    assert Journal(tmp_path, described).values == {"a": 1}
