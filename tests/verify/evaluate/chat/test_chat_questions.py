"""MT-Bench's form of questions: what is read, and what is refused with its line."""

from __future__ import annotations

import json

import pytest
from chats import write_questions

from act_export.tasks import TaskError
from act_export.verify.evaluate.chat.questions import ChatQuestion, read_questions

# A line of fastchat/llm_judge/data/mt_bench/question.jsonl, as it stands there.
FASTCHAT = (
    '{"question_id": 111, "category": "math", "turns": ["The vertices of a triangle are at points (0, 0), (-1, 1), and '
    '(3, 3). What is the area of the triangle?", "What\'s area of the circle circumscribing the triangle?"], '
    '"reference": ["Area is 3", "5pi"]}\n'
)


def test_a_line_of_fastchat(tmp_path):
    (tmp_path / "q.jsonl").write_text(FASTCHAT)
    (question,) = read_questions(tmp_path / "q.jsonl")
    assert (question.id, question.category, question.references) == (111, "math", ("Area is 3", "5pi"))
    assert question.turns[1] == "What's area of the circle circumscribing the triangle?"


def test_what_may_be_left_out(tmp_path):
    rows = [
        {"question_id": "x", "turns": ["a"]},
        {"question_id": 0, "turns": ["a", "b"], "reference": ["c"], "generator": "me"},
        {"question_id": -1, "turns": ["a"], "category": None, "reference": None},
    ]
    path = write_questions(tmp_path / "q.jsonl", rows)
    path.write_text("\ufeff\n" + path.read_text() + "\n")
    assert read_questions(path) == (
        ChatQuestion("x", "", ("a",), ("",)),
        ChatQuestion(0, "", ("a", "b"), ("c", "")),
        ChatQuestion(-1, "", ("a",), ("",)),
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"turns": ["a"]}', "has no field 'question_id'"),
        ('{"question_id": 1}', "has no field 'turns'"),
        ('{"question_id": true, "turns": ["a"]}', "has question_id = True; it must be a whole number"),
        ('{"question_id": 1.0, "turns": ["a"]}', r"has question_id = 1\.0; it must be a whole number"),
        ('{"question_id": "", "turns": ["a"]}', "has question_id = ''; it must be"),
        ('{"question_id": 81, "turns": ["a"]}', "has question_id = 81 again; give each question its own"),
        ('{"question_id": 1, "turns": "a"}', "has turns = 'a'; it must be a list of texts"),
        ('{"question_id": 1, "turns": []}', r"has turns = \[\]; there must be at least one"),
        ('{"question_id": 1, "turns": ["a", " "]}', "none of spaces only"),
        ('{"question_id": 1, "turns": ["a"], "category": 3}', "has category = 3; it must be a text"),
        ('{"question_id": 1, "turns": ["a"], "reference": "b"}', "has reference = 'b'; it must be a list of texts"),
        ('{"question_id": 1, "turns": ["a"], "reference": ["b", "c"]}', "has 2 references for 1 turns"),
        ("[]", "is no JSON object but a list"),
        ('{"question_id": 1, "turns": ["a"]', "isn't JSON"),
    ],
)
def test_what_is_refused(tmp_path, line, message):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question_id": 81, "turns": ["a"]}) + "\n\n" + line + "\n")
    with pytest.raises(TaskError, match=rf"q\.jsonl, line 3.*{message}"):
        read_questions(path)


def test_no_questions(tmp_path):
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(TaskError, match=r"q\.jsonl has no questions; a line is"):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(TaskError, match=r"can't read .*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")
