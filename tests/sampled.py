"""What is too much to be run whole each time: some is drawn by the seed of the day, the rest is slow."""

from __future__ import annotations

import random
import zlib
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest

MARK, TURN = "sampled", "in_turn"
Value = tuple[str, object]


def draw_samples(items: Iterable[pytest.Item], seed: str, *, all_slow: bool = False, named: bool = False) -> None:
    """Marks as slow what isn't drawn of the cases of each function with the mark `sampled(n)`.

    Of functions with the mark `in_turn(n)` about one in n is run, with all its cases, whichever others there are.

    Cases that are slow by themselves are none of the table. All processes of a run have to be given the same items.

    Args:
        items: Whose marks change.
        seed: Of all draws: functions with the same parameters draw the same, and share what a fixture makes of them.
        named: Whether tests are named one by one: then each has its turn.
        all_slow: Marks those that are drawn as well, so that `-m slow` runs the whole table.
    """
    items = list(items)
    for item in items:
        turn = item.get_closest_marker(TURN)
        if turn is None:
            continue
        drawn = named or has_its_turn(item.nodeid.partition("[")[0], _number(item, turn), seed)
        if all_slow or not drawn:
            item.add_marker(pytest.mark.slow)
    tables: defaultdict[str, list[pytest.Function]] = defaultdict(list)
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker(MARK) and not item.get_closest_marker("slow"):
            tables[item.nodeid.partition("[")[0]].append(item)
    for table in tables.values():
        cases = sorted(table, key=lambda item: item.nodeid)
        kept = () if all_slow else draw_sample([_values(case) for case in cases], _size(cases[0]), seed)
        for index, case in enumerate(cases):
            if index not in kept:
                case.add_marker(pytest.mark.slow)


def draw_sample(cases: Sequence[frozenset[Value]], count: int, seed: str) -> set[int]:
    """Indices of `count` of the cases, which have between them as many values as so many can have, as far as is tried.

    Args:
        cases: The values of each.
        count: How many to draw; all of them where there are no more.
        seed: Of the draw.
    """
    left = list(range(len(cases)))
    random.Random(seed).shuffle(left)
    kept: set[int] = set()
    missing = frozenset().union(*cases)
    while left and len(kept) < count:
        best = max(left, key=lambda index: len(cases[index] & missing))  # the first of several
        left.remove(best)
        kept.add(best)
        missing -= cases[best]
    return kept


def has_its_turn(function: str, count: int, seed: str) -> bool:
    """Whether a function is the one in `count` that this seed draws; of each its own, so that any seed draws some."""
    return zlib.crc32(f"{seed} {function}".encode()) % count == 0


def _size(case: pytest.Function) -> int:
    marker = case.get_closest_marker(MARK)
    assert marker is not None
    return _number(case, marker)


def _number(item: pytest.Item, marker: pytest.Mark) -> int:
    (number,) = marker.args
    if number < 1:
        raise pytest.UsageError(f"{item.nodeid}: {marker.name}({number}) leaves no case")
    return int(number)


def _values(case: pytest.Function) -> frozenset[Value]:
    """Of each parameter, its place in its list; parameters of one list have the same place."""
    return frozenset(case.callspec.indices.items()) if hasattr(case, "callspec") else frozenset()
