"""What `act-export eval` prints: tables of the tasks and of what accuracy leaves out, or JSON with every question."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console

from act_export.commands.printing import PlainConsole, PlainTable, printable
from act_export.verify.evaluate.answers import ACCURACY, AnswerEvaluation, Comparison, Evaluation, Share, shares
from act_export.verify.evaluate.request import PLAIN
from act_export.verify.evaluate.results import (
    CHOICE_BIAS,
    LABEL_PRIOR,
    Average,
    EvaluationReport,
    TaskResult,
)
from act_export.version import __version__

FORMAT = "act-export evaluation"
FORMAT_VERSION = 2
_NAMES = {"exact_match": "exact match", "f1": "F1", "valid_accuracy": "of valid"}
_CONTROLS = {PLAIN: "plain", LABEL_PRIOR: "prior off", CHOICE_BIAS: "bias off"}
_CONTROL_NOTES = {
    LABEL_PRIOR: "Prior off: the plain model, each answer's log-likelihood less that after the same prompt with N/A "
    "for its content.",
    CHOICE_BIAS: "Bias off: the plain model, each answer's log-likelihood less its mean over the other questions.",
}
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
    tables = [_table(report)]
    if any(isinstance(result.calibrated, Evaluation) for result in report.tasks):
        tables.append(_measures_table(report))
    for table in tables:
        # A terminal that is narrower breaks the lines; numbers are never cut.
        widest = console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum
        console.width = max(console.width, widest)
        console.print(table)
    for line in _notes(report):
        console.print(printable(line), soft_wrap=True)


def _task_document(result: TaskResult) -> dict[str, Any]:
    beyond = result.beyond_controls
    return {
        "name": result.name,
        "questions": list(result.questions),
        "calibrated": _evaluation_document(result.calibrated),
        "plain": _evaluation_document(result.plain) if result.plain is not None else None,
        "comparison": {metric: asdict(found) for metric, found in result.comparisons.items()} or None,
        "controls": {
            name: {**_evaluation_document(control), "beyond": asdict(beyond[name]) if name in beyond else None}
            for name, control in result.controls.items()
        },
        "best_control": result.best_control[0] if result.best_control is not None else None,
        "beyond_best_control": asdict(result.beyond_best_control) if result.beyond_best_control is not None else None,
    }


def _evaluation_document(evaluation: Evaluation | AnswerEvaluation) -> dict[str, Any]:
    return {
        "main_metric": evaluation.main_metric,
        "metrics": {metric: {"mean": mean, "interval": each} for metric, (mean, each) in shares(evaluation).items()},
        "measures": asdict(evaluation.measures) if isinstance(evaluation, Evaluation) else None,
        **asdict(evaluation),
    }


def _compared(report: EvaluationReport) -> bool:
    return any(result.plain is not None for result in report.tasks)


def _new_table(first: str, *others: str) -> PlainTable:
    """Narrow: texts to the left in the first column, numbers to the right in the others."""
    table = PlainTable(box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in (first, *others):
        table.add_column(heading, justify="left" if heading in (first, "metric") else "right", no_wrap=True)
    return table


def _table(report: EvaluationReport) -> PlainTable:
    headings = ["plain", "calibrated", "gain, points", "p"] if _compared(report) else ["value"]
    table = _new_table("task", "metric", *headings)
    for result in report.tasks:
        plain = shares(result.plain) if result.plain is not None else {}
        calibrated = shares(result.calibrated)
        for row, metric in enumerate(dict.fromkeys([*calibrated, *plain])):
            begin = f"{result.name}\n{_questions(len(result.questions))}" if row == 0 else ""
            values = [_with_interval(calibrated.get(metric))]
            if result.plain is not None:
                comparison = result.comparisons.get(metric)
                gain = _points(comparison.gain, comparison.interval) if comparison is not None else _NOTHING
                values = [_with_interval(plain.get(metric)), *values, gain, _p(comparison)]
            table.add_row(begin, _NAMES.get(metric, metric), *values)
            if row == 0 and (beyond := _beyond_values(result)):
                table.add_row("", *beyond)
    if len(report.tasks) > 1:
        count = sum(len(result.questions) for result in report.tasks)
        table.add_section()
        average = report.average
        table.add_row(f"average\n{_questions(count)}", "mean", *_average_values(average))
        if average.best_control is not None and average.beyond_best_control_interval is not None:
            assert average.beyond_best_control is not None
            gain = _points(average.beyond_best_control, average.beyond_best_control_interval)
            own = _with_interval((average.calibrated, average.calibrated_interval))
            table.add_row("", "vs best", _percent(average.best_control), own, gain, "")
    return table


def _average_values(average: Average) -> list[str]:
    calibrated = _with_interval((average.calibrated, average.calibrated_interval))
    if average.plain is None or average.plain_interval is None or average.gain is None or average.gain_interval is None:
        return [calibrated]
    plain = _with_interval((average.plain, average.plain_interval))
    return [plain, calibrated, _points(average.gain, average.gain_interval), ""]


def _beyond_values(result: TaskResult) -> list[str]:
    """A row for what calibration gains beyond the best control; none where that is the plain model."""
    best, beyond = result.best_control, result.beyond_best_control
    if best is None or beyond is None or best[0] == PLAIN:
        return []
    name, control = best
    values = [_with_interval(shares(each).get(each.main_metric)) for each in (control, result.calibrated)]
    return [f"vs {_CONTROLS[name]}", *values, _points(beyond.gain, beyond.interval), _p(beyond)]


def _measures_table(report: EvaluationReport) -> PlainTable:
    """What accuracy leaves out, of the tasks whose answers are chosen; and the controls."""
    gains = ["calibrated gains"] if _compared(report) else []
    table = _new_table("task", "accuracy", "balanced", "AUROC", "NLL", "ECE", *gains)
    for result in report.tasks:
        if not isinstance(result.calibrated, Evaluation):
            continue
        table.add_row(result.name)
        if isinstance(result.plain, Evaluation):
            beyond = {PLAIN: result.comparisons[ACCURACY], **result.beyond_controls}
            for name, evaluation in {PLAIN: result.plain, **result.controls}.items():
                table.add_row(f"  {_CONTROLS[name]}", *_measured(evaluation), _gain(beyond[name]))
            table.add_row("  calibrated", *_measured(result.calibrated))
        else:
            table.add_row("  the file", *_measured(result.calibrated))
            for name, evaluation in result.controls.items():
                table.add_row(f"  {_CONTROLS[name]}", *_measured(evaluation))
    return table


def _measured(evaluation: Evaluation) -> list[str]:
    found = evaluation.measures
    return [
        _percent(evaluation.accuracy),
        _percent(found.balanced_accuracy),
        f"{found.auroc:.3f}" if found.auroc is not None else _NOTHING,
        f"{found.negative_log_likelihood:.3f}",
        f"{found.expected_calibration_error:.3f}",
    ]


def _questions(count: int) -> str:
    return f"{count} question{'s' if count > 1 else ''}"


def _with_interval(share: Share | None) -> str:
    if share is None:
        return _NOTHING
    mean, (low, high) = share
    return f"{_percent(mean)}\n{100 * low:.1f}-{100 * high:.1f}"


def _points(gain: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * gain:+.1f}\n{100 * low:+.1f} to {100 * high:+.1f}"


def _gain(comparison: Comparison) -> str:
    return _gained(comparison.gain, comparison.interval)


def _gained(gain: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{100 * gain:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _p(comparison: Comparison | None) -> str:
    return f"{comparison.p:.2g}" if comparison is not None and comparison.p is not None else _NOTHING


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _notes(report: EvaluationReport) -> list[str]:
    lines = ["Below each number: its 95% interval."]
    if _compared(report):
        lines[0] += " p: McNemar's, two-sided, of right answers gained and lost."
    chosen = [result.calibrated for result in report.tasks if isinstance(result.calibrated, Evaluation)]
    if any(evaluation.first_token for evaluation in chosen):
        lines.append(
            "Invalid: the first token is no choice's. Of valid: accuracy of the others. Controls always give a choice."
        )
    if chosen:
        lines.append(
            "Balanced: mean accuracy over the answers. AUROC: one answer against the rest. NLL, ECE: negative "
            "log-likelihood of the right answer and expected calibration error. All four among the choices."
        )
    controls = {name for result in report.tasks for name in result.controls}
    lines += [line for name, line in _CONTROL_NOTES.items() if name in controls]
    if chosen and _compared(report):
        lines.append(f"Vs: gain beyond what is best without calibration, in hindsight: {_beyond(report)}.")
    if report.others:
        lines.append(f"The file's default is plain; --calibration measures another: {', '.join(report.others)}.")
    if report.request.split == "all":
        lines.append("Split all: questions that heads were ranked or chosen with are counted too.")
    return lines


def _beyond(report: EvaluationReport) -> str:
    beyond = [
        f"{result.name} {_gain(result.beyond_best_control)} over {_CONTROLS[result.best_control[0]]}"
        for result in report.tasks
        if result.best_control is not None and result.beyond_best_control is not None
    ]
    average = report.average
    if len(beyond) > 1 and average.beyond_best_control is not None and average.beyond_best_control_interval is not None:
        beyond.append(f"on average {_gained(average.beyond_best_control, average.beyond_best_control_interval)}")
    return ", ".join(beyond)
