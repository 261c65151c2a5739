"""No command replaces what is no file: a device, a pipe, a socket, a link or a folder, where its result should go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from no_file import KINDS, is_untouched, make
from typer.testing import CliRunner

from act_export.calibration.file import Calibration
from act_export.commands.main import app
from act_export.errors import ActExportError

COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "export": lambda out: ["export", "no-model", "--plain", "--out", f"{out}.onnx"],
    "search": lambda out: ["search", "no-model", "--out", f"{out}.json"],
    "profile": lambda out: ["profile", "no-model", "--out", f"{out}.safetensors"],
    "profile, beside": lambda out: ["profile", "no-model", "--out", str(out.with_suffix(".safetensors"))],
    "report": lambda out: ["report", "no-profile", "--out", f"{out}.html"],
    "bench": lambda out: ["bench", "no-model", "--json", f"{out}.json"],
}
SUFFIXES = {"export": ".onnx", "profile": ".safetensors", "report": ".html"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_it_is_refused_before_any_work(command: str, kind: str, tmp_path: Path) -> None:
    place = tmp_path / f"out{SUFFIXES.get(command, '.json')}"
    before = make(place, kind)
    names = sorted(path.name for path in tmp_path.iterdir())
    result = CliRunner().invoke(app, COMMANDS[command](tmp_path / "out"))
    assert result.exit_code == 2
    assert place.name in result.output.replace("\n", "")
    assert kind.split()[-1] in result.output or (command, kind) == ("profile", "folder")
    assert is_untouched(place, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("kind", KINDS)
def test_a_calibration_is_a_file(kind: str, tmp_path: Path) -> None:
    before = make(tmp_path / "a.json", kind)
    with pytest.raises(ActExportError, match=f"is a {kind.split()[-1]}"):
        Calibration({0: (1,)}).save(tmp_path / "a.json")
    assert is_untouched(tmp_path / "a.json", before)
