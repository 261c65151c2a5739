"""The order that questions are drawn in, and which questions count as the same."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

from act_export.tasks.examples import Example

# Marks that rarely change what a question asks. Signs that do in arithmetic, as - * / % ( ), aren't among them.
_MARKS = re.compile(r"""[\s.,;:!?'"`\u2018\u2019\u201c\u201d\u201e«»]+""")


def drawn(examples: Iterable[Example], seed: int) -> list[Example]:
    """The different questions in the order of their draw; of those that count as the same, the first in that order.

    A question's place depends on what it asks and the seed alone, not on the order or number of the others.
    """
    order = sorted(examples, key=lambda example: place(example, seed))
    seen: set[str] = set()
    different = []
    for example in order:
        same = sameness(example)
        if seen.isdisjoint(same):
            different.append(example)
        seen.update(same)
    return different


def place(example: Example, seed: int) -> bytes:
    """What the draw sorts by."""
    return hashlib.sha256(f"{seed}\n{example.question}".encode()).digest()


def sameness(example: Example) -> frozenset[str]:
    """Two examples that share one of these count as the same question."""
    same = {f"question {normal_form(example.question)}"}
    if example.group:
        same.add(f"group {normal_form(example.group)}")
    return frozenset(same)


def normal_form(text: str) -> str:
    """A text without what a copy of a data set may change: Unicode form, case, white space, quotes and stops."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _MARKS.sub(" ", folded).strip() or text
