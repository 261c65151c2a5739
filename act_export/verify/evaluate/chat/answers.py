"""Answers as FastChat's judges read them, model_answer/MODEL.jsonl: a line for each question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from act_export.verify.evaluate.chat.conversation import Turn
from act_export.verify.evaluate.chat.questions import ChatQuestion

_ID_LENGTH = 22  # of FastChat's own


@dataclass(frozen=True)
class Answer:
    """A model's side of a conversation.

    Attributes:
        turns: One for each of the user's.
        time: When it was given, in seconds since 1970.
    """

    turns: tuple[Turn, ...]
    time: float

    @classmethod
    def of_json(cls, value: Any) -> Answer:
        """What `to_json` gave."""
        turns = [Turn(**{**turn, "tokens": tuple(turn["tokens"])}) for turn in value["turns"]]
        return cls(tuple(turns), value["time"])

    def to_json(self) -> dict[str, Any]:
        """For a journal."""
        return {"time": self.time, "turns": [vars(turn) for turn in self.turns]}

    @property
    def texts(self) -> tuple[str, ...]:
        """Of the turns."""
        return tuple(turn.text for turn in self.turns)


def answers_file(model: str, questions: Sequence[ChatQuestion], answers: Sequence[Answer]) -> str:
    """The text of a model's file.

    Args:
        model: Its name; FastChat goes by that of the file.
        questions: One or more.
        answers: In their order.
    """
    return "".join(
        json.dumps(
            {
                "question_id": question.id,
                "answer_id": _answer_id(model, question, answer),
                "model_id": model,
                "choices": [{"index": 0, "turns": answer.texts}],
                "tstamp": answer.time,
            }
        )
        + "\n"
        for question, answer in zip(questions, answers, strict=True)
    )


def _answer_id(model: str, question: ChatQuestion, answer: Answer) -> str:
    content = json.dumps([model, question.id, question.turns, answer.texts])
    return hashlib.sha256(content.encode()).hexdigest()[:_ID_LENGTH]
