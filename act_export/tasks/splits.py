"""Three disjoint sets of examples: to rank heads, to choose how many, and to report what that gains.

A search records which prompts it used, so that no evaluation counts them as unseen, whatever it draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from act_export.tasks.examples import Example, TaskError

RANK, CHOOSE, REPORT = 96, 128, 240


@dataclass(frozen=True)
class Splits:
    """Disjoint examples; no prompt occurs twice.

    Attributes:
        rank: The gradient that ranks heads is taken on these.
        choose: How many heads, and whether any, is decided on these.
        report: Take no part in either; accuracies come from these.
    """

    rank: tuple[Example, ...]
    choose: tuple[Example, ...]
    report: tuple[Example, ...]


def split_examples(
    examples: Iterable[Example], *, rank: int = RANK, choose: int = CHOOSE, report: int = REPORT, seed: int = 0
) -> Splits:
    """Draws the three splits.

    An example's place depends on its prompt and the seed alone: the same data in another order gives the same splits.

    Args:
        examples: Of two with the same prompt, the first is used.
        rank: Number of examples to rank heads with.
        choose: Number of examples to choose the number of heads with.
        report: Number of examples to report accuracies on.
        seed: Another seed draws other splits.

    Raises:
        TaskError: If there are too few different prompts, with the counts.
    """
    sizes = {"rank": rank, "choose": choose, "report": report}
    for name, size in sizes.items():
        if size < 1:
            raise TaskError(f"the {name} split has {size} examples; it needs at least 1")
    different: dict[str, Example] = {}
    for example in examples:
        different.setdefault(example.prompt, example)
    needed = rank + choose + report
    if len(different) < needed:
        raise TaskError(
            f"there are {len(different)} different prompts; {rank} to rank heads, {choose} to choose how many and "
            f"{report} to report on make {needed}. Add data, or make the splits smaller"
        )
    drawn = sorted(
        different.values(), key=lambda example: hashlib.sha256(f"{seed}\n{example.prompt}".encode()).digest()
    )
    return Splits(tuple(drawn[:rank]), tuple(drawn[rank : rank + choose]), tuple(drawn[rank + choose : needed]))


def prompt_digest(prompt: str) -> str:
    """What stands for a prompt in a search's record: 8 hex digits of its SHA-256."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:8]


def unused(examples: Iterable[Example], digests: Collection[str]) -> list[Example]:
    """The examples whose prompts have none of these digests."""
    used = frozenset(digests)
    return [example for example in examples if prompt_digest(example.prompt) not in used]
