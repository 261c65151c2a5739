"""One question with its possible answers, and the file of them that a user brings."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_export.errors import ActExportError

FORM = 'a line is {"prompt": text, "choices": [text, ...], "answer": index from 0 or one of the choices}'


class TaskError(ActExportError):
    """A task that doesn't exist, or task data that can't be used."""


@dataclass(frozen=True)
class Example:
    """A prompt, what may follow it, and what should.

    Attributes:
        prompt: What the model reads.
        choices: Possible continuations, with the space that separates them from the prompt.
        answer: Index of the right choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_examples(path: str | os.PathLike[str]) -> list[Example]:
    """Reads a user's own data: one JSON object per line, with "prompt", "choices" and "answer".

    The answer is the index of the right choice, counted from 0, or its text. Blank lines are skipped.

    Raises:
        TaskError: If the file can't be read or has no example, or naming the line that isn't one and what is wrong.
    """
    examples = []
    for number, row in read_rows(path):
        try:
            examples.append(_example(row))
        except ValueError as error:
            raise TaskError(f"{path}, line {number}: {error}; {FORM}") from error
    if not examples:
        raise TaskError(f"{path} has no examples; {FORM}")
    return examples


def read_rows(path: str | os.PathLike[str]) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with its line number.

    Raises:
        TaskError: If the file can't be read, or naming the line that isn't a JSON object.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"can't read {path}: {error}") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TaskError(f"{path}, line {number}: a {type(row).__name__}; expected a JSON object")
        rows.append((number, row))
    return rows


def _example(row: dict[str, Any]) -> Example:
    missing = [name for name in ("prompt", "choices", "answer") if name not in row]
    if missing:
        raise ValueError(f"lacks {' and '.join(map(repr, missing))}")
    prompt, choices, answer = row["prompt"], row["choices"], row["answer"]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt is {prompt!r}; it must be a text that is not empty")
    if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError(f"choices are {choices!r}; they must be texts that are not empty")
    if len(choices) < 2 or len(set(choices)) < len(choices):
        raise ValueError(f"choices are {choices!r}; there must be two or more, all different")
    return Example(prompt, tuple(choices), _answer_index(answer, choices))


def _answer_index(answer: Any, choices: list[str]) -> int:
    if isinstance(answer, str):
        for matches in (
            [index for index, choice in enumerate(choices) if choice == answer],
            [index for index, choice in enumerate(choices) if choice.strip() == answer.strip()],
        ):
            if len(matches) == 1:
                return matches[0]
        raise ValueError(f"answer is {answer!r}, which is none of the choices {choices!r}")
    if type(answer) is not int:
        raise ValueError(f"answer is {answer!r}; it must be an index or one of the choices")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer is {answer}; the {len(choices)} choices have indices 0 to {len(choices) - 1}")
    return answer
