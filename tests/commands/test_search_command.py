"""The search command as a user meets it: files, table, notes, bad input, exit codes, and going on after an end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from planted import PLANTED, save_planted
from tiny import save_checkpoint
from typer.testing import CliRunner

from act_export.calibration.file import Calibration
from act_export.commands.main import app
from act_export.files import cache_folder
from act_export.journal import Journal

SIZES = ("--rank", "40", "--choose", "50", "--report", "40")
BETA = ("--method", "act", "--ranking", "gradient+confirm", "--beta", "0", "--heads", "1,2")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture
def model(planted: tuple[Path, Path]) -> Path:
    return planted[0]


@pytest.fixture
def rows(planted: tuple[Path, Path]) -> Path:
    return planted[1]


@pytest.fixture
def other_rows(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same questions but for the first one's answer."""
    first, others = rows.read_text().split("\n", 1)
    path = tmp_path_factory.mktemp("other") / "more.jsonl"
    path.write_text(f"{json.dumps({**json.loads(first), 'answer': 1 - json.loads(first)['answer']})}\n{others}")
    return path


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return cache_folder()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


def test_one_task_writes_one_file(model: Path, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "found.json"
    result = run(model, "--data", rows, "--out", out, *SIZES, *BETA)
    assert result.exit_code == 0, result.output
    found = Calibration.load(out)
    assert (found.heads, found.beta) == (PLANTED.heads, 0.0)
    assert (found.provenance.method, found.provenance.notes["ranking"]) == ("act", "gradient+confirm")
    assert found.provenance.samples == {"rank": 40, "choose": 50, "report": 40}
    lines = result.stdout.splitlines()
    assert lines[-1] == str(out)
    (row,) = [line for line in lines if line.startswith("│ rows.jsonl")]
    assert "100.0%" in row
    assert f"{found.provenance.plain_accuracy:.1%}" in row
    assert f"{100 * (1 - found.provenance.plain_accuracy):+.1f}" in row
    assert "rows.jsonl: 1 heads in 1 layers, beta 0.0, absolute threshold 0.1; act on rows.jsonl" in result.stderr
    assert "rows.jsonl: controls of the plain model: " in result.stdout
    assert "search: done, 100% of all" in result.stderr
    assert [path.name for path in out.parent.iterdir()] == ["found.json"]


def test_several_tasks_write_a_folder(model: Path, rows: Path, other_rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipes"
    result = run(model, "--data", rows, "--data", other_rows, "--out", out, *SIZES, *BETA)
    assert result.exit_code == 0, result.output
    files = [out / name for name in ("rows.json", "more.json", "joint.json", "search.json")]
    assert result.stdout.splitlines()[-4:] == [str(path) for path in files]
    assert set(out.iterdir()) == set(files)
    assert list(Calibration.load(out / "joint.json").provenance.tasks) == ["rows.jsonl", "more.jsonl"]
    report = json.loads((out / "search.json").read_text())
    assert set(report["tasks"]) == {"rows.jsonl", "more.jsonl"}
    for words in ("rows.jsonl", "more.jsonl", "average", "with one set"):
        assert words in result.stdout
    alone = run(model, "--data", rows, "--data", other_rows, "--out", tmp_path / "b", "--no-joint", *SIZES, *BETA)
    assert alone.exit_code == 0, alone.output
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["more.json", "rows.json", "search.json"]
    assert (tmp_path / "b" / "rows.json").read_bytes() == (out / "rows.json").read_bytes()


def test_where_results_go_without_out(
    model: Path, rows: Path, other_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(model, "--data", rows, *SIZES, "--beta", "0").exit_code == 0
    assert run(model, "--data", rows, "--data", other_rows, *SIZES, "--beta", "0").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calibration.json", "calibrations"]


def test_a_search_without_a_set_is_no_failure(model: Path, rows: Path, tmp_path: Path) -> None:
    result = run(model, "--data", rows, "--out", tmp_path / "c.json", *SIZES, "--beta", "0.99")
    assert result.exit_code == 0, result.output
    assert Calibration.load(tmp_path / "c.json").heads == {}
    assert "no set" in result.stdout


def test_the_same_command_goes_on_by_itself(
    model: Path, rows: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [model, "--data", rows, *SIZES, *BETA, "--batch-tokens", 200]
    whole = run(*command, "--journal", tmp_path / "journal", "--out", tmp_path / "whole.json")
    assert whole.exit_code == 0, whole.output
    assert "were found in the journal" not in whole.output
    record = Journal.record
    keys: list[str] = []

    def interrupted(journal: Journal, key: str, value: Any) -> None:
        if len(keys) == 9:
            raise KeyboardInterrupt
        keys.append(key)
        record(journal, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", interrupted)
        result = run(*command, "--out", tmp_path / "found.json")
    assert result.exit_code == 2
    assert "interrupted" in result.output
    assert not (tmp_path / "found.json").exists()
    (folder,) = (cache / "searches").iterdir()
    assert (folder / "units-0.jsonl").read_text().count("\n") == 9

    result = run(*command, "--out", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "\n9 of " in result.stderr
    assert (tmp_path / "found.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    again = run(*command, "--out", tmp_path / "again.json")
    units = (folder / "units-0.jsonl").read_text().count("\n")
    assert f"{units} of {units} steps were found in the journal" in again.stderr


def test_options_reach_the_search(model: Path, rows: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "c.json"
    result = run(
        *(model, "--data", rows, "--out", out, *SIZES, "--ranking", "exhaustive", "--beta", "0,1.5", "--seed", 4),
        *("--method", "act"),
        *("--threshold-mode", "absolute,relative", "--heads", "1", "--random-draws", 5, "--dtype", "bfloat16"),
    )
    assert result.exit_code == 0, result.output
    origin = Calibration.load(out).provenance
    assert (origin.notes["ranking"], origin.seed, origin.notes["dtype"]) == ("exhaustive", 4, "bfloat16")
    kinds = {label.partition("beta")[2] for label in origin.notes["choose_accuracy"] if label != "plain"}
    assert {" 0, absolute 0.1", " 1.5, absolute 0.1"} <= kinds
    if "controls" in origin.notes:
        assert len(origin.notes["controls"]["random_heads"]) == 5
    (folder,) = (cache / "searches").iterdir()
    keys = [json.loads(line)["unit"] for line in (folder / "units-0.jsonl").read_text().splitlines()]
    assert any(key.startswith("exact rows.jsonl relative 5.0 1.5 ") for key in keys)
    assert not any(key.startswith("gates ") for key in keys)


BAD: dict[str, tuple[list[str], str]] = {
    "beta too large": (["--beta", "0.4,3"], "beta is 3.0; it must lie in [0, 2]"),
    "beta of 1": (["--beta", "1"], "beta is 1, which changes nothing"),
    "beta twice": (["--beta", "0.4,0.4"], "betas are (0.4, 0.4); name at least one, and none twice"),
    "no number": (["--beta", "0.4;0.5"], "--beta is '0.4;0.5'; it must be numbers, by comma"),
    "nothing after a comma": (["--beta", "0.4,"], "--beta is '0.4,'; it must be numbers, by comma"),
    "negative threshold": (["--threshold=-1"], "threshold is -1.0"),
    "threshold that is no number": (["--threshold", "nan"], "threshold is nan"),
    "thresholds of two modes": (
        ["--threshold", "0.1", "--threshold-mode", "absolute,relative"],
        "the thresholds 0.1 can't be of two modes at once",
    ),
    "unknown mode": (["--threshold-mode", "both"], "threshold_mode is 'both'; it must be absolute or relative"),
    "no whole number": (["--heads", "1.5"], "--heads is '1.5'; it must be whole numbers, by comma"),
    "no heads": (["--heads", "0"], "the numbers of heads are (0,); each must be at least 1"),
    "nothing to confirm": (["--confirm", "0"], "confirm is 0; it must be at least 1"),
    "no tokens": (["--batch-tokens", "0"], "batch_tokens is 0; it must be at least 1"),
    "draws below 0": (["--random-draws=-1"], "random_draws is -1; it must be at least 0"),
    "unknown method": (["--method", "act,fits"], "there is no method 'fits'; methods are act, gamma, fit"),
    "a ranking for a method": (
        ["--method", "gradient"],
        "--ranking gradient is how heads are ranked; methods are act, gamma",
    ),
    "a former ranking for a method": (["--method", "gates"], "--ranking gradient is how heads are ranked; methods are"),
    "a former ranking": (["--ranking", "gates"], "the ranking 'gates' is called gradient now; pass --ranking gradient"),
    "another former ranking": (["--ranking", "gates+confirm"], "is called gradient+confirm now"),
    "an option of another method": (
        ["--gamma", "0.5"],
        "--gamma is of the method gamma, which isn't tried; pass --method",
    ),
    "a fit without fit": (["--method", "act", "--fit-l1", "0.1"], "--fit-l1 is of the method fit, which isn't tried"),
    "beta without act": (["--method", "fit", "--beta", "0.3"], "--beta is of the method act, which isn't tried"),
    "unknown ranking": (["--ranking", "gate"], "no ranking 'gate'; it must be gradient, gradient+confirm, exhaustive"),
    "empty split": (["--rank", "0"], "the rank split has 0 examples"),
    "too few rows": (["--report", "400"], "there are 130 different prompts"),
    "usual splits of too few rows": (["--report", "40", "--rank", "1000"], "there are 130 different prompts"),
    "unknown task": (["--task", "sst22"], "there is no task 'sst22'; did you mean sst2 or"),
    "unknown task among others": (["--task", "mood,sst22", "--out", "new"], "there is no task 'mood'"),
    "missing data": (["--data", "missing.jsonl", "--out", "new"], "can't read missing.jsonl"),
    "unknown scoring": (["--task", "sst2", "--scoring", "length"], "length"),
    "no chat template": (["--chat"], "the model's tokenizer has no chat template"),
    "unknown dtype": (["--dtype", "float8"], "float8"),
    "unknown device": (["--device", "abacus"], "abacus"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(
    name: str, model: Path, rows: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = BAD[name]
    data = [] if "--task" in options else ["--data", rows]
    result = run(model, *data, "--out", tmp_path / "c.json", *SIZES, *options)
    assert result.exit_code == 2, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "error:" in result.output
    assert message in result.output
    assert not list(tmp_path.iterdir())
    assert not (cache / "searches").exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_search(
    model: Path, rows: Path, other_rows: Path, tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "file.json").write_text("text")
    for data, out, message in (
        ([rows], tmp_path, "is a folder; pass a file, e.g. --out"),
        ([rows, other_rows], tmp_path / "file.json", "is one file, but a search on several tasks writes one for each"),
        ([rows, other_rows], tmp_path / "new.json", "is one file, but"),
        ([rows], tmp_path / "file.json" / "c.json", "file.json is no folder; pass another place with --out"),
        ([rows], "/proc/c.json", "can't write to /proc"),
    ):
        result = run(model, *(part for path in data for part in ("--data", path)), "--out", out, *SIZES)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert "loading" not in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
    assert not (cache / "searches").exists()


def test_a_journal_of_something_else_is_refused(model: Path, rows: Path, other_rows: Path, tmp_path: Path) -> None:
    journal, out = tmp_path / "journal", tmp_path / "c.json"
    assert run(model, "--data", rows, "--journal", journal, "--out", out, *SIZES).exit_code == 0
    out.unlink()
    before = {path.name: path.read_bytes() for path in journal.iterdir()}
    result = run(model, "--data", other_rows, "--journal", journal, "--out", out, *SIZES)
    assert result.exit_code == 2
    assert "is the journal of another search: questions of more.jsonl was null, is " in result.output
    assert {path.name: path.read_bytes() for path in journal.iterdir()} == before
    result = run(model, "--data", rows, "--journal", model, "--out", out, *SIZES)
    assert result.exit_code == 2
    assert "it is no journal" in result.output
    assert not out.exists()


def test_a_model_without_a_tokenizer_or_hook_is_refused(rows: Path, tmp_path: Path, cache: Path) -> None:
    bare = save_checkpoint(tmp_path / "bare", tokenizer=False)
    japanese = save_checkpoint(tmp_path / "japanese", architecture="gpt_neox_japanese")
    for folder, message in ((bare, "the model has no tokenizer"), (japanese, "attention of gpt_neox_japanese")):
        result = run(folder, "--data", rows, "--out", tmp_path / "c.json", *SIZES)
        assert result.exit_code == 2
        assert message in result.output
    assert not (tmp_path / "c.json").exists()
    assert not (cache / "searches").exists()
