"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, replace

from act_export.runtime.node_placement import NodePlacement
from act_export.verify.parity.metrics import Metrics


@dataclass(frozen=True)
class CaseResult:
    """One case of one engine.

    Attributes:
        case: Its name.
        metrics: Over the sequences in which no sink flipped.
        flips: Number of (sequence, head, key) whose being a sink differs from the reference by rounding.
        wrong_sinks: Number of those that differ by more than rounding.
        sequences: Number of sequences.
        flipped_sequences: Number of those with a flip.
        flipped_metrics: Over the sequences with a flip; reported, not gated.
        score_difference: Largest difference of a sink score, up to a sequence's first flip.
        greedy_identical: Whether the most likely token agreed at every decode step; None without decode steps, or where
            a sink flipped in every sequence.
        passed: Whether the gate holds for the sequences without a flip, and no sink is wrong; in a half type also
            whether no sink score differs by more than rounding.
        tolerance: Largest difference of a logit that the gate lets pass; None where that has no limit.
    """

    case: str
    metrics: Metrics
    flips: int
    wrong_sinks: int
    sequences: int
    flipped_sequences: int
    flipped_metrics: Metrics
    score_difference: float
    greedy_identical: bool | None
    passed: bool
    tolerance: float | None = None


@dataclass(frozen=True)
class EngineReport:
    """All cases of one engine against PyTorch with the reference.

    Attributes:
        engine: How the file was run.
        results: One per case.
        passed: Whether every case passed, and sinks flipped in few enough sequences.
    """

    engine: str
    results: tuple[CaseResult, ...]
    passed: bool

    @property
    def flipped(self) -> float:
        """Fraction of sequences, over all cases, in which a sink flipped."""
        return sum(r.flipped_sequences for r in self.results) / sum(r.sequences for r in self.results)

    @property
    def max_difference(self) -> float:
        """Largest difference of a logit over all cases."""
        return max(result.metrics.max_difference for result in self.results)

    @property
    def tolerance(self) -> float | None:
        """Largest difference that is let pass in the case that comes nearest to it; None where none has a limit."""
        limited = [(result.metrics.max_difference / r, r) for result in self.results if (r := result.tolerance)]
        return max(limited)[1] if limited else None

    @property
    def of_all_cases(self) -> Metrics:
        """Largest difference of all cases, and mean over all positions; the other figures of the largest case."""
        metrics = [result.metrics for result in self.results]
        positions = max(sum(each.positions for each in metrics), 1)
        return replace(
            max(metrics, key=lambda each: each.positions),
            max_difference=self.max_difference,
            mean_difference=sum(each.mean_difference * each.positions for each in metrics) / positions,
        )

    @property
    def greedy_identical(self) -> bool:
        """Whether decode steps were compared, and every token was the same."""
        compared = [result.greedy_identical for result in self.results if result.greedy_identical is not None]
        return bool(compared) and all(compared)


@dataclass(frozen=True)
class ParityReport:
    """The report of a verification.

    Attributes:
        precision: Which row of `GATES` was applied.
        pytorch: PyTorch that rounds activations to the same type, which sets the limits; None where none are rounded.
        remark: What the comparison leaves out; empty if nothing.
        hook: The reference hook without calibration against the model's own attention, padded batch.
        hook_passed: Whether that holds.
        engines: One report per way of running the file.
        placement: Where the nodes run, with the native library, on a GPU; None on the CPU.
    """

    precision: str
    hook: Metrics
    hook_passed: bool
    engines: tuple[EngineReport, ...]
    pytorch: EngineReport | None = None
    remark: str = ""
    placement: NodePlacement | None = None

    @property
    def runs_on_device(self) -> bool:
        """Whether no attention node fell back to the CPU."""
        return self.placement is None or self.placement.attention_on_device

    @property
    def passed(self) -> bool:
        """Whether everything passed."""
        return self.hook_passed and self.runs_on_device and all(engine.passed for engine in self.engines)

    def error_ratio(self, engine: EngineReport) -> float | None:
        """Mean error of an engine's logits, by that of PyTorch that rounds to the same type; None where none does."""
        if self.pytorch is None:
            return None
        names = {result.case for result in self.pytorch.results}
        ours = replace(engine, results=tuple(result for result in engine.results if result.case in names))
        return ours.of_all_cases.mean_difference / max(self.pytorch.of_all_cases.mean_difference, 1e-30)
