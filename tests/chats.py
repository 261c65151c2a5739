"""Conversations for tests: a tokenizer with a chat template, and files of questions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Hi, who is it?", "Why?"]},
    {"question_id": 7, "category": "math", "turns": ["1+1"], "reference": ["2"]},
    {"question_id": "x", "turns": ["Say a word.", "Again.", "More"], "reference": ["", "a"]},
]


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write_questions(path: Path, questions: Sequence[Mapping[str, Any]] = QUESTIONS) -> Path:
    path.write_text("".join(json.dumps(question) + "\n" for question in questions))
    return path


def save_tokenizer(folder: Path) -> Path:
    """A folder with the tokenizer, and what tells whose it is."""
    chat_tokenizer().save_pretrained(folder)
    return folder
