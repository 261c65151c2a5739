"""What a search found, as a table."""

from __future__ import annotations

from act_export.printing import PlainConsole, PlainTable
from act_export.search import SearchResult
from act_export.search.results import Gain

_FILE_WIDTH = 160  # where the output is no terminal


def print_search_result(result: SearchResult) -> None:
    """Prints a row for each task, on standard output: accuracies on questions that took no part in the search."""
    table = PlainTable(title="accuracy on questions that took no part in the search")
    for column in ("task", "questions", "plain", "calibrated", "heads", "gain, 95% interval", "random heads"):
        table.add_column(column, justify="left" if column == "task" else "right", overflow="fold")
    table.add_column("plain without label prior", justify="right")
    if result.joint is not None:
        table.add_column("joint set", justify="right")
    for name, report in result.reports.items():
        own = report.own
        row = [
            name,
            str(report.sizes["report"]),
            f"{report.plain_accuracy:.1%}",
            f"{own.accuracy if own is not None else report.plain_accuracy:.1%}",
            str(result.calibrations[name].num_calibrated_heads),
            _gain(own),
            ", ".join(f"{accuracy:.1%}" for accuracy in report.random_heads),
            f"{report.label_prior:.1%}" if report.label_prior is not None else "",
        ]
        table.add_row(*row, *([_gain(report.joint)] if result.joint is not None else []))
    if result.average is not None:
        plain = sum(report.plain_accuracy for report in result.reports.values()) / len(result.reports)
        average = result.average if any(c.heads for c in result.calibrations.values()) else None
        row = ["average", "", f"{plain:.1%}", f"{result.average.accuracy:.1%}", "", _gain(average), "", ""]
        table.add_section()
        joint = result.joint_average if result.joint is not None and result.joint.heads else None
        table.add_row(*row, *([_gain(joint)] if result.joint is not None else []))
    console = PlainConsole()
    if not console.is_terminal:
        console = PlainConsole(width=_FILE_WIDTH)
    console.print(table)
    for name, report in result.reports.items():
        for published, accuracy in report.published.items():
            console.say(f"{name}: {accuracy:.1%} with the published heads {published}")


def _gain(gain: Gain | None) -> str:
    """Points and their interval; where no set helped, there's none."""
    if gain is None:
        return "no set"
    low, high = gain.interval
    return f"{100 * gain.gain:+.1f}, {100 * low:+.1f} to {100 * high:+.1f}"
