from __future__ import annotations

import io
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from act_export.commands.evaluate_table import print_evaluation_report
from act_export.tasks import Questions
from act_export.verify.evaluate.answers import Evaluation
from act_export.verify.evaluate.results import EvaluationReport, EvaluationRequest, TaskResult, average_over

rights = st.lists(st.booleans(), min_size=3, max_size=3)


def of(correct: list[bool]) -> Evaluation:
    return Evaluation(((0.0, 0.0),) * len(correct), tuple(map(int, correct)), (1,) * len(correct))


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
    results = tuple(TaskResult(name, ("q",) * 3, of(new), of(old), of(old)) for name, old, new in tasks)
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
    assert ("average" in shown) == (len(tasks) > 1)
