"""How two sets of logits differ: all metrics, always."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_TOP = 10


@dataclass(frozen=True)
class Gate:
    """What a precision must reach.

    Attributes:
        max_difference: Largest difference of a logit.
        argmax_agreement: Least fraction of positions with the same most likely token, near ties left out.
        flipped_rows: Largest fraction of sequences in which a sink flipped.
    """

    max_difference: float
    argmax_agreement: float
    flipped_rows: float


GATES = {
    "float32": Gate(max_difference=1e-3, argmax_agreement=1.0, flipped_rows=0.1),
    "float16": Gate(max_difference=1e-1, argmax_agreement=0.98, flipped_rows=0.5),
    "bfloat16": Gate(max_difference=1.0, argmax_agreement=0.95, flipped_rows=0.5),
}


@dataclass(frozen=True)
class Metrics:
    """Agreement of logits over some positions.

    Attributes:
        positions: Number of positions compared.
        max_difference: Largest absolute difference of a logit.
        mean_difference: Mean absolute difference.
        argmax_agreement: Fraction of positions with the same most likely token, near ties left out.
        top10_agreement: Mean overlap of the ten most likely tokens.
        near_ties: Positions whose two best reference logits lie closer together than twice the largest difference.
    """

    positions: int
    max_difference: float
    mean_difference: float
    argmax_agreement: float
    top10_agreement: float
    near_ties: int

    def passes(self, gate: Gate) -> bool:
        """Whether the gate's two limits on logits hold."""
        return self.max_difference <= gate.max_difference and self.argmax_agreement >= gate.argmax_agreement


def compare_logits(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> Metrics:
    """Compares logits of shape (positions, vocabulary); NaN counts as an infinite difference."""
    if not len(reference):
        return Metrics(0, 0.0, 0.0, 1.0, 1.0, 0)
    difference = np.abs(logits.astype(np.float64) - reference)
    difference[np.isnan(difference)] = np.inf
    top = min(_TOP, reference.shape[-1])
    best = np.argpartition(-reference, top - 1, -1)[:, :top]
    ours = np.argpartition(-np.nan_to_num(logits), top - 1, -1)[:, :top]
    overlap = np.mean([len(np.intersect1d(a, b)) / top for a, b in zip(best, ours, strict=True)])
    ranked = np.sort(reference, -1)
    near_tie = (ranked[:, -1] - ranked[:, -2]) < 2 * difference.max() if reference.shape[-1] > 1 else np.array([False])
    same = logits.argmax(-1) == reference.argmax(-1)
    agreement = float(same[~near_tie].mean()) if (~near_tie).any() else 1.0
    return Metrics(
        len(reference), float(difference.max()), float(difference.mean()), agreement, float(overlap), int(near_tie.sum())
    )
