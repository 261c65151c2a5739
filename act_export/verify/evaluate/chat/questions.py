"""Conversations to have with a model, in the form of MT-Bench's question.jsonl.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (NeurIPS 2023); fastchat/llm_judge in
github.com/lm-sys/FastChat.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from act_export.errors import shown
from act_export.json_fields import Fields
from act_export.tasks import TaskError
from act_export.tasks.examples import read_rows

_FORM = (
    'a line is {"question_id": 81, "category": "writing", "turns": [text, ...]}, and "reference": [text, ...] may '
    "follow, one for each turn"
)
_LONGEST_ID = 100


@dataclass(frozen=True)
class ChatQuestion:
    """What a user says, turn by turn.

    Attributes:
        id: Names it among the others.
        category: E.g. "writing"; may be empty.
        turns: The user's messages, at least one; each is said after the model's answer to the one before.
        references: A right answer for each turn, "" where there is none.
    """

    id: int | str
    category: str
    turns: tuple[str, ...]
    references: tuple[str, ...]


def read_questions(path: Path) -> tuple[ChatQuestion, ...]:
    """Reads a file of questions, at least one.

    Raises:
        TaskError: If it can't be read, has none, or naming the line that isn't one and what is wrong.
    """
    found: dict[int | str, ChatQuestion] = {}
    for number, row in read_rows(path):
        fields = Fields(row, f"{path}, line {number},", error=TaskError, advice=_FORM)
        question = _question(fields)
        if question.id in found:
            raise fields.refused(f"has question_id = {shown(question.id)} again; give each question its own")
        found[question.id] = question
    if not found:
        raise TaskError(f"{path} has no questions; {_FORM}")
    return tuple(found.values())


def _question(fields: Fields) -> ChatQuestion:
    name = fields.value("question_id")
    if type(name) is not int and (not isinstance(name, str) or not 0 < len(name) <= _LONGEST_ID):
        raise fields.refused(
            f"has question_id = {shown(name)}; it must be a whole number, or a text of 1 to {_LONGEST_ID} characters"
        )
    turns = fields.texts("turns")
    if not turns or not all(map(str.strip, turns)):
        raise fields.refused(f"has turns = {shown(list(turns))}; there must be at least one, and none of spaces only")
    references = fields.texts("reference") if fields.given("reference") else ()
    if len(references) > len(turns):
        raise fields.refused(f"has {len(references)} references for {len(turns)} turns; give one for each, or fewer")
    references += ("",) * (len(turns) - len(references))
    return ChatQuestion(name, fields.text("category") if fields.given("category") else "", turns, references)
