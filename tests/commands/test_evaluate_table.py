from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from act_export.commands.evaluate_table import print_evaluation_report
from act_export.tasks import EncodedExample, Questions
from act_export.verify.evaluate.answers import Evaluation
from act_export.verify.evaluate.request import EvaluationRequest
from act_export.verify.evaluate.results import EvaluationReport, TaskResult, average_over

rights = st.lists(st.booleans(), min_size=3, max_size=3)


def of(correct: list[bool]) -> Evaluation:
    return Evaluation(((0.0, 0.0),) * len(correct), tuple(map(int, correct)), (1,) * len(correct))


@pytest.mark.in_turn(2)
@given(
    tasks=st.lists(
        st.tuples(st.text("ab-", min_size=1, max_size=50), rights, rights),
        min_size=1,
        max_size=3,
        unique_by=lambda task: task[0],
    ),
    width=st.integers(20, 200),
)
def test_no_name_and_no_number_is_ever_cut(tasks: list[tuple[str, list[bool], list[bool]]], width: int) -> None:
    results = tuple(
        TaskResult(name, ("q",) * 3, of(new), of(old), {"choice_bias": of(old)}) for name, old, new in tasks
    )
    request = EvaluationRequest(Path("calibrated.onnx"), Path("plain.onnx"), Questions(("sst2",)))
    text = io.StringIO()
    print_evaluation_report(
        EvaluationReport(request, results, average_over(results)), Console(file=text, width=width, highlight=False)
    )
    shown = text.getvalue()
    assert "…" not in shown
    for name, old, new in tasks:
        line = next(line for line in shown.splitlines() if line.split()[:1] == [name])
        assert f"{sum(old) / 3:.1%}" in line
        assert f"{100 * (sum(new) - sum(old)) / 3:+.1f}" in line
    assert ("\n average" in shown) == (len(tasks) > 1)


def test_tables_of_usual_tasks_fit_80_columns() -> None:
    """With the widest numbers that are usual."""
    rows = [(0.0, -9.0, -18.0)] * 1000
    choices = [EncodedExample((1,), ((1,), (2,), (3,)), index % 3, first_token=True) for index in range(1000)]
    said = [(*row, 1.0 if index % 2 else -1.0) for index, row in enumerate(rows)]
    right = [tuple(float(choice == index % 3) for choice in range(3)) for index in range(1000)]
    plain, calibrated = Evaluation.of(said, choices), Evaluation.of([(*row, 0.0) for row in right], choices)
    controls = {name: Evaluation.of(rows, choices) for name in ("label_prior", "choice_bias")}
    results = [TaskResult("arc_challenge", ("q",) * 1000, calibrated, plain, controls)] * 2
    request = EvaluationRequest(Path("calibrated.onnx"), None, Questions(("arc_challenge",)))
    text = io.StringIO()
    report = EvaluationReport(request, tuple(results), average_over(results))
    print_evaluation_report(report, Console(file=text, width=20, highlight=False))
    tables = text.getvalue().split("Below each number")[0].splitlines()
    assert max(map(len, tables)) <= 80
    lines = [line.split() for line in tables]
    assert any(line[:3] == ["invalid", "50.0%", "0.0%"] for line in lines)
    assert any(line[:4] == ["of", "valid", "33.4%", "100.0%"] for line in lines)
    assert sum(line[:2] == ["vs", "prior"] and "33.4%" in line and "+66.6" in line for line in lines) == 2
    assert sum(line[:4] == ["vs", "best", "33.4%", "100.0%"] for line in lines) == 1
    for name in ("plain", "prior off", "bias off", "calibrated"):
        assert sum(line.strip().startswith(name + " ") for line in tables) == 2
    assert "arc_challenge +66.6 (" in text.getvalue()
    assert ") over prior off, on average +66.6 (" in text.getvalue()
