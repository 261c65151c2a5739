"""Prompts without answers: texts, and rows that have nothing but a prompt."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from act_export.errors import ActExportError
from act_export.tasks import Example
from act_export.tasks.encoding import sequence_beginning
from act_export.tasks.examples import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_ANSWERS = {"choices", "answer", "answers"}


def text_prompts(
    tokenizer: PreTrainedTokenizerBase | None, path: str | os.PathLike[str], *, length: int, most: int
) -> tuple[tuple[int, ...], ...]:
    """A text's tokens from its beginning on, cut into sequences; each begins with what the tokenizer begins all with.

    Args:
        tokenizer: The model's.
        path: UTF-8 text.
        length: Tokens of a sequence; the last may have fewer.
        most: Sequences at the most.

    Raises:
        ActExportError: If there is no tokenizer, the file can't be read or has no tokens, or the length leaves no room.
    """
    if tokenizer is None:
        raise ActExportError("the model has no tokenizer, so texts can't be read; put tokenizer.json into its folder")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ActExportError(f"can't read {path}: {error}") from error
    # Not in one go with special tokens: the tokenizer would put them around the whole text once.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    first = sequence_beginning(tokenizer)
    step = length - len(first)
    if step < 1:
        raise ActExportError(
            f"--length is {length}; the tokenizer begins each sequence with {len(first)} tokens already"
        )
    if not ids:
        raise ActExportError(f"{path} has no tokens; it needs text")
    return tuple((*first, *ids[start : start + step]) for start in range(0, min(len(ids), most * step), step))


def rows_without_answers(path: str | os.PathLike[str]) -> list[Example] | None:
    """Prompts of a JSON Lines file whose rows have {"prompt": text} and no answers; None where rows have answers.

    Raises:
        TaskError: If the file can't be read, or naming the line that isn't a JSON object.
        ActExportError: If it has no rows, or naming the line without a prompt.
    """
    rows = read_rows(path)
    if any(not _OF_ANSWERS.isdisjoint(row) for _, row in rows):
        return None
    if not rows:
        raise ActExportError(
            f'{path} has no rows; a line is {{"prompt": text}}, with choices and answer where there are'
        )
    examples = []
    for number, row in rows:
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise ActExportError(f"{path}, line {number}: prompt is {prompt!r}; it must be a text that is not empty")
        examples.append(Example(prompt, (), 0, where=f"line {number} of {Path(path).name}"))
    return examples
