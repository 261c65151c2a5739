from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planted import save_planted
from typer.testing import CliRunner

from act_export.commands.main import app
from act_export.errors import ActExportError
from act_export.journal import Journal
from act_export.search.processes import Unit, Workers, _share, own_device, process_count, process_group, process_index

# Each process runs its commands one after the other, in one process group, and says how each ended.
PROGRAM = """
import json, sys
from act_export.commands.main import app
from act_export.search.processes import process_group
with process_group():
    for arguments in json.loads(sys.argv[1]):
        try:
            app(arguments)
        except SystemExit as end:
            print("ended with", end.code, flush=True)
"""
TIMEOUT_S = 240


def unit(key: str, cost: float = 1.0, value: Any = None) -> Unit:
    return Unit(key, cost, lambda: value if value is not None else key)


@given(costs=st.lists(st.integers(1, 1000)), count=st.integers(1, 9))
def test_every_unit_goes_to_one_process_and_none_has_much_more_to_do(costs: list[int], count: int) -> None:
    units = [unit(str(number), cost) for number, cost in enumerate(costs)]
    shares = [_share(units, index, count) for index in range(count)]
    assert sorted(int(one.key) for share in shares for one in share) == list(range(len(units)))
    for share in shares:
        assert [int(one.key) for one in share] == sorted(int(one.key) for one in share)
    loads = [sum(one.cost for one in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(
    steps=st.lists(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 9)), max_size=6), max_size=5),
    share_planned=st.floats(0, 3),
)
def test_results_come_in_order_and_progress_never_runs_backwards(
    steps: Sequence[Sequence[tuple[str, int]]], share_planned: float
) -> None:
    """Whatever cost was planned, and however often a unit comes again."""
    costs = {key: cost for step in steps for key, cost in step}
    began: list[str] = []
    done: list[float] = []

    def watched(key: str) -> Unit:
        return Unit(key, costs[key], lambda: began.append(key) or f"value of {key}")

    planned = share_planned * sum(cost for step in steps for _, cost in step)
    workers = Workers(planned_cost=planned, progress=lambda _, share: done.append(share))
    for step in steps:
        assert workers.run("step", [watched(key) for key, _ in step]) == [f"value of {key}" for key, _ in step]
    workers.finish()
    assert sorted(began) == sorted(costs)
    assert workers.computed == len(costs)
    assert workers.needed == set(costs)
    assert done == sorted(done)
    assert (min(done) >= 0, done[-1]) == (True, 1)


def test_cost_that_was_planned_right_ends_at_the_whole(tmp_path: Path) -> None:
    """With units from a journal too."""
    journal = Journal(tmp_path, {})
    journal.record("a", "a")
    done: list[float] = []
    workers = Workers(journal, planned_cost=10, progress=lambda _, share: done.append(share))
    workers.run("first", [unit("a", 3), unit("b", 1)])
    workers.run("second", [unit("c", 2), unit("b", 4)])
    workers.finish()
    assert done == pytest.approx([0.3, 0.4, 0.8, 0.99, 1.0])  # the whole is told in the end alone
    assert workers.computed == 2


def test_what_was_finished_before_an_error_is_kept(tmp_path: Path) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    journal = Journal(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        Workers(journal).run("step", [unit("a"), unit("b"), Unit("c", 1.0, fails), unit("d")])
    journal.close()
    again = Journal(tmp_path, {})
    assert again.values == {"a": "a", "b": "b"}
    workers = Workers(again)
    assert workers.run("step", [unit(key) for key in "abcd"]) == list("abcd")
    assert workers.computed == 2


def test_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (None, "1"):
        if size:
            monkeypatch.setenv("WORLD_SIZE", size)
        with process_group():
            assert (process_index(), process_count()) == (0, 1)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        port: int = own.getsockname()[1]
        return port


def run_together(commands: Sequence[Sequence[Sequence[str]]]) -> list[tuple[str, str]]:
    """Standard output and errors of each process, which are given their commands."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(commands))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(own)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        for rank, own in enumerate(commands)
    ]
    try:
        return [process.communicate(timeout=TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def values_of(folder: Path) -> list[dict[str, Any]]:
    """By process, values of the units that it computed."""
    return [
        {entry["unit"]: entry["value"] for entry in map(json.loads, path.read_text().splitlines())}
        for path in sorted(folder.glob("units-*"))
    ]


def flat(value: Any) -> list[float]:
    return [number for part in value for number in flat(part)] if isinstance(value, list) else [value]


@pytest.mark.in_turn(2)
def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Then one gets other data, then another option, then one has nothing to do: both end with an error each time."""
    checkpoint, rows = save_planted(tmp_path)
    (tmp_path / "other").mkdir()
    first_row, others = rows.read_text().split("\n", 1)
    other_answer = {**json.loads(first_row), "answer": 1 - json.loads(first_row)["answer"]}
    other_rows = tmp_path / "other" / "rows.jsonl"
    other_rows.write_text(f"{json.dumps(other_answer)}\n{others}")

    def search(name: str, data: Path, *more: str) -> list[str]:
        return [
            *("search", str(checkpoint), "--data", str(data), "--out", str(tmp_path / f"{name}.json")),
            *("--journal", str(tmp_path / f"{name} journal"), "--rank", "40", "--choose", "50", "--report", "40"),
            *(
                "--beta",
                "0",
                "--heads",
                "1,2",
                "--method",
                "act,fit",
                "--ranking",
                "gradient+confirm",
                "--batch-tokens",
                "200",
                *more,
            ),
        ]

    alone = CliRunner().invoke(app, search("alone", rows))
    assert alone.exit_code == 0, alone.output
    first = [search("together", rows), search("failed", rows), search("failed", rows), search("failed", rows)]
    second = [search("together", rows), search("failed", other_rows), search("failed", rows, "--beta", "0.5")]
    outputs = run_together([first, second])
    shown = "\n".join(text for process in outputs for text in process)
    assert outputs[0][0].count("ended with 0") == 1, shown
    assert outputs[0][0].count("ended with 2") == 3, shown
    assert outputs[1][0].count("ended with 0") == 1, shown
    assert outputs[1][0].count("ended with 2") == 2, shown

    # the same file, written once; the work shared out, nothing done twice, the same numbers
    assert (tmp_path / "together.json").read_bytes() == (tmp_path / "alone.json").read_bytes()
    assert '"0": [1]' in (tmp_path / "alone.json").read_text()
    assert "together.json" in outputs[0][0]
    assert "together.json" not in outputs[1][0]
    (single,) = values_of(tmp_path / "alone journal")
    parts = values_of(tmp_path / "together journal")
    assert len(parts) == 2
    assert min(map(len, parts)) > len(single) / 4
    assert not set(parts[0]) & set(parts[1])
    together = {**parts[0], **parts[1]}
    assert set(together) == set(single)
    for key, value in single.items():
        assert flat(together[key]) == pytest.approx(flat(value), abs=1e-5, rel=1e-5), key

    for _, errors in outputs:
        assert "the processes do different searches" in errors
        assert "questions of rows.jsonl was" in errors
        assert "betas was [0.0], is [0.5]" in errors
    assert "another process ended before its work was done" in outputs[0][1]
    assert not (tmp_path / "failed.json").exists()


def test_each_process_of_a_machine_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device("cuda", None) == "cuda"
    assert own_device(None, "auto") is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device("cuda", None) == "cuda:1"
    assert own_device("cuda:0", None) == "cuda:0"
    assert own_device(None, None) is None
    with pytest.raises(ActExportError, match="device map 'auto' spreads the model of each process"):
        own_device(None, "auto")


def test_several_processes_without_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ActExportError, match=r"WORLD_SIZE is 2, but .* torchrun"), process_group():
        pass
