"""Interrupted searches go on where they stopped, and give what they would have given."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted import PLANTED, planted_task, save_planted, words_checkpoint, written_by
from test_journal import contents, described
from typer.testing import CliRunner

from act_export.checkpoint.load import Checkpoint
from act_export.commands.main import app
from act_export.journal import Journal, JournalError
from act_export.search import SearchOptions, SearchTask, Threshold, search_heads
from act_export.search.processes import Unit, Workers
from act_export.tasks import Questions

OPTIONS = SearchOptions(
    methods=("act", "fit"),
    ranking="gradient+confirm",
    betas=(0.0,),
    head_counts=(1, 2),
    fit_steps=(2,),
    confirm=4,
    batch_tokens=200,
)
SLOWLY = """
import time
from act_export.commands.main import main
from act_export.journal import Journal
record = Journal.record
def slowly(journal, key, value):
    record(journal, key, value)
    time.sleep(0.05)
Journal.record = slowly
main()
"""


class InterruptionError(Exception):
    """A unit of work that didn't finish."""


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return words_checkpoint()


@pytest.fixture(scope="module")
def tasks(checkpoint: Checkpoint) -> list[SearchTask]:
    return [planted_task(checkpoint, PLANTED), written_by(checkpoint, PLANTED)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys of the units that were begun; the search breaks off at a unit "stop" that a test puts there."""
    begun: list[str] = []
    run = Workers.run

    def watched(unit: Unit) -> Unit:
        def compute() -> Any:
            if begun[-1:] == ["stop"]:
                raise InterruptionError
            begun.append(unit.key)
            return unit.compute()

        return replace(unit, compute=compute)

    monkeypatch.setattr(Workers, "run", lambda self, step, units: run(self, step, [watched(unit) for unit in units]))
    return begun


def keys_of(folder: Path) -> list[str]:
    return [
        json.loads(line)["unit"] for path in sorted(folder.glob("units-*")) for line in path.read_text().splitlines()
    ]


def test_an_interrupted_search_goes_on_and_computes_nothing_twice(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path, computed: list[str]
) -> None:
    whole = search_heads(checkpoint, tasks, OPTIONS)
    everything = list(computed)
    assert len(set(everything)) == len(everything) > 60
    computed.clear()
    rounds = 0

    def stop_after_11(step: str, done: float) -> None:
        if len(computed) % 12 == 11:
            computed.append("stop")

    while True:
        try:
            result = search_heads(checkpoint, tasks, OPTIONS, journal=tmp_path, progress=stop_after_11)
            break
        except InterruptionError:
            rounds += 1
            computed[-1] = "stopped"
            assert keys_of(tmp_path) == [key for key in computed if key != "stopped"]
    assert rounds > 4
    assert [key for key in computed if key not in ("stop", "stopped")] == everything
    assert result == whole
    assert result.units == (len(everything) - 11 * rounds, len(everything))
    for name, calibration in whole.calibrations.items():
        assert result.calibrations[name].to_json() == calibration.to_json()
    assert result.joint.to_json() == whole.joint.to_json()


def test_a_finished_search_is_only_read(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path, computed: list[str]
) -> None:
    first = search_heads(checkpoint, tasks, OPTIONS, journal=tmp_path)
    before = contents(tmp_path)
    computed.clear()
    steps: list[float] = []
    again = search_heads(checkpoint, tasks, OPTIONS, journal=tmp_path, progress=lambda _, done: steps.append(done))
    assert again == first
    assert again.units == (0, first.units[1])
    assert computed == []
    assert contents(tmp_path) == before
    assert steps == sorted(steps)
    assert steps[-1] == 1


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "changes",
    [
        {"ranking": "gradient"},
        {"ranking": "exhaustive"},
        {"betas": (0.0, 1.5)},
        {"thresholds": (Threshold(0.1), Threshold(0.2))},
        {"head_counts": (1, 4)},
        {"confirm": 2},
        {"fit_steps": (1, 2)},
        {"fit_l2": (0.1,)},
        {"goal": "beyond-remedy"},
        {"seed": 5},
        {"random_draws": 5},
        {"gradient_checkpointing": True},
    ],
    ids=str,
)
def test_a_search_in_another_way_shares_what_is_the_same(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path, computed: list[str], changes: dict[str, Any]
) -> None:
    """And finds what it finds without a journal."""
    asked = [replace(tasks[0], questions=Questions(seed=changes.get("seed")))]
    other = replace(OPTIONS, **{name: value for name, value in changes.items() if name != "seed"})
    alone = search_heads(checkpoint, asked, other)
    search_heads(checkpoint, tasks[:1], OPTIONS, journal=tmp_path)
    known = set(keys_of(tmp_path))
    computed.clear()
    shared = search_heads(checkpoint, asked, other, journal=tmp_path)
    assert shared == alone
    assert not known & set(computed)
    assert shared.units == (len(computed), alone.units[1])
    assert len(computed) < alone.units[1]


def test_published_sets_can_be_added(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path, computed: list[str]
) -> None:
    """What others published is no part of the search: its units are."""
    search_heads(checkpoint, tasks, OPTIONS, journal=tmp_path, joint=False)
    computed.clear()
    published = {"theirs": replace(PLANTED, heads={1: (3,)})}
    result = search_heads(checkpoint, tasks, OPTIONS, journal=tmp_path, joint=False, published=published)
    assert set(result.reports["planted"].published) == {"theirs"}
    assert computed
    assert all(" report " in key for key in computed)


def test_other_questions_have_a_journal_of_their_own(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path
) -> None:
    for of in (tasks[:1], tasks[:1], tasks):
        search_heads(checkpoint, of, OPTIONS, journals=tmp_path)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 2
    assert all((folder / "journal.json").is_file() for folder in folders)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda c, t, o: (c, t, replace(o, batch_tokens=201)), "batch_tokens was 200, is 201"),
        (lambda c, t, o: (c, [t[0]], o), r'questions of written was "\w+", is null'),
        (lambda c, t, o: (c, [t[0], replace(t[1], length_normalized=True)], o), 'questions of written was "'),
        (
            lambda c, t, o: (replace(c, identity=replace(c.identity, fingerprint="sha256:1")), t, o),
            r'model was "sha256:\w+\.\.\., is "sha256:1"',
        ),
    ],
    ids=["batches", "tasks", "scoring", "model"],
)
def test_another_searchs_journal_is_refused_and_left_alone(
    checkpoint: Checkpoint,
    tasks: list[SearchTask],
    tmp_path: Path,
    change: Callable[[Checkpoint, list[SearchTask], SearchOptions], tuple[Checkpoint, list[SearchTask], SearchOptions]],
    difference: str,
) -> None:
    small = [replace(t, splits=replace(t.splits, rank=t.splits.rank[:4], choose=t.splits.choose[:4])) for t in tasks]
    search_heads(checkpoint, small, OPTIONS, journal=tmp_path)
    before = contents(tmp_path)
    with pytest.raises(JournalError, match=f"journal of another search: {difference}.*nothing in it was changed"):
        search_heads(*change(checkpoint, small, OPTIONS), journal=tmp_path)
    assert contents(tmp_path) == before


def test_a_search_whose_own_journal_is_in_use_does_without(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path
) -> None:
    whole = search_heads(checkpoint, tasks[:1], OPTIONS, journals=tmp_path)
    (folder,) = tmp_path.iterdir()
    running = Journal(folder, described(folder))
    assert replace(search_heads(checkpoint, tasks[:1], OPTIONS, journals=tmp_path), units=whole.units) == whole
    running.close()


@pytest.mark.parametrize("value", ["x", [1.0], [["1", "2"]]])
def test_a_value_that_no_unit_can_have_is_computed_again(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path, computed: list[str], value: Any
) -> None:
    whole = search_heads(checkpoint, tasks[:1], OPTIONS, journal=tmp_path)
    kinds = {key.split()[0]: key for key in reversed(keys_of(tmp_path))}
    assert set(kinds) == {"gates", "exact", "fit", "answer"}
    journal = Journal(tmp_path, described(tmp_path))
    for key in kinds.values():
        journal.record(key, value)
    journal.close()
    computed.clear()
    assert search_heads(checkpoint, tasks[:1], OPTIONS, journal=tmp_path) == whole
    assert sorted(computed) == sorted(kinds.values())


def test_damage_is_made_good_and_said(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path, computed: list[str]
) -> None:
    whole = search_heads(checkpoint, tasks[:1], OPTIONS, journal=tmp_path)
    path = tmp_path / "units-0.jsonl"
    lines = path.read_bytes().split(b"\n")
    lines[3] = lines[3].replace(b"0.", b"1.", 1)
    lines[5] = lines[5].replace(b"[", b"[NaN, ", 1)
    path.write_bytes(b"\n".join(lines))
    computed.clear()
    again = search_heads(checkpoint, tasks[:1], OPTIONS, journal=tmp_path)
    assert again == whole
    assert (len(computed), again.damaged) == (2, 2)


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_where_nothing_more_can_be_written_what_is_there_is_safe(
    checkpoint: Checkpoint, tasks: list[SearchTask], tmp_path: Path, computed: list[str]
) -> None:
    whole = search_heads(checkpoint, tasks[:1], OPTIONS)
    computed.clear()
    with (
        files_no_longer_than(4000),
        pytest.raises(JournalError, match=r"can't write to .*units-0\.jsonl: .*what it has is safe, the same command"),
    ):
        search_heads(checkpoint, tasks[:1], OPTIONS, journal=tmp_path)
    done = list(computed)
    assert len(done) > 5
    computed.clear()
    assert search_heads(checkpoint, tasks[:1], OPTIONS, journal=tmp_path) == whole
    assert set(computed) & set(done) <= {done[-1]}  # the one that couldn't be written


def search_command(folder: tuple[Path, Path], out: Path, journal: Path) -> list[str]:
    checkpoint, rows = folder
    return [
        *("search", str(checkpoint), "--data", str(rows), "--out", str(out), "--journal", str(journal)),
        *(
            "--rank",
            "40",
            "--choose",
            "50",
            "--report",
            "40",
            "--method",
            "act",
            "--ranking",
            "exhaustive",
            "--beta",
            "0",
        ),
        *("--heads", "1,2", "--batch-tokens", "100"),
    ]


@pytest.mark.in_turn(2)
def test_a_killed_search_goes_on(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = save_planted(tmp_path_factory.mktemp("planted"))
    command = search_command(folder, tmp_path / "found.json", tmp_path / "journal")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWLY, *command], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    units = tmp_path / "journal" / "units-0.jsonl"
    try:
        deadline = time.monotonic() + 180
        while not (units.exists() and units.read_bytes().count(b"\n") >= 15):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "found.json").exists()
    before = units.read_bytes()
    done = before.count(b"\n")

    whole = search_command(folder, tmp_path / "whole.json", tmp_path / "other journal")
    for arguments in (command, whole):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        if arguments is command:
            assert f"{done} of " in result.output
            assert "were found in the journal" in result.output
    assert (tmp_path / "found.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert '"0": [1]' in (tmp_path / "found.json").read_text()
    assert units.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    keys = keys_of(tmp_path / "journal")
    assert len(set(keys)) == len(keys) > 2 * done
    assert keys == keys_of(tmp_path / "other journal")
