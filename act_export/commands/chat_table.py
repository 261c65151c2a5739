"""What `act-export eval --chat-file` prints: a table of figures for each calibration and a verdict, or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.text import Text

from act_export.calibration.strengths import PLAIN
from act_export.commands.printing import PlainConsole, PlainTable, printable
from act_export.verify.evaluate.chat.figures import Change, ChatComparison, Figure
from act_export.verify.evaluate.chat.job import ChatReport
from act_export.version import __version__

FORMAT = "act-export chat evaluation"
FORMAT_VERSION = 1
_ANY_WIDTH = 1000
_TITLE_WIDTH = 16


def chat_json(report: ChatReport) -> str:
    """The whole report; the keys are those of the documentation and stay."""
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "act_export": __version__,
        "request": asdict(report.request),
        "questions": len(report.questions),
        "turns": sum(len(question.turns) for question in report.questions),
        "comparisons": [_comparison(each) for each in report.comparisons],
        "answers": [_answers(report, index) for index in range(len(report.questions))],
        "files": list(map(str, report.files)),
    }
    return json.dumps(document, indent=2, default=str)  # paths


def print_chat_report(report: ChatReport, console: Console | None = None) -> None:
    """Prints a report on standard output, or on another console."""
    console = console or PlainConsole()
    turns = sum(len(question.turns) for question in report.questions)
    console.print(f"{len(report.questions)} questions, {turns} turns", soft_wrap=True)
    for comparison in report.comparisons:
        table = _table(comparison)
        # A terminal that is narrower breaks the lines; numbers are never cut.
        table.width = console.measure(table, options=console.options.update(width=_ANY_WIDTH)).maximum
        console.width = max(console.width, table.width)
        console.print(table)
    console.print(
        "Below each difference: its 95% interval. p: how often luck alone would make it this much worse.",
        soft_wrap=True,
    )
    for comparison in report.comparisons:
        differing = f"{comparison.differing} of {comparison.answers} answers differ"
        console.print(printable(f"{comparison.calibration}: {differing}; {comparison.verdict}."), soft_wrap=True)
    if report.request.out is not None:
        console.print(printable(f"{len(report.files)} files in {report.request.out}"), soft_wrap=True)


def _comparison(comparison: ChatComparison) -> dict[str, Any]:
    figures = {
        change.figure.name: {name: value for name, value in asdict(change).items() if name != "figure"}
        for change in comparison.changes
    }
    return {
        "calibration": comparison.calibration,
        "answers": comparison.answers,
        "differing": comparison.differing,
        "figures": figures,
        "worse": [change.figure.name for change in comparison.worse],
        "verdict": comparison.verdict,
    }


def _answers(report: ChatReport, index: int) -> dict[str, Any]:
    question = report.questions[index]
    return {
        "question_id": question.id,
        "category": question.category,
        "models": {
            name: [
                {
                    "text": turn.text,
                    "tokens": len(turn.tokens),
                    "at_limit": not turn.ended,
                    "log_likelihood": turn.log_likelihood,
                }
                for turn in answers[index].turns
            ]
            for name, answers in report.answers.items()
        },
    }


def _table(comparison: ChatComparison) -> PlainTable:
    title = Text(printable(f"plain and {comparison.calibration}", lines=False), style="italic")
    table = PlainTable(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("figure", max_width=_TITLE_WIDTH)  # on two lines, as its difference is
    for heading in ("questions", PLAIN, "calibrated", "difference", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    for change in comparison.changes:
        table.add_row(*_row(change))
    return table


def _row(change: Change) -> list[str]:
    low, high = change.interval
    figure = change.figure
    difference = f"{_signed(figure, change.difference)}\n{_signed(figure, low)} to {_signed(figure, high)}"
    p = f"{change.p:.2g}" if change.p is not None else "-"
    values = [_value(figure, value) for value in (change.plain, change.calibrated)]
    return [figure.title, str(change.questions), *values, difference, p]


def _value(figure: Figure, value: float) -> str:
    return f"{value:.1%}" if figure.share else f"{value:.{_decimals(value)}f}"


def _signed(figure: Figure, value: float) -> str:
    return f"{100 * value:+.1f}" if figure.share else f"{value:+.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    return 1 if abs(value) >= 10 else 3
