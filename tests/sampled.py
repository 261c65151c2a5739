"""Tables of cases too large to be run whole each time: a few are drawn by the seed of the day, the rest are slow."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence

import pytest

MARK = "sampled"
Value = tuple[str, object]


def draw_samples(items: Iterable[pytest.Item], seed: str, *, all_slow: bool = False) -> None:
    """Marks as slow what isn't drawn of the cases of each function with the mark `sampled(n)`.

    Cases that are slow by themselves are none of the table. All processes of a run have to be given the same items.

    Args:
        items: Whose marks change.
        seed: Of all draws: functions with the same parameters draw the same, and share what a fixture makes of them.
        all_slow: Marks those that are drawn as well, so that `-m slow` runs the whole table.
    """
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


def _size(case: pytest.Function) -> int:
    marker = case.get_closest_marker(MARK)
    assert marker is not None
    (size,) = marker.args
    if size < 1:
        raise pytest.UsageError(f"{case.nodeid}: sampled({size}) leaves no case")
    return size


def _values(case: pytest.Function) -> frozenset[Value]:
    """Of each parameter, its place in its list; parameters of one list have the same place."""
    return frozenset(case.callspec.indices.items()) if hasattr(case, "callspec") else frozenset()
