"""Prompts from texts and from rows without answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from act_export.errors import ActExportError
from act_export.profile.prompts import rows_without_answers, text_prompts
from act_export.tasks import TaskError


def tokenizer(*, begins: bool):
    made = tiny_tokenizer()
    if begins:
        made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return made


@given(
    text=st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=80).filter(
        lambda text: "\r" not in text and not text.startswith("\ufeff")
    ),
    length=st.integers(2, 30),
    most=st.integers(1, 9),
    begins=st.booleans(),
)
def test_a_text_is_cut_and_nothing_is_lost(tmp_path_factory, text, length, most, begins):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text, encoding="utf-8")
    made = tokenizer(begins=begins)
    cut = text_prompts(made, path, length=length, most=most)
    whole = made(text, add_special_tokens=False).input_ids
    first = [1] if begins else []
    assert all(list(prompt[: len(first)]) == first for prompt in cut)
    assert all(len(prompt) == length for prompt in cut[:-1])
    assert len(first) < len(cut[-1]) <= length
    assert len(cut) <= most
    joined = [token for prompt in cut for token in prompt[len(first) :]]
    assert joined == whole[: len(joined)]
    assert len(cut) == most or joined == whole


def test_texts_that_can_not_be_used(tmp_path):
    with pytest.raises(ActExportError, match="has no tokenizer"):
        text_prompts(None, tmp_path / "text.txt", length=8, most=1)
    with pytest.raises(ActExportError, match=r"can't read .*text\.txt"):
        text_prompts(tokenizer(begins=False), tmp_path / "text.txt", length=8, most=1)
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ActExportError, match="has no tokens"):
        text_prompts(tokenizer(begins=True), tmp_path / "text.txt", length=8, most=1)
    (tmp_path / "text.txt").write_text("abc")
    with pytest.raises(ActExportError, match="--length is 1; the tokenizer begins each sequence with 1 tokens"):
        text_prompts(tokenizer(begins=True), tmp_path / "text.txt", length=1, most=1)


def test_rows_without_answers(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one"}\n\n{"prompt": "two", "source": "web"}\n')
    found = rows_without_answers(path)
    assert [(example.prompt, example.choices, example.where) for example in found] == [
        ("one", (), "line 1 of rows.jsonl"),
        ("two", (), "line 3 of rows.jsonl"),
    ]
    path.write_text('{"prompt": "one"}\n{"prompt": "two", "choices": [" a", " b"], "answer": 0}\n')
    assert rows_without_answers(path) is None
    path.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    with pytest.raises(ActExportError, match="line 2: prompt is None"):
        rows_without_answers(path)
    path.write_text("\n")
    with pytest.raises(ActExportError, match="has no rows"):
        rows_without_answers(path)
    path.write_text("[]\n")
    with pytest.raises(TaskError, match="line 1"):
        rows_without_answers(path)
