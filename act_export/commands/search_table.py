"""What a search found, as a table and lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from act_export.commands.printing import PlainConsole, PlainTable

if TYPE_CHECKING:
    from act_export.search import SearchResult
    from act_export.search.results import Gain, TaskReport


def print_search_result(result: SearchResult) -> None:
    """Prints a row for each task, on standard output: accuracies on questions that took no part in the search."""
    table = PlainTable(title="accuracy on questions that took no part in the search, gains with 95% intervals")
    for column in ("task", "plain", "best control", "calibrated", "gain beyond it", "gain over plain"):
        table.add_column(column, justify="left" if column == "task" else "right", overflow="fold")
    for name, report in result.reports.items():
        accuracy = report.own.accuracy if report.own is not None else report.plain_accuracy
        table.add_row(
            name,
            f"{report.plain_accuracy:.1%}",
            f"{report.controls[report.control]:.1%}",
            f"{accuracy:.1%}",
            _gain(report.beyond),
            _gain(report.own),
        )
    if result.average is not None:
        table.add_section()
        found = any(calibration.heads for calibration in result.calibrations.values())
        table.add_row("average", *_average(result, result.average, result.average_beyond, found=found))
        if result.joint is not None:
            gains = result.joint_average, result.joint_beyond
            table.add_row("with one set", *_average(result, *gains, found=bool(result.joint.heads)))
    console = PlainConsole()
    console.print(table)
    remedied = {"average": result.average_with_remedy, "with one set": result.joint_with_remedy}
    for name, gain in remedied.items():
        if gain is not None:
            console.say(f"{name}: with each task's best control on both models {gain.points}")
    for name, report in result.reports.items():
        for line in _details(name, report):
            console.say(line)


def _average(result: SearchResult, gain: Gain | None, beyond: Gain | None, *, found: bool) -> list[str]:
    reports = result.reports.values()
    plain, control = (
        sum(values) / len(reports)
        for values in ([r.plain_accuracy for r in reports], [r.controls[r.control] for r in reports])
    )
    accuracy = gain.accuracy if found and gain is not None else plain
    gains = [_gain(each if found else None) for each in (beyond, gain)]
    return [f"{plain:.1%}", f"{control:.1%}", f"{accuracy:.1%}", *gains]


def _details(name: str, report: TaskReport) -> Iterator[str]:
    """What a sceptic asks for, a line each."""
    sizes = report.sizes
    yield f"{name}: {sizes['rank']} questions to rank and fit with, {sizes['choose']} to choose, {sizes['report']} here"
    controls = ", ".join(f"{accuracy:.1%} {control}" for control, accuracy in report.controls.items())
    yield f"{name}: controls of the plain model: {controls}"
    if report.beyond is not None and report.beyond.interval[0] <= 0:
        yield f"{name}: that calibration alone gains more than the best control, {report.control}, isn't shown"
    if report.with_remedy is not None and report.control != "plain":
        accuracy, points = report.with_remedy.accuracy, report.with_remedy.points
        yield f"{name}: calibrated and with {report.control} {accuracy:.1%}: {points} beyond {report.control} alone"
    if report.measures is not None:
        plain, own = report.measures
        for label, of, form in (
            ("balanced accuracy", "balanced_accuracy", ".1%"),
            ("AUROC", "auroc", ".3f"),
            ("negative log-likelihood", "negative_log_likelihood", ".3f"),
            ("expected calibration error", "expected_calibration_error", ".3f"),
        ):
            before, after = getattr(plain, of), getattr(own, of) if own is not None else None
            if before is not None:
                yield f"{name}: {label} {before:{form}}" + (f" -> {after:{form}}" if after is not None else "")
    if report.invalid is not None:
        for label, invalid in zip(("plain", "calibrated"), report.invalid, strict=True):
            if invalid is not None:
                valid = "none" if invalid.accuracy is None else f"{invalid.accuracy:.1%}"
                yield f"{name}: {label}: {invalid.share:.1%} invalid answers; accuracy of the valid ones {valid}"
    if report.random_heads:
        yield f"{name}: with as many random heads {', '.join(f'{a:.1%}' for a in report.random_heads)}"
    for published, accuracy in report.published.items():
        yield f"{name}: {accuracy:.1%} with the published heads {published}"


def _gain(gain: Gain | None) -> str:
    """Points, and below them their 95% interval; where no set helped, there's none."""
    if gain is None:
        return "no set"
    low, high = gain.interval
    return f"{100 * gain.gain:+.1f}\n{100 * low:+.1f} to {100 * high:+.1f}"
