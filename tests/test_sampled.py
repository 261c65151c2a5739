"""Which cases of a large table are run."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from sampled import draw_sample, draw_samples

TABLE = [frozenset({("a", a), ("b", b), ("c", b)}) for a, b in product(range(5), range(3))]  # b and c: of one list

FILE = """
import pytest

@pytest.mark.sampled(3)
@pytest.mark.parametrize("x", [*range(9), pytest.param(9, marks=pytest.mark.slow)])
def test_many(x): pass

@pytest.mark.sampled(3)
@pytest.mark.parametrize("x", range(2))
def test_few(x): pass

@pytest.mark.parametrize("x", range(4))
def test_other(x): pass
"""
TURNS = "import pytest\n" + "".join(
    f"@pytest.mark.in_turn(3)\n@pytest.mark.parametrize('x', range(2))\ndef test_{number}(x): pass\n"
    for number in range(60)
)


@pytest.mark.parametrize("seed", ["2000-01-01", "2000-01-02", "x"])
def test_every_value_is_drawn_where_it_can_be(seed):
    drawn = draw_sample(TABLE, 5, seed)
    assert len(drawn) == 5
    assert frozenset().union(*(TABLE[index] for index in drawn)) == frozenset().union(*TABLE)
    assert draw_sample(TABLE, 5, seed) == drawn
    assert len(draw_sample(TABLE, 2, seed)) == 2
    assert draw_sample(TABLE, 15, seed) == draw_sample(TABLE, 99, seed) == set(range(15))
    assert draw_sample([], 3, seed) == set()


def test_each_seed_draws_its_own():
    draws = [frozenset(draw_sample(TABLE, 5, str(seed))) for seed in range(40)]
    assert len(set(draws)) > 20
    assert frozenset().union(*draws) == set(range(15))


class Collector:
    """Takes the cases that pytest collects, with the marks that it is to give them."""

    def __init__(self, seed: str, all_slow: bool, named: bool) -> None:
        self.seed, self.all_slow, self.named = seed, all_slow, named
        self.quick: list[str] = []

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        draw_samples(items, self.seed, all_slow=self.all_slow, named=self.named)
        self.quick = [item.name for item in items if not item.get_closest_marker("slow")]


def collect(path: Path, *, seed: str = "1", all_slow: bool = False, cases: str = "") -> list[str]:
    collector = Collector(seed, all_slow, bool(cases))
    markers = ("-o", "markers=sampled(n): a\nin_turn(n): b\nslow: c")
    # These plugins collect garbage, of all that the tests have imported, at the end of each run.
    plugins = [
        part for name in ("cacheprovider", "unraisableexception", "threadexception") for part in ("-p", f"no:{name}")
    ]
    options = ("--collect-only", "-qq", *plugins, "-c", "/dev/null", *markers)
    assert pytest.main([*options, f"{path}{cases}"], plugins=[collector]) == 0
    return collector.quick


@pytest.mark.in_turn(2)
def test_what_is_not_drawn_is_slow(tmp_path):
    path = tmp_path / "test_of_a_table.py"
    path.write_text(FILE, encoding="utf-8")
    quick = collect(path)
    assert [name for name in quick if "many" not in name] == [
        "test_few[0]",
        "test_few[1]",
        *(f"test_other[{x}]" for x in range(4)),
    ]
    assert sum("many" in name for name in quick) == 3
    assert collect(path) == quick
    assert len({tuple(collect(path, seed=str(seed))) for seed in range(3)}) > 1
    assert [name for name in collect(path, all_slow=True) if "other" not in name] == []
    # What is named is run, whatever the seed.
    assert [collect(path, cases=f"::test_many[{x}]") for x in (0, 8)] == [["test_many[0]"], ["test_many[8]"]]


@pytest.mark.in_turn(2)
def test_functions_take_turns(tmp_path):
    path = tmp_path / "test_of_turns.py"
    path.write_text(TURNS, encoding="utf-8")
    runs = [collect(path, seed=str(seed)) for seed in range(4)]
    for quick in runs:
        functions = {name.partition("[")[0] for name in quick}
        assert len(quick) == 2 * len(functions)  # with all its cases
        assert 10 <= len(functions) <= 32
    assert len(set(map(tuple, runs))) == 4
    assert collect(path, all_slow=True) == []
    assert len(collect(path, cases="::test_7")) == 2
