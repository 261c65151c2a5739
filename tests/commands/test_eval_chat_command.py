"""act-export eval --chat-file, from the command line."""

from __future__ import annotations

import json

import pytest
from chats import QUESTIONS, save_tokenizer, write_questions
from command_runs import run

from act_export.verify.evaluate.chat.conversation import Chats

FIGURES = ["tokens", "at_limit", "distinct_1", "distinct_2", "repeated", "log_likelihood", "right"]


@pytest.fixture
def asked(exported, tmp_path, monkeypatch):
    """The command, in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tokenizer = save_tokenizer(tmp_path / "tokenizer")
    questions = write_questions(tmp_path / "questions.jsonl")
    return ["eval", exported, "--chat-file", questions, "--tokenizer", tokenizer]


def test_conversations_of_a_file_with_itself_plain(asked, tmp_path):
    command = [*asked, "--max-new-tokens", 6, "--chat-out", tmp_path / "out", "--seed", 3]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "3 questions, 6 turns" in result.stdout
    for words in ("tokens of an", "most repeated", "as the reference", "plain and heads", "95% interval"):
        assert words in result.stdout
    assert "heads: 6 of 6 answers differ; 3 questions are too few to tell luck from a change." in result.stdout
    assert "chat: plain, " in result.stderr
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == ["heads.jsonl", "plain.jsonl", "side_by_side.html"]
    shown = json.loads(run(*command, "--json").stdout)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == written
    assert (shown["format"], shown["version"]) == ("act-export chat evaluation", 1)
    assert (shown["questions"], shown["turns"], shown["request"]["max_new_tokens"]) == (3, 6, 6)
    (comparison,) = shown["comparisons"]
    assert (comparison["calibration"], comparison["answers"], comparison["worse"]) == ("heads", 6, [])
    assert list(comparison["figures"]) == FIGURES
    assert comparison["figures"]["right"].keys() == {
        *("questions", "plain", "calibrated", "difference", "interval", "p"),
    }
    for name in ("plain", "heads"):
        lines = [json.loads(line) for line in written[f"{name}.jsonl"].splitlines()]
        said = [[turn["text"] for turn in answers["models"][name]] for answers in shown["answers"]]
        assert [line["choices"][0]["turns"] for line in lines] == said
        assert [line["question_id"] for line in lines] == [question["question_id"] for question in QUESTIONS]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "sst2"), "--task is of tasks, and --chat-file isn't one"),
        (("--data", "x.jsonl"), "--data is of tasks"),
        (("--against", "x.onnx"), "--against is of tasks"),
        (("--split", "all"), "--split is of tasks"),
        (("--truncate",), "--truncate is of tasks"),
        (("--calibration", "none"), "has no calibration 'none'; there are heads, plain"),
        (("--calibration", "plain"), "the plain model answers anyway"),
        (("--max-new-tokens", "0"), "max new tokens is 0; give 1 or more"),
        (("--max-new-tokens", "200"), "question 81 is too long"),
    ],
)
def test_what_is_refused_before_any_answer(asked, options, message, monkeypatch):
    monkeypatch.delattr(Chats, "answers")
    result = run(*asked, *options)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_options_of_conversations_without_any(asked):
    command = [*asked[:2], "--tokenizer", asked[-1]]
    for option, value in (("--chat-out", "out"), ("--max-new-tokens", 3)):
        result = run(*command, option, value)
        assert result.exit_code == 2
        assert f"{option} is of --chat-file, which isn't given" in result.stderr
    result = run(*command, "--calibration", "heads", "--calibration", "plain")
    assert result.exit_code == 2
    assert "--calibration is given 2 times, and tasks are answered with one: heads, plain; name one" in result.stderr
