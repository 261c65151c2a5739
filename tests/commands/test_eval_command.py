from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from tiny import CALIBRATION
from typer.testing import CliRunner

from act_export.calibration.calibration_set import CalibrationSet
from act_export.commands.main import app
from act_export.export import build_model

KEYS = {"name", "questions", "calibrated", "plain", "comparison", "controls", "best_control", "beyond_best_control"}


def run(*arguments: object):
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("rows")
    choosing = [{"prompt": f"Row {i}. It is", "choices": [" n", " y"], "answer": i % 2} for i in range(30)]
    writing = [{"prompt": f"Row {i}?", "answers": [str(i)]} for i in range(30)]
    for name, kind in (("choosing", choosing), ("writing", writing)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind))
    return [folder / "choosing.jsonl", folder / "writing.jsonl"]


@pytest.fixture(scope="module")
def sst2(tmp_path_factory) -> Path:
    """A cache folder with a few rows of sst2."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "act-export" / "tasks").mkdir(parents=True)
    with (cache / "act-export" / "tasks" / "sst2.jsonl").open("w") as file:
        for i in range(40):
            file.write(json.dumps({"sentence": f"film {i} is {'good' if i % 2 else 'bad'}", "label": i % 2}) + "\n")
    return cache


@pytest.mark.parametrize("portable", [(), ("--portable",)], ids=["native", "portable"])
def test_several_tasks_in_one_run(tiny_file, tiny_plain_file, checkpoint_folder, rows, portable) -> None:
    files = [tiny_file, "--against", tiny_plain_file, "--tokenizer", checkpoint_folder]
    asked = [*files, "--data", rows[0], "--data", rows[1], "--limit", 4, "--batch-tokens", 200, *portable]
    result = run(*asked, "--json")
    assert result.exit_code == 0, result.output
    shown = json.loads(result.stdout)
    assert [task["name"] for task in shown["tasks"]] == ["choosing.jsonl", "writing.jsonl"]
    for task in shown["tasks"]:
        assert task.keys() == KEYS
        assert len(task["questions"]) == 4
    assert shown["files"] == {"calibrated": str(tiny_file), "plain": str(tiny_plain_file)}
    assert (shown["request"]["limit"], shown["request"]["portable"]) == (4, bool(portable))
    assert shown["average"].keys() >= {"plain", "calibrated", "gain", "gain_interval", "best_control"}
    table = run(*asked)
    assert table.exit_code == 0, table.output
    for words in ("choosing.jsonl", "exact match", "average", "gain, points"):
        assert words in table.stdout
    assert "eval: choosing.jsonl, calibrated" in table.stderr


def test_a_file_whose_default_is_plain_names_its_other_calibrations(tiny, checkpoint_folder, rows, tmp_path) -> None:
    path = tmp_path / "model.onnx"
    build_model(tiny, CalibrationSet.of({"found": CALIBRATION}, default="plain"), path, source="tiny")
    asked = [path, "--tokenizer", checkpoint_folder, "--data", rows[0], "--limit", 4]
    advice = "The file's default is plain; --calibration measures another: found."
    assert advice in run(*asked).stdout
    for named in ("plain", "found"):
        assert advice not in run(*asked, "--calibration", named).stdout


def test_tasks_by_comma_and_the_default_one(
    tiny_plain_file, checkpoint_folder, sst2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(sst2))
    more = ["--tokenizer", checkpoint_folder, "--split", "all", "--limit", 2, "--truncate", "--json"]
    by_itself = json.loads(run(tiny_plain_file, *more).stdout)
    named = json.loads(run(tiny_plain_file, "--task", "sst2, sst2", "--task", "sst2", *more).stdout)
    assert by_itself == named
    assert [task["name"] for task in named["tasks"]] == ["sst2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "sst3"], "sst2"),
        (["--data", "none.jsonl"], "none.jsonl"),
        (["--split", "test"], "there is no split 'test'"),
        (["--limit", "0"], "limit is 0"),
        (["--device", "gpu"], "device is 'gpu'; pass cpu, cuda or cuda:N"),
        (["--chat"], "no chat template"),
        (["--scoring", "letter"], "can't be scored as 'letter'"),
        (["--shots", "2"], "few-shot examples are drawn from the rows of a task"),
        (["--against", "none.onnx"], "there is no model none.onnx"),
    ],
)
def test_what_cannot_be_evaluated(tiny_file, checkpoint_folder, rows, options, message) -> None:
    data = [] if options[0] in ("--task", "--data") else ["--data", rows[0]]
    result = run(tiny_file, "--tokenizer", checkpoint_folder, *data, *options)
    assert result.exit_code == 2, result.output
    assert "error:" in result.stderr
    assert message in result.stderr


def test_the_harness_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "act_export.verify.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.models", None)
    result = CliRunner().invoke(app, ["lm-eval", "--model", "act-onnx"])
    assert result.exit_code == 2
    assert "pip install 'act-export[lm-eval]'" in result.stderr
