from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks import Example, Generation, TaskError, read_examples
from act_export.tasks.examples import read_rows

GOOD = {"prompt": "2 + 2 =", "choices": [" 3", " 4"], "answer": 1}


def write(folder: Path, *lines: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@st.composite
def an_example(draw: st.DrawFn) -> Example:
    choices = draw(st.lists(st.text(min_size=1), min_size=2, max_size=5, unique=True))
    return Example(draw(st.text(min_size=1)), tuple(choices), draw(st.integers(0, len(choices) - 1)))


@given(examples=st.lists(an_example(), min_size=1, max_size=5), by_text=st.booleans(), ascii_only=st.booleans())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, examples: list[Example], by_text: bool, ascii_only: bool
) -> None:
    rows = [
        {"prompt": e.prompt, "choices": e.choices, "answer": e.choices[e.answer] if by_text else e.answer}
        for e in examples
    ]
    path = write(tmp_path_factory.mktemp("rows"), *(json.dumps(row, ensure_ascii=ascii_only) for row in rows))
    read = read_examples(path)
    assert read.examples == tuple(examples)
    assert (read.name, read.length_normalized, read.generation) == ("data.jsonl", False, None)
    assert [example.where for example in read.examples] == [f"line {n} of data.jsonl" for n in range(1, len(rows) + 1)]


def test_an_answer_may_leave_out_the_space_that_begins_its_choice(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({**GOOD, "answer": "4"}))
    assert read_examples(path).examples == (Example("2 + 2 =", (" 3", " 4"), 1),)


def test_answers_that_the_model_writes(tmp_path: Path) -> None:
    rows = [{"prompt": "Capital of France?", "answers": ["Paris", "paris"]}, {"prompt": "b", "answers": [" c"]}]
    read = read_examples(write(tmp_path, *map(json.dumps, rows)))
    assert read.examples == (
        Example("Capital of France?", (" Paris",), 0, references=("Paris", "paris")),
        Example("b", (" c",), 0, references=(" c",)),
    )
    assert read.generation == Generation(max_new_tokens=50, stop=("\n",), metric="f1")


def test_a_row_may_say_what_it_asks(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps({**GOOD, "key": "two and two", "content_free": "N/A ="}), json.dumps(GOOD))
    keyed, plain = read_examples(path).examples
    assert (keyed.question, keyed.content_free) == ("two and two", "N/A =")
    assert (plain.question, plain.content_free) == ("2 + 2 =", "")


def test_a_table_is_told_what_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,label\nhello,1\n")
    with pytest.raises(TaskError, match=r"rows\.csv, line 1: isn't JSON.*; JSON Lines are read.*--task FILE\.json"):
        read_examples(path)


def test_blank_lines_count_but_are_no_rows(tmp_path: Path) -> None:
    path = write(tmp_path, "\ufeff", json.dumps(GOOD) + "\r", "", '{"a": 1}', "")
    assert [number for number, _ in read_rows(path)] == [2, 4]


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "isn't JSON"),
        ("[1, 2]", "is no JSON object but a list"),
        (json.dumps({"prompt": "a"}), "lacks 'choices' and 'answer'"),
        (json.dumps({**GOOD, "prompt": 5}), "prompt is 5"),
        (json.dumps({**GOOD, "prompt": ""}), "prompt is ''"),
        (json.dumps({**GOOD, "choices": "ab"}), "choices are 'ab'"),
        (json.dumps({**GOOD, "choices": ["a", ""]}), r"choices are \['a', ''\]"),
        (json.dumps({**GOOD, "choices": ["a"]}), "2 to 1000, all different"),
        (json.dumps({**GOOD, "choices": ["a", "a"]}), "2 to 1000, all different"),
        (json.dumps({**GOOD, "key": 5}), "key is 5; it must be a text"),
        (json.dumps({**GOOD, "content_free": None}), "content_free is None"),
        (json.dumps({"prompt": "a", "answers": []}), "there must be at least one"),
        (json.dumps({"prompt": "a", "answers": ["b", " "]}), "none of spaces only"),
        (json.dumps({"prompt": "a", "answers": "b"}), "answers are 'b'"),
        (json.dumps({"prompt": "a", "answers": ["b"]}), "put them into two files"),
        (json.dumps({**GOOD, "answer": " 5"}), "answer is ' 5', which is none of the choices"),
        (json.dumps({**GOOD, "choices": ["a", " a"], "answer": "a "}), "answer is 'a ', which is none of"),
        (json.dumps({**GOOD, "answer": 2}), "the 2 choices have indices 0 to 1"),
        (json.dumps({**GOOD, "answer": -1}), "answer is -1"),
        (json.dumps({**GOOD, "answer": True}), "answer is True; it must be an index"),
        (json.dumps({**GOOD, "answer": None}), "answer is None; it must be an index"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, wrong: str) -> None:
    path = write(tmp_path, json.dumps(GOOD), line)
    with pytest.raises(TaskError, match=rf"data\.jsonl, line 2: .*{wrong}"):
        read_examples(path)


def test_a_file_without_examples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"data\.jsonl has no examples; a line is"):
        read_examples(write(tmp_path, "", " "))


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"can't read .*absent\.jsonl"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(TaskError, match=r"latin\.jsonl, line 1: isn't JSON: .utf-8. codec"):
        read_examples(tmp_path / "latin.jsonl")
