"""What a user gives may be wrong in every way: the command ends with exit code 2, and says what and what to do."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from act_export.calibration.file import Calibration, CalibrationError
from act_export.commands.main import app
from act_export.errors import ActExportError, SessionError
from act_export.onnx_file.graph_state import configuration_beside
from act_export.onnx_file.record import FileRecord
from act_export.tasks import TaskError, load_examples, load_task, read_examples

GOOD = {"prompt": "a is", "choices": [" b", " c"], "answer": 0}
TASK = {"labels": [" bad", " good"], "answer": "mood", "template": "{text} is", "path": "rows.jsonl"}
PATTERN = {"file": "rows.jsonl", "fields": {"text": "text"}, "pattern": {"field": "text", "regex": "(a+)+"}}
HOSTILE = {
    "many keys": json.dumps({str(i): i for i in range(40_000)}),
    "nested": "[" * 100_000,
    "nested objects": '{"a":' * 3000 + "1" + "}" * 3000,
    "digits": '{"0": [' + "9" * 5000 + "]}",
    "not a number": '{"0": [NaN]}',
    "infinite": '{"0": [1e999]}',
    "twice": '{"0": [1], "0": [2]}',
    "surrogate": '{"prompt": "\\ud800", "\\ud800": 1}',
    "utf-16": '{"0": [1]}'.encode("utf-16"),
    "no utf-8": b'{"\xff": 1}',
    "cut off": '{"0": [1',
    "list": "[1, 2]",
    "number": "3",
    "empty": "",
}


def refused(*arguments: object) -> str:
    """What a command says that ends with exit code 2."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.mark.parametrize("name", HOSTILE)
def test_json_of_every_kind(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    text = HOSTILE[name]
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CalibrationError, match=r"file\.json"):
        Calibration.load(path)
    with pytest.raises(TaskError, match=r"file\.json"):
        load_task(str(path))
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n" + path.read_bytes())
    if name != "empty":
        with pytest.raises(TaskError, match=r"rows\.jsonl, line 2"):
            read_examples(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"heads": {"0": [1]}, "beta": "NaN"}', "has beta = 'NaN'; it must be a number"),
        ('{"heads": {"0": [1]}, "beta": null}', "has beta = null; it must be a number"),
        ('{"heads": {"0": [1]}, "beta": true}', "has beta = true; it must be a number"),
        ('{"heads": {"0": [1]}, "threshold": []}', "has threshold = '\\[\\]'|has threshold = \\[\\]"),
        ('{"heads": {"0": [1]}, "threshold_mode": {}}', "has threshold_mode = {}; it must be a text"),
        ('{"heads": {"0": [1]}, "version": true}', "has version = True"),
        ('{"heads": {"0": [1]}, "model": 3}', "model is 3; it must be an object"),
        ('{"heads": {"0": [1]}, "model": {"architecture": 1}}', "has architecture = 1; it must be a text"),
        ('{"heads": {"0": [1]}, "provenance": {"method": "gates", "tasks": 3}}', "has tasks = 3; it must be a list"),
        ('{"heads": {"0": [1]}, "provenance": {"x": 1}}', "unknown field 'x'"),
        ('{"heads": {"0": [1]}, "provenance": {"method": "m", "seed": 0.5}}', "has seed = 0.5; it must be a whole"),
        ('{"heads": [1]}', "heads is \\[1\\]; it must be an object"),
        ('{"²": [1]}', "which is no layer"),
        ('{"0": [1000000000000]}', "it must be a list of whole numbers from 0"),
    ],
)
def test_fields_of_a_calibration(text: str, reason: str) -> None:
    with pytest.raises(CalibrationError, match=reason):
        Calibration.from_json(text)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"choices": []}, r"choices are \[\] \(0\)"),
        ({"choices": [str(i) for i in range(100_000)]}, r"choices are .* \(100000\); there must be 2 to 1000"),
        ({"answer": 0.0}, "answer is 0.0; it must be an index"),
        ({"answer": 10**30}, "answer is 1000000000000000000000000000000; the 2 choices"),
        ({"answer": [0]}, r"answer is \[0\]"),
        ({"prompt": {"a": 1}}, "prompt is {'a': 1}; it must be a text"),
    ],
)
def test_rows(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**GOOD, **changes}))
    with pytest.raises(TaskError, match=f"line 1: {reason}") as caught:
        read_examples(path)
    assert len(str(caught.value)) < 1000


def test_a_pattern_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_export.tasks.row_form._SECONDS", 0.2)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a" * 60 + "b", "mood": 1}))
    (tmp_path / "task.json").write_text(
        json.dumps({**TASK, "path": {**PATTERN, "fields": {"text": "x", "mood": "mood"}}})
    )
    with pytest.raises(TaskError, match=r"the pattern '\(a\+\)\+' on 'a+b' takes longer than 0\.2 seconds"):
        load_examples(str(tmp_path / "task.json"))
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


@pytest.mark.parametrize(
    ("key", "text", "reason"),
    [
        ("limits", "[]", r"limits of F is \[\]; it must be an object"),
        ("limits", '{"vocabulary": "x"}', "has vocabulary = 'x'; it must be a whole number from 1"),
        ("limits", '{"context": -1}', "has context = -1"),
        ("limits", '{"context": 1e3}', "has context = 1000.0"),
        ("limits", '{"stop_tokens": 2}', "has stop_tokens = 2; it must be a list of whole numbers"),
        ("limits", '{"stop_tokens": [0.5]}', r"has stop_tokens = \[0.5\]"),
        ("limits", "{", "limits of F isn't JSON"),
        ("model", "{}", "has no field 'architecture'"),
        ("model", '{"architecture": "a", "num_layers": 0, "num_heads": 1}', "has num_layers = 0"),
        ("model", '{"architecture": "a", "num_layers": 1, "num_heads": 1, "of": 1}', "unknown field 'of'"),
        ("graft", '{"format": 1, "digest": 3}', "has digest = 3; it must be a text"),
        ("graft", "[[]]", "it must be an object"),
        ("packed_sink_state", '{"inputs": [], "heads": {"0": 1}, "parts": 1}', "names no inputs"),
        ("packed_sink_state", '{"inputs": ["a"], "heads": {"x": 1}, "parts": 1}', "'x', which is no layer"),
        ("packed_sink_state", '{"inputs": ["a"], "heads": {"0": 1}, "parts": 0}', "has parts = 0"),
        ("accuracy_level", "9" * 5000, "it must be a number up to 4"),
        ("block_size", "x", "has act_export.block_size = 'x'"),
        ("version", "1" * 20_000, "a text of at most 10000 characters"),
        ("calibrations", "[]", r"calibrations of F .*must be an object"),
        (
            "calibrations",
            '{"default": "a", "threshold_mode": "absolute", "heads": {}, "each": {}}',
            "is 'a'; it must be",
        ),
        (
            "calibrations",
            '{"default": "plain", "threshold_mode": "x", "heads": {}, "each": {}}',
            "threshold_mode = 'x'",
        ),
        ("calibrations", '{"default": "plain", "threshold_mode": "absolute", "heads": {"0": []}, "each": {}}', "twice"),
    ],
)
def test_what_a_file_says_of_itself(key: str, text: str, reason: str) -> None:
    with pytest.raises(ActExportError, match=reason):
        FileRecord.read({"act_export.version": "1", f"act_export.{key}": text}, "F", error=SessionError)


def test_configuration_beside_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"hidden_size": "x", "num_attention_heads": 0, "vocab_size": -1, "head_dim": []}'
    )
    assert set(configuration_beside(tmp_path / "model.onnx").values()) == {None}
    (tmp_path / "genai_config.json").write_text("[]")
    with pytest.raises(SessionError, match=r"genai_config\.json is no JSON object but a list"):
        configuration_beside(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "arguments",
    [
        ("--beta", "nan"),
        ("--beta", "inf"),
        ("--threshold", "nan"),
        ("--rank", "0"),
        ("--choose", "-1"),
        ("--seed", "-1"),
        ("--seed", str(10**30)),
        ("--batch-tokens", "0"),
        ("--shots", str(10**9)),
        ("--heads", "0,-1"),
        ("--heads", "1,x"),
    ],
    ids=" ".join,
)
def test_options_of_a_search(arguments: tuple[str, str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({**GOOD, "prompt": f"{i} is", "answer": i % 2}) for i in range(60)))
    said = refused("search", tmp_path / "none", "--data", rows, "--out", tmp_path / "c.json", *arguments)
    assert "there is no" not in said
    assert arguments[1].split(",")[-1] in said or arguments[0] in said
    assert os.listdir(tmp_path) == [rows.name]


def test_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    said = refused("export", tmp_path / "none", "--out", tmp_path / "a..b.onnx", "--plain")
    assert "a..b.onnx has '..' in its name" in said
