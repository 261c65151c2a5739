"""What `act-export verify` prints of a comparison with PyTorch, and exports say of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.text import Text

from act_export.commands.printing import PlainTable, printable

if TYPE_CHECKING:
    from act_export.verify.parity.metrics import Metrics
    from act_export.verify.parity.parity_report import EngineReport, ParityReport


def describe_engine(engine: EngineReport) -> str:
    """Whether an engine passed, by how much it differs, and how much is allowed."""
    allowed = "" if engine.tolerance is None else f" ({engine.tolerance:.1e} is allowed)"
    return (
        f"{_verdict(engine.passed)}: {engine.engine} within {engine.max_difference:.1e} of PyTorch{allowed} in "
        f"{len(engine.results)} cases"
    )


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def parity_table(report: ParityReport) -> PlainTable:
    """A row for each case of each engine."""
    from act_export.verify.parity.metrics import GATES

    title = Text(printable(f"parity with PyTorch, {report.precision}", lines=False), style="italic")
    table = PlainTable(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("case", "max diff", "allowed", "mean diff", "argmax", "flips", ""):
        table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")

    def add(case: str, metrics: Metrics, tolerance: float | None, flips: str, verdict: str) -> None:
        table.add_row(
            f"  {case}",
            f"{metrics.max_difference:.1e}",
            f"{tolerance:.0e}" if tolerance is not None else "",
            f"{metrics.mean_difference:.1e}",
            f"{metrics.argmax_agreement:.1%}",
            flips,
            verdict,
        )

    table.add_row("reference hook")
    add(
        "against the model's own attention",
        report.hook,
        GATES["float32"].max_difference,
        "",
        _verdict(report.hook_passed),
    )
    for engine in ([report.pytorch] if report.pytorch is not None else []) + list(report.engines):
        table.add_row(engine.engine)
        for result in engine.results:
            verdict = "" if engine is report.pytorch else _verdict(result.passed)
            add(result.case, result.metrics, result.tolerance, str(result.flips), verdict)
    return table
