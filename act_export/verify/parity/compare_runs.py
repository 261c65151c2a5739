"""Two runs of a case, an engine's and PyTorch's: their sinks first, then the logits where those are the same."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from act_export.verify.parity.metrics import Gate, Metrics, compare_parts, differences
from act_export.verify.parity.parity_report import CaseResult
from act_export.verify.parity.recording import Step

Run = tuple[Sequence[Step], Sequence[Step]]  # an engine's calls, and those of what it is compared with
_BLOCK = 64  # positions


@dataclass(frozen=True)
class _Flips:
    """Where sinks differ between the two sides of a run.

    Attributes:
        counts: (calls, batch), number of (head, key).
        wrong: Number of those that rounding doesn't explain.
        score_difference: Largest difference of a sink score, up to a sequence's first flip.
    """

    counts: NDArray[np.int64]
    wrong: int
    score_difference: float

    @classmethod
    def of(cls, run: Run, gate: Gate) -> _Flips:
        """Compares call by call, layer by layer.

        In a half type, what follows a flip in its sequence isn't judged: a flip moves later layers by more than
        rounding.
        """
        ours, theirs = run
        counts = np.zeros((len(theirs), len(theirs[0].real)), np.int64)
        wrong, score_difference = 0, 0.0
        flipped = torch.zeros(counts.shape[1], dtype=torch.bool)
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            for layer, sinks in sorted(other.sinks.items()):
                differs = mine.sinks[layer] != sinks
                by_rounding = (mine.margins[layer].abs() <= gate.score_rounding) & (
                    other.margins[layer].abs() <= gate.score_rounding
                )
                clean = ~flipped
                judged = clean if gate.error_ratio is not None else torch.ones_like(flipped)
                wrong += int((differs & ~by_rounding)[judged].sum())
                distances = differences(mine.margins[layer][clean].numpy(), other.margins[layer][clean].numpy())
                score_difference = max(score_difference, float(distances.max(initial=0)))
                counts[index] += differs.sum((1, 2)).numpy()
                flipped |= differs.any(2).any(1)
        return cls(counts, wrong, score_difference)


def compare_runs(name: str, runs: Sequence[Run], gate: Gate, decode_steps: int = 0) -> CaseResult:
    """Judges runs, each of a batch of its own, together.

    Args:
        name: Of the case.
        runs: An engine's calls, and those of what it is compared with.
        gate: What is allowed.
        decode_steps: How many of the calls are of single tokens; 0 judges no greedy tokens.
    """
    flips = [_Flips.of(run, gate) for run in runs]
    tainted = [np.maximum.accumulate(found.counts > 0, axis=0) for found in flips]

    def metrics(of_tainted: bool) -> Metrics:
        return compare_parts(
            part
            for (ours, theirs), rows_by_step in zip(runs, tainted, strict=True)
            for mine, other, rows in zip(ours, theirs, rows_by_step, strict=True)
            for row in np.flatnonzero(rows == of_tainted).tolist()
            for part in _parts(mine, other, row)
        )

    clean = metrics(of_tainted=False)
    greedy = None
    if decode_steps and not all(rows.all() for rows in tainted):
        greedy = all(
            (mine.logits[~rows, -1].argmax(-1) == other.logits[~rows, -1].argmax(-1)).all()
            for (ours, theirs), rows_by_step in zip(runs, tainted, strict=True)
            for mine, other, rows in zip(ours, theirs, rows_by_step, strict=True)
        )
    exact_tokens = greedy is not False or gate.argmax_agreement < 1
    wrong = sum(found.wrong for found in flips)
    score_difference = max(found.score_difference for found in flips)
    scores_fit = gate.error_ratio is None or score_difference <= gate.score_rounding
    return CaseResult(
        case=name,
        metrics=clean,
        flips=sum(int(found.counts.sum()) for found in flips) - wrong,
        wrong_sinks=wrong,
        sequences=sum(rows.shape[1] for rows in tainted),
        flipped_sequences=sum(int(rows[-1].sum()) for rows in tainted),
        flipped_metrics=metrics(of_tainted=True),
        score_difference=score_difference,
        greedy_identical=greedy,
        passed=clean.passes(gate) and exact_tokens and not wrong and scores_fit,
        tolerance=gate.max_difference if math.isfinite(gate.max_difference) else None,
    )


def _parts(mine: Step, other: Step, row: int) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Logits of a sequence's real tokens, some positions at a time."""
    positions = np.flatnonzero(other.real[row])
    for start in range(0, len(positions), _BLOCK):
        picked = positions[start : start + _BLOCK]
        yield mine.logits[row, picked], other.logits[row, picked]
