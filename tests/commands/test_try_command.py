"""act-export try as a user meets it: the data first, a table, a verdict, the next command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from click.testing import Result
from planted import PLANTED, save_planted
from typer.testing import CliRunner

from act_export.calibration.file import Calibration
from act_export.commands.main import app
from act_export.search import SearchOptions


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_planted(tmp_path_factory.mktemp("planted"), count=200)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Searches with few candidates, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))

    few = partial(SearchOptions, methods=("act",), head_counts=(1, 2), betas=(0.0,))
    monkeypatch.setattr("act_export.search.request.SearchOptions", few)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["try", *map(str, arguments)])


def test_a_calibration_that_helps(planted: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = planted
    out = tmp_path / "new" / "mine.json"
    result = run(model, "--data", rows, "--searches", 2, "--out", out, "--no-costs")
    assert result.exit_code == 0, result.output
    shown = result.stdout
    first, last = shown.splitlines()[0], shown.splitlines()[-1]
    assert first == (
        "rows.jsonl: 200 different questions, 200 of them to report on, in 2 searches; 464 are recommended. Gains "
        "below about 7 points can't be told from luck."
    )
    assert "2 of 2 searches found heads to calibrate." in shown
    assert "Verdict: calibrate. It gains" in shown
    assert last == f"  act-export {model} --calibration {out} --out calibrated.onnx"
    assert Calibration.load(out).heads == PLANTED.heads
    assert max(len(line) for line in shown.splitlines() if line.startswith("│")) <= 80

    again = run(model, "--data", rows, "--searches", 2, "--out", out, "--json", "--no-costs")
    figures = json.loads(again.stdout)
    assert (figures["verdict"], figures["heads"], figures["found"]) == ("calibrate", 1, 2)
    assert figures["calibrated"]["accuracy"] == 1
    assert figures["plain"] == pytest.approx(1 - figures["calibrated"]["gain"])
    assert figures["questions"] | {"chance": None, "detectable_gain": None} == {
        **{"name": "rows.jsonl", "different": 200, "reported": 200, "recommended": 464, "searches": 2},
        **{"chance": None, "detectable_gain": None},
    }
    assert figures["elsewhere"] is None


def test_nothing_to_find(planted: tuple[Path, Path], tmp_path: Path) -> None:
    model, rows = planted
    lines = [json.loads(line) for line in rows.read_text().splitlines()[:60]]
    noise = tmp_path / "noise.jsonl"
    noise.write_text("\n".join(json.dumps({**line, "answer": n % 2}) for n, line in enumerate(lines)))
    out = tmp_path / "mine.json"
    result = run(model, "--data", noise, "--searches", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert "The plain model may be guessing" in result.stdout
    assert "0 of 2 searches found heads" in result.stdout
    assert "Verdict: leave the model as it is. No calibration gained more than luck explains" in result.stdout
    assert "A gain below about 13 points would not have been seen" in result.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "choices": ["x", "y"], "answer": 2}', "bad.jsonl, line 2: answer is 2"),
        ("", "there are 1 different prompts; 24 are needed, and 464"),
    ],
)
def test_data_is_read_before_any_model(tmp_path: Path, line: str, message: str) -> None:
    rows = tmp_path / "bad.jsonl"
    rows.write_text(f'{{"prompt": "q", "choices": ["x", "y"], "answer": 0}}\n{line}\n')
    result = run("no-such-model", "--data", rows)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "no-such-model" not in result.output
