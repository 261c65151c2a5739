"""Texts of files don't command the terminal, and whoever stops reading isn't told of a defect."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import onnx
import pytest
import typer
from onnx import TensorProto, helper
from typer.testing import CliRunner

from act_export.calibration.file import ModelIdentity
from act_export.commands.console import fail, note, progress_bar, status
from act_export.commands.main import app
from act_export.commands.printing import PlainConsole, PlainTable, printable
from act_export.onnx_file.record import FileRecord

EVIL = "[red]x[/] [link=file:///]y[/link] :boom: \x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\r\x00\ud800"
SHOWN = r"[red]x[/] [link=file:///]y[/link] :boom: \x1b[2J\x1b]0;title\x07\x9b31m\u202e\u2066\r\x00\ud800"


def test_signs_that_command_are_shown() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("two\nlines\tand Zoë, 東京, שלום, 👩‍🚀") == "two\nlines\tand Zoë, 東京, שלום, 👩‍🚀"
    assert printable("two\nlines", lines=False) == r"two\nlines"
    assert printable(SHOWN) == SHOWN


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_and_lines(terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console = PlainConsole(force_terminal=terminal, width=200, color_system=None)
    table = PlainTable(show_header=True)
    table.add_column(EVIL)
    table.add_row(EVIL)
    console.print(table)
    console.say(EVIL)
    out = capsys.readouterr().out
    assert out.count(SHOWN) == 3
    assert not {"\x1b]", "\x07", "\x9b", "\u202e"} & set(out)


@pytest.mark.parametrize("terminal", [True, False])
def test_notes_errors_and_progress(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console = PlainConsole(stderr=True, force_terminal=terminal, width=200, color_system=None)
    monkeypatch.setattr("act_export.commands.console.console", console)
    note(EVIL)
    with status() as step:
        step(EVIL)
    with progress_bar(EVIL) as bar:
        bar(EVIL, 0.5)
    with pytest.raises(typer.Exit):
        fail(EVIL, 2)
    err = capsys.readouterr().err
    assert SHOWN in err
    assert not any(sign in err for sign in ("\x1b]", "\x07", "\x9b", "\u202e", "\x1b[2J\x1b]"))


@pytest.mark.parametrize("progress", ["status", "bar"])
def test_without_a_terminal_long_steps_are_said_again(progress: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    again = threading.Event()

    def heard(line: str) -> None:
        lines.append(line)
        if "so far" in line and "a step" in line:
            again.set()

    monkeypatch.setattr("act_export.commands.console.note", heard)
    monkeypatch.setattr("act_export.commands.console.PAUSE_S", 0.01)
    if progress == "status":
        with status() as step:
            step("a step: 3 of 5 MB")
            assert again.wait(60)
    else:
        with progress_bar("search") as bar:
            bar("a step", 0.25)
            assert again.wait(60)
    said = {"status": r"a step: 3 of 5 MB, \d+ s so far", "bar": r"search: a step, 25% of all, \d+ s so far"}[progress]
    assert any(re.fullmatch(said, line) for line in lines)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A model that says something evil of itself."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "any", [value], [value])
    model = helper.make_model(graph)
    record = FileRecord(version="1", source=EVIL[:-1] + "\nforged", model=ModelIdentity("llama", 2, 4))
    helper.set_model_props(model, record.write())
    onnx.save(model, tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


def test_inspect_shows_what_a_file_says_as_it_stands(file: Path) -> None:
    result = CliRunner().invoke(app, ["inspect", str(file)], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert SHOWN.replace(r"\ud800", r"\nforged") in result.output
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(result.output)
    result = CliRunner().invoke(app, ["inspect", str(file), "--json"])
    assert "forged" in json.loads(result.stdout)["source"]
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(result.output)


@pytest.mark.parametrize("arguments", [["--json"], []], ids=["json", "table"])
def test_a_reader_that_ends_is_no_defect(arguments: list[str], file: Path) -> None:
    command = [sys.executable, "-m", "act_export", "inspect", str(file), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, b"")
