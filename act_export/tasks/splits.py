"""Three disjoint sets of examples: to rank heads, to choose how many, and to report what that gains.

A search records which questions it used, so that no evaluation counts them as unseen, whatever it draws.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from act_export.tasks.examples import Example, TaskError

RANK, CHOOSE, REPORT = 96, 128, 240
USUAL_ROWS = RANK + CHOOSE + REPORT
MINIMUM = 24


@dataclass(frozen=True)
class Splits:
    """Disjoint examples; no question occurs twice, and no two splits share a group.

    Attributes:
        rank: The gradient that ranks heads is taken on these.
        choose: How many heads, and whether any, is decided on these.
        report: Take no part in either; accuracies come from these.
        duplicates: Number of examples left out because their question, or group, is another's.
    """

    rank: tuple[Example, ...]
    choose: tuple[Example, ...]
    report: tuple[Example, ...]
    duplicates: int = field(default=0, compare=False)


def split_examples(
    examples: Iterable[Example],
    *,
    rank: int | None = None,
    choose: int | None = None,
    report: int | None = None,
    seed: int = 0,
) -> Splits:
    """Draws the three splits.

    An example's place depends on its question and the seed alone: the same data in another order gives the same splits.
    Only where an answer would be missing from a split, they are drawn so that each has its part of every answer.

    Args:
        examples: Of those with the same question or group, one is used.
        rank: Number of examples to rank heads with; None for 96, or about a fifth of the data where it is short.
        choose: Number of examples to choose the number of heads with; None for 128, or about three tenths.
        report: Number of examples to report accuracies on; None for 240, or about a half.
        seed: Another seed draws other splits.

    Raises:
        TaskError: If there are too few different questions, or too few with one of the answers, with the counts.
    """
    check_sizes(rank=rank, choose=choose, report=report)
    given = list(examples)
    different = drawn(given, seed)
    sizes = _sizes(len(different), {"rank": rank, "choose": choose, "report": report})
    splits = _consecutive(different, sizes)
    if _lacks_an_answer(different, splits):
        splits = _stratified(different, sizes)
    ranking, choosing, reporting = map(tuple, splits)
    return Splits(ranking, choosing, reporting, len(given) - len(different))


def split_folds(examples: Iterable[Example], count: int, *, seed: int = 0) -> list[Splits]:
    """Splits of several searches, no two of which report on the same question: cross-validation, where rows are few.

    Each reports on a part of its own and has its other two splits of the remaining questions.

    Args:
        examples: Of those with the same question or group, one is used.
        count: Of searches, at least 2.
        seed: Another seed draws other splits.

    Raises:
        TaskError: If there are too few different questions, or too few with one of the answers.
    """
    given = list(examples)
    different = drawn(given, seed)
    if len(different) < MINIMUM:
        raise _too_few(len(different))
    size = min(REPORT, len(different) // count)
    folds = []
    for start in range(0, count * size, size):
        rest = different[start + size :] + different[:start]
        ranking = min(RANK, len(rest) * RANK // (RANK + CHOOSE))
        sizes = (ranking, min(CHOOSE, len(rest) - ranking))
        parts = _consecutive(rest, sizes)
        if _lacks_an_answer(rest, parts):
            parts = _stratified(rest, sizes)
        reported = tuple(different[start : start + size])
        folds.append(Splits(tuple(parts[0]), tuple(parts[1]), reported, len(given) - len(different)))
    return folds


def _too_few(available: int) -> TaskError:
    return TaskError(
        f"there are {available} different prompts; {MINIMUM} are needed, and {USUAL_ROWS} for splits of the usual "
        f"sizes. Add data"
    )


def check_sizes(**sizes: int | None) -> None:
    """Raises TaskError for a split of less than one example; None stands for the usual size."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise TaskError(f"the {name} split has {size} examples; it needs at least 1")


def prompt_digest(question: str) -> str:
    """What stands for a question in a search's record: 8 hex digits of the SHA-256 of its normal form."""
    return _digest(f"question {normal_form(question)}")


def question_digests(example: Example) -> frozenset[str]:
    """What a search records of an example: its question's digest, and its group's where no two splits may share it.

    Examples that count as the same have one in common.
    """
    return frozenset(map(_digest, sameness(example)))


def unused(examples: Iterable[Example], digests: Collection[str]) -> list[Example]:
    """The examples whose questions have none of these digests, and don't count as the same as one that has."""
    used = frozenset(digests)
    return [example for example in examples if used.isdisjoint(question_digests(example))]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _sizes(available: int, asked: dict[str, int | None]) -> list[int]:
    usual = {"rank": RANK, "choose": CHOOSE, "report": REPORT}
    open_names = [name for name, size in asked.items() if size is None]
    if open_names and available < MINIMUM:
        raise _too_few(available)
    left = available - sum(size for size in asked.values() if size is not None)
    wanted = sum(usual[name] for name in open_names)
    sizes = {
        name: size if size is not None else max(1, min(usual[name], left * usual[name] // wanted))
        for name, size in asked.items()
    }
    if open_names and 0 < left < wanted:  # what rounding left over goes to the last
        last = open_names[-1]
        sizes[last] = max(1, left - sum(sizes[name] for name in open_names[:-1]))
    needed = sum(sizes.values())
    if available < needed:
        raise TaskError(
            f"there are {available} different prompts; {sizes['rank']} to rank heads, {sizes['choose']} to choose how "
            f"many and {sizes['report']} to report on make {needed}. Add data, or make the splits smaller"
        )
    return list(sizes.values())


def _consecutive(order: Sequence[Example], sizes: Sequence[int]) -> list[list[Example]]:
    splits = []
    start = 0
    for size in sizes:
        splits.append(list(order[start : start + size]))
        start += size
    return splits


def _lacks_an_answer(order: Sequence[Example], splits: Sequence[Sequence[Example]]) -> bool:
    if any(example.references for example in order) or len({len(example.choices) for example in order}) > 1:
        return False
    answers = {example.answer for example in order}
    return any(len(split) >= len(answers) > len({example.answer for example in split}) for split in splits)


def _stratified(order: Sequence[Example], sizes: Sequence[int]) -> list[list[Example]]:
    """Every split that is large enough has one of each answer, and beyond that each answer's part of the data."""
    by_answer: dict[int, list[Example]] = {}
    for example in order:
        by_answer.setdefault(example.answer, []).append(example)
    large = [index for index, size in enumerate(sizes) if size >= len(by_answer)]
    splits: list[list[Example]] = [[] for _ in sizes]
    woven = []
    for answer, alike in sorted(by_answer.items()):
        if len(alike) < len(large):
            if len({example.choices for example in order}) > 1:  # then an answer's index means nothing
                return _consecutive(order, sizes)
            raise TaskError(
                f"{len(alike)} of {len(order)} different prompts have the answer {alike[0].choices[answer]!r}, too few "
                f"for one in each of {len(large)} splits; add prompts with this answer, or leave it out"
            )
        for index, example in zip(large, alike, strict=False):
            splits[index].append(example)
        rest = alike[len(large) :]
        woven += [((position + 0.5) / len(rest), answer, example) for position, example in enumerate(rest)]
    remaining = iter([example for _, _, example in sorted(woven, key=lambda item: item[:2])])
    for split, size in zip(splits, sizes, strict=True):
        split += [next(remaining) for _ in range(size - len(split))]
    places = {id(example): position for position, example in enumerate(order)}
    return [sorted(split, key=lambda example: places[id(example)]) for split in splits]


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
