"""Answers of two models side by side, for people who don't know which is which: one HTML file that opens from disk."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from importlib import resources
from string import Template
from typing import Any

from act_export.calibration.strengths import PLAIN
from act_export.html_page import as_json, as_script, script_hash
from act_export.verify.evaluate.chat.questions import ChatQuestion

Texts = Sequence[Sequence[str]]
"""Of one model: by question, the answers to its turns."""


def side_by_side(
    questions: Sequence[ChatQuestion], plain: Texts, calibration: str, calibrated: Texts, seed: int
) -> str:
    """The page's text.

    Args:
        questions: One or more.
        plain: Answers of the plain model.
        calibration: Name of the other's. Each has a page of its own: who sees the plain answers twice knows them.
        calibrated: The other's answers.
        seed: Draws for each question which of the two models is A.
    """
    script = as_script(_part("page.js"))
    return Template(_part("page.html")).substitute(
        style=_part("page.css"),
        script=script,
        script_hash=script_hash(script),
        data=as_json(_document(questions, plain, calibration, calibrated, seed)),
    )


def _document(
    questions: Sequence[ChatQuestion], plain: Texts, calibration: str, calibrated: Texts, seed: int
) -> dict[str, Any]:
    """What the page shows: a card for each pair of conversations that differ, and how many don't."""
    cards = []
    for question, first, second in zip(questions, plain, calibrated, strict=True):
        if list(first) == list(second):
            continue
        sides = [(PLAIN, first), (calibration, second)]
        if random.Random(json.dumps([seed, calibration, question.id])).random() < 0.5:
            sides.reverse()
        models, answers = zip(*sides, strict=True)
        cards.append(
            {
                "id": question.id,
                "category": question.category,
                "turns": question.turns,
                "models": models,
                "answers": answers,
            }
        )
    key = hashlib.sha256(json.dumps(cards).encode()).hexdigest()[:16]
    return {"key": key, "calibration": calibration, "cards": cards, "same": len(questions) - len(cards)}


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
