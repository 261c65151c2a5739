"""One question with its possible answers, and the file of them that a user brings."""

from __future__ import annotations

import codecs
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from act_export.errors import ActExportError, others_errors, shown
from act_export.json_file import parse_object

FORM = (
    'a line is {"prompt": text, "choices": [text, ...], "answer": index from 0 or one of the choices}, or, where the '
    'model writes the answer itself, {"prompt": text, "answers": [text, ...]}'
)
MOST_CHOICES = 1000  # of a question
_LONGEST_LINE = 16 << 20  # bytes
TABLES = (".parquet", ".arrow", ".csv")  # that task files may name
_OF_TABLES = "JSON Lines are read, an object a line; a table is the `path` of a task file: --task FILE.json"


class TaskError(ActExportError):
    """A task that doesn't exist, or task data that can't be used."""


@dataclass(frozen=True)
class Example:
    """A prompt, what may follow it, and what should.

    Attributes:
        prompt: What the model reads.
        choices: Possible continuations, with the space that separates them from the prompt. Where the model writes the
            answer itself, one: the first text that counts as right.
        answer: Index of the right choice.
        key: What the question is, whatever stands around it; "" stands for the prompt. Draws and duplicates go by it.
        references: Texts that count as right where the model writes the answer itself; else none.
        content_free: The prompt with "N/A" for all that the question is about; "" where there is none.
        group: What no two splits may share, as the passage that several questions are about; "" for nothing.
        where: Where it comes from, for messages: "line 12 of data.jsonl".
        first_token: The model's first token alone is its answer, see `act_export.tasks.scoring`.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    key: str = ""
    references: tuple[str, ...] = ()
    content_free: str = ""
    group: str = ""
    where: str = field(default="", compare=False)
    first_token: bool = False

    @property
    def question(self) -> str:
        """The key, or the prompt where there is none."""
        return self.key or self.prompt


@dataclass(frozen=True)
class Generation:
    """How the model writes an answer, and what it is measured by.

    Attributes:
        max_new_tokens: At the most.
        stop: Texts that end the answer; they don't belong to it.
        metric: "exact" or "f1": what a search maximises.
    """

    max_new_tokens: int
    stop: tuple[str, ...]
    metric: str


OWN_GENERATION = Generation(max_new_tokens=50, stop=("\n",), metric="f1")


@dataclass(frozen=True)
class TaskExamples:
    """All questions of a task.

    Attributes:
        name: The task's, or the file's.
        examples: At least one.
        length_normalized: A choice's log-likelihood is divided by the number of its tokens.
        generation: How answers are written; None where choices are scored.
    """

    name: str
    examples: tuple[Example, ...]
    length_normalized: bool = False
    generation: Generation | None = None


def read_examples(path: str | os.PathLike[str]) -> TaskExamples:
    """Reads a user's own data: one JSON object per line.

    With "prompt", "choices" and "answer", the index of the right choice, counted from 0, or its text. Or with "prompt"
    and "answers", texts that count as right, for answers that the model writes itself. "key" and "content_free" may
    follow, see `Example`. Blank lines are skipped.

    Raises:
        TaskError: If the file can't be read, has no example or both kinds, or naming the line that isn't one and what
            is wrong.
    """
    examples = []
    advice = _OF_TABLES if Path(path).suffix in TABLES else ""
    for number, row in read_rows(path, advice=advice):
        try:
            examples.append(_example(row, f"line {number} of {Path(path).name}"))
            if bool(examples[0].references) != bool(examples[-1].references):
                raise ValueError('some lines have "choices" and others "answers"; put them into two files')
        except ValueError as error:
            raise TaskError(f"{path}, line {number}: {error}; {FORM}") from error
    if not examples:
        raise TaskError(f"{path} has no examples; {FORM}")
    generation = OWN_GENERATION if examples[0].references else None
    return TaskExamples(Path(path).name, tuple(examples), generation=generation)


def read_rows(path: str | os.PathLike[str], *, advice: str = "") -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSON Lines file, each with its line number.

    Args:
        path: The file.
        advice: What to do, at the end of messages on lines that aren't objects.

    Raises:
        TaskError: If the file can't be read, or naming the line that isn't a JSON object, or is too long.
    """
    rows, lines = [], 0
    with others_errors(f"can't read {path}", error=TaskError), Path(path).open("rb") as file:
        while line := file.readline(_LONGEST_LINE + 1):
            lines += 1
            if lines == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                row = parse_object(
                    line,
                    f"{path}, line {lines}:",
                    error=TaskError,
                    advice=advice,
                    largest_bytes=_LONGEST_LINE,
                    repeats=True,
                )
                rows.append((lines, row))
    return rows


def choice_named(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice with this text; spaces around it count only where they tell choices apart."""
    for matches in (
        [index for index, choice in enumerate(choices) if choice == answer],
        [index for index, choice in enumerate(choices) if choice.strip() == answer.strip()],
    ):
        if len(matches) == 1:
            return matches[0]
    return None


def _example(row: dict[str, Any], where: str) -> Example:
    wanted = ("prompt", "answers") if "answers" in row and "choices" not in row else ("prompt", "choices", "answer")
    missing = [name for name in wanted if name not in row]
    if missing:
        raise ValueError(f"lacks {' and '.join(map(repr, missing))}")
    prompt = row["prompt"]
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(f"prompt is {shown(prompt)}; it must be a text that is not empty")
    for name in ("key", "content_free"):
        if not isinstance(row.get(name, ""), str):
            raise ValueError(f"{name} is {shown(row[name])}; it must be a text")
    more = {"key": row.get("key", ""), "content_free": row.get("content_free", ""), "where": where}
    if "answers" in wanted:
        references = _texts(row["answers"], "answers")
        if not references or not all(map(str.strip, references)):
            raise ValueError(
                f"answers are {shown(row['answers'])}; there must be at least one, and none of spaces only"
            )
        first = references[0]
        return Example(prompt, (first if first[0].isspace() else f" {first}",), 0, references=references, **more)
    choices = _texts(row["choices"], "choices")
    if not 2 <= len(choices) <= MOST_CHOICES or len(set(choices)) < len(choices):
        given = f"{shown(row['choices'])} ({len(choices)})"
        raise ValueError(f"choices are {given}; there must be 2 to {MOST_CHOICES}, all different")
    return Example(prompt, choices, _answer_index(row["answer"], choices), **more)


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) and text for text in value):
        raise ValueError(f"{name} are {shown(value)}; they must be texts that are not empty")
    return tuple(value)


def _answer_index(answer: Any, choices: Sequence[str]) -> int:
    if isinstance(answer, str):
        named = choice_named(answer, choices)
        if named is None:
            raise ValueError(f"answer is {shown(answer)}, which is none of the choices {shown(list(choices))}")
        return named
    if type(answer) is not int:
        raise ValueError(f"answer is {shown(answer)}; it must be an index or one of the choices")
    if not 0 <= answer < len(choices):
        raise ValueError(f"answer is {shown(answer)}; the {len(choices)} choices have indices 0 to {len(choices) - 1}")
    return answer
