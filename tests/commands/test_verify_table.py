"""What verify says: PASS or FAIL, how far off, and how much is allowed."""

from __future__ import annotations

import io
import math

import pytest

from act_export.commands.parity_table import describe_engine, parity_table
from act_export.commands.printing import PlainConsole
from act_export.verify.parity.metrics import Metrics
from act_export.verify.parity.parity_report import CaseResult, EngineReport, ParityReport


def metrics(difference: float) -> Metrics:
    return Metrics(1000, difference, difference / 10, 1.0, 1.0, 0)


def case(name: str, difference: float, tolerance: float | None) -> CaseResult:
    passed = tolerance is None or difference <= tolerance
    return CaseResult(name, metrics(difference), 3, 0, 4, 0, metrics(0.0), 0.0, True, passed, tolerance)


@pytest.mark.parametrize(
    ("cases", "said"),
    [
        ([("a", 1.7, 4.1), ("b", 0.5, 0.6)], "PASS: X within 1.7e+00 of PyTorch (6.0e-01 is allowed) in 2 cases"),
        ([("a", 1.7, 1.6)], "FAIL: X within 1.7e+00 of PyTorch (1.6e+00 is allowed) in 1 cases"),
        ([("a", 1.7, None)], "PASS: X within 1.7e+00 of PyTorch in 1 cases"),
    ],
)
def test_verdicts(cases, said):
    results = tuple(case(*each) for each in cases)
    assert describe_engine(EngineReport("X", results, all(each.passed for each in results))) == said


def test_the_table_fits_80_columns():
    results = (case("prompts in 3 chunks: as generation runs them", 1.23e-5, 1e-3), case("other", 2.0, 1e-3))
    engines = tuple(EngineReport(name, results, False) for name in ("native library", "portable functions"))
    half = EngineReport("PyTorch with int8 activations", (case("other", 0.1, None),), True)
    text = io.StringIO()
    report = ParityReport("int4 with int8 activations", metrics(math.pi), False, engines, half)
    PlainConsole(file=text, width=80).print(parity_table(report))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line.split()[-1] for line in lines if line.split()[-1:] in (["PASS"], ["FAIL"])] == [
        *("FAIL", "PASS", "FAIL", "PASS", "FAIL")
    ]
    assert any(line.split()[-7:] == ["other", "2.0e+00", "1e-03", "2.0e-01", "100.0%", "3", "FAIL"] for line in lines)
