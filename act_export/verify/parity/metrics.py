"""How two sets of logits differ: all metrics, always."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

_TOP = 10
_BLOCK = 64  # positions
_NEAR_TIE = 10  # mean differences


@dataclass(frozen=True)
class Gate:
    """What a precision must reach, against PyTorch in float32.

    Attributes:
        max_difference: Largest difference of a logit.
        argmax_agreement: Least fraction of positions with the same most likely token, near ties left out.
        score_rounding: A sink score this close to the threshold may fall on either side; any other difference in what
            is a sink is an error. In a half type no score may differ by more, near the threshold or not.
        flipped_sequences: Largest fraction of sequences, over all cases, in which a sink flipped.
        error_ratio: Largest ratio of an error to that of PyTorch that rounds to the same type; None where nothing is
            rounded. What that does to a model can't be told beforehand, so it is measured: `relative_to` fills in the
            limits.
        largest_error_ratio: The same for the largest difference, which is that of a single logit.
        mean_difference: Largest mean difference of the logits.
    """

    max_difference: float
    argmax_agreement: float
    score_rounding: float
    flipped_sequences: float
    error_ratio: float | None = None
    largest_error_ratio: float | None = None
    mean_difference: float = math.inf

    def relative_to(
        self, errors: Sequence[Metrics], *, score_difference: float = 0.0, flipped_sequences: float = 0.0
    ) -> Gate:
        """The gate with limits by what PyTorch in the same type does.

        Args:
            errors: Of PyTorch in that type; the largest counts.
            score_difference: Its largest difference of a sink score.
            flipped_sequences: Fraction of sequences in which a sink of its flipped.
        """
        if self.error_ratio is None or self.largest_error_ratio is None:
            return self
        return replace(
            self,
            max_difference=self.largest_error_ratio * max(error.max_difference for error in errors),
            mean_difference=self.error_ratio * max(error.mean_difference for error in errors),
            score_rounding=max(self.score_rounding, self.error_ratio * score_difference),
            flipped_sequences=max(self.flipped_sequences, self.error_ratio * flipped_sequences),
        )


_HALF = Gate(
    max_difference=math.inf,
    argmax_agreement=0.98,
    score_rounding=2e-3,
    flipped_sequences=0.5,
    error_ratio=2.0,
    largest_error_ratio=4.0,
)
_DEQUANTIZED = Gate(max_difference=2e-2, argmax_agreement=0.99, score_rounding=1e-4, flipped_sequences=0.1)
_INT8_ACTIVATIONS = replace(_HALF, argmax_agreement=0.95, score_rounding=1.6e-2)  # 7 bits, as bfloat16 has
GATES = {
    "float32": Gate(max_difference=1e-3, argmax_agreement=1.0, score_rounding=2e-5, flipped_sequences=0.1),
    "float16": _HALF,
    "bfloat16": replace(_HALF, argmax_agreement=0.95, score_rounding=1.6e-2),
    # Against PyTorch with the same dequantized weights.
    "int8": _DEQUANTIZED,
    "int4": _DEQUANTIZED,
    "int8 with int8 activations": _INT8_ACTIVATIONS,
    "int4 with int8 activations": _INT8_ACTIVATIONS,
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
        near_ties: Positions whose two best reference logits lie closer together than ten times the mean difference.
    """

    positions: int
    max_difference: float
    mean_difference: float
    argmax_agreement: float
    top10_agreement: float
    near_ties: int

    def passes(self, gate: Gate) -> bool:
        """Whether the gate's limits on logits hold."""
        return (
            self.max_difference <= gate.max_difference
            and self.mean_difference <= gate.mean_difference
            and self.argmax_agreement >= gate.argmax_agreement
        )


def compare_logits(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> Metrics:
    """Compares logits of shape (positions, vocabulary).

    Where both are the same infinity, as of a token that a bias rules out, or both are NaN, they agree; where one alone
    is, the difference is infinite.
    """
    return compare_parts([(logits, reference)])


def compare_parts(parts: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Metrics:
    """As `compare_logits`, of logits and reference that come in parts; no more than a part is held in memory."""
    largest, total, size, overlap = 0.0, 0.0, 0, 0.0
    margins: list[NDArray[np.float32]] = []
    same: list[NDArray[np.bool_]] = []
    for ours, theirs in _blocks(parts):
        difference = differences(ours, theirs)
        ours, theirs = np.nan_to_num(ours), np.nan_to_num(theirs)  # to be ranked
        largest = max(largest, float(difference.max()))
        total += float(difference.sum(dtype=np.float64))
        size += difference.size
        best, our_best = _top(theirs), _top(ours)
        overlap += sum(len(np.intersect1d(a, b)) / best.shape[-1] for a, b in zip(best, our_best, strict=True))
        ranked = np.sort(np.take_along_axis(theirs, best, -1), -1)
        margins.append(ranked[:, -1] - ranked[:, -2] if ranked.shape[-1] > 1 else np.full(len(ranked), np.inf))
        same.append(ours.argmax(-1) == theirs.argmax(-1))
    if not size:
        return Metrics(0, 0.0, 0.0, 1.0, 1.0, 0)
    mean = total / size
    near_tie = np.concatenate(margins) < _NEAR_TIE * mean
    clear = np.concatenate(same)[~near_tie]
    return Metrics(
        positions=len(near_tie),
        max_difference=largest,
        mean_difference=mean,
        argmax_agreement=float(clear.mean()) if len(clear) else 1.0,
        top10_agreement=overlap / len(near_tie),
        near_ties=int(near_tie.sum()),
    )


def differences(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float32]:
    """Absolute differences: 0 where both are the same infinity or both are NaN, infinite where one alone is."""
    with np.errstate(invalid="ignore", over="ignore"):
        found: NDArray[np.float32] = np.abs(ours - theirs)
    odd = ~np.isfinite(found)
    if odd.any():
        same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
        found[odd] = np.where(same[odd], np.float32(0), np.float32(np.inf))
    return found


def _blocks(
    parts: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]],
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """The parts, cut where they are long: a large vocabulary makes whole copies expensive."""
    for ours, theirs in parts:
        for start in range(0, len(theirs), _BLOCK):
            yield ours[start : start + _BLOCK], theirs[start : start + _BLOCK]


def _top(logits: NDArray[np.float32]) -> NDArray[np.intp]:
    count = min(_TOP, logits.shape[-1])
    return np.argpartition(logits, -count, -1)[:, -count:]
