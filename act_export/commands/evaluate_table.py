"""What `act-export eval` prints: a table of the tasks and their average, or JSON with every question."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console

from act_export.commands.printing import PlainConsole, PlainTable, printable
from act_export.verify.evaluate.answers import AnswerEvaluation, Comparison, Evaluation, metric_interval
from act_export.verify.evaluate.results import Average, EvaluationReport, TaskResult
from act_export.version import __version__

FORMAT = "act-export evaluation"
FORMAT_VERSION = 1
_NAMES = {"accuracy": "accuracy", "exact_match": "exact match", "f1": "F1"}
_ANY_WIDTH = 1000
_NOTHING = "-"


def report_json(report: EvaluationReport) -> str:
    """The whole report; the keys are those of the documentation and stay."""
    request = asdict(report.request)
    request = {name: request[name] for name in request if name not in ("file", "against", "questions")}
    request |= asdict(report.request.questions) | {"data": list(map(str, report.request.questions.data))}
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "act_export": __version__,
        "files": {
            "calibrated": str(report.request.file),
            "plain": str(report.request.against) if report.request.against is not None else None,
        },
        "request": request,
        "tasks": [_task_document(result) for result in report.tasks],
        "average": asdict(report.average),
    }
    return json.dumps(document, indent=2)


def print_evaluation_report(report: EvaluationReport, console: Console | None = None) -> None:
    """Prints a report on standard output, or on another console."""
    console = console or PlainConsole()
    table = _table(report)
    # A terminal that is narrower breaks the lines; numbers are never cut.
    console.width = max(console.width, console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum)
    console.print(table)
    for line in _notes(report):
        console.print(printable(line), soft_wrap=True)


def _task_document(result: TaskResult) -> dict[str, Any]:
    return {
        "name": result.name,
        "questions": list(result.questions),
        "calibrated": _evaluation_document(result.calibrated),
        "plain": _evaluation_document(result.plain),
        "comparison": {metric: asdict(found) for metric, found in result.comparisons.items()} or None,
        "control": _evaluation_document(result.control),
        "beyond_control": asdict(result.beyond_control) if result.beyond_control is not None else None,
    }


def _evaluation_document(evaluation: Evaluation | AnswerEvaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    metrics = {
        metric: {"mean": fmean(values), "interval": metric_interval(evaluation, metric)}
        for metric, values in evaluation.metrics.items()
    }
    return {"main_metric": evaluation.main_metric, "metrics": metrics, **asdict(evaluation)}


def _table(report: EvaluationReport) -> PlainTable:
    compared = report.request.against is not None
    controlled = any(result.control is not None for result in report.tasks)
    table = PlainTable(box=box.SIMPLE)
    for heading in ("task", "questions", "metric"):
        table.add_column(heading, justify="right" if heading == "questions" else "left", no_wrap=True)
    headings = ["plain", "calibrated", "gain, points", "p"] if compared else ["value"]
    for heading in [*headings, *(["plain, prior off"] if controlled else [])]:
        table.add_column(heading, justify="right", no_wrap=True)
    for result in report.tasks:
        for row, metric in enumerate(result.calibrated.metrics):
            begin = [result.name, str(len(result.questions))] if row == 0 else ["", ""]
            control = [_measured(result.control, metric)] if controlled else []
            table.add_row(*begin, _NAMES[metric], *_values(result, metric), *control)
    if len(report.tasks) > 1:
        average, count = report.average, sum(len(result.questions) for result in report.tasks)
        control = [_percent(average.control) if average.control is not None else _NOTHING] if controlled else []
        table.add_section()
        table.add_row("average", str(count), "mean of the tasks", *_average_values(average), *control)
    return table


def _values(result: TaskResult, metric: str) -> list[str]:
    calibrated = _measured(result.calibrated, metric)
    comparison = result.comparisons.get(metric)
    if comparison is None:
        return [calibrated]
    return [_measured(result.plain, metric), calibrated, _points(comparison.gain, comparison.interval), _p(comparison)]


def _average_values(average: Average) -> list[str]:
    calibrated = _with_interval(average.calibrated, average.calibrated_interval)
    if average.plain is None or average.plain_interval is None or average.gain is None or average.gain_interval is None:
        return [calibrated]
    plain = _with_interval(average.plain, average.plain_interval)
    return [plain, calibrated, _points(average.gain, average.gain_interval), ""]


def _measured(evaluation: Evaluation | AnswerEvaluation | None, metric: str) -> str:
    if evaluation is None or metric not in evaluation.metrics:
        return _NOTHING
    return _with_interval(fmean(evaluation.metrics[metric]), metric_interval(evaluation, metric))


def _with_interval(share: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{_percent(share)}\n{100 * low:.1f} to {100 * high:.1f}"


def _points(gain: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * gain:+.1f}\n{100 * low:+.1f} to {100 * high:+.1f}"


def _p(comparison: Comparison) -> str:
    return f"{comparison.p:.2g}" if comparison.p is not None else _NOTHING


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _notes(report: EvaluationReport) -> list[str]:
    lines = ["Below each number: its 95% interval."]
    if report.request.against is not None:
        lines[0] += " p: McNemar's, two-sided, of right answers gained and lost."
    beyond = _beyond_control(report.tasks)
    if beyond:
        lines.append(
            "Prior off: each answer's log-likelihood less that after the same prompt with N/A for its "
            f"content. Calibrated beyond that: {beyond}."
        )
    if report.request.split == "all":
        lines.append("Split all: questions that heads were ranked or chosen with are counted too.")
    return lines


def _beyond_control(results: Sequence[TaskResult]) -> str:
    beyond = {result.name: result.beyond_control for result in results if result.plain is not None}
    described = []
    for name, found in beyond.items():
        if found is not None:
            low, high = found.interval
            described.append(f"{name} {100 * found.gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
    return ", ".join(described)
