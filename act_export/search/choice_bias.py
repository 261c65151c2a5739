"""A control: how much of a gain is only that the model leans less to one answer.

A model may favour an answer whatever the question. Subtracting each choice's mean log-likelihood over other questions
removes that without any calibration and without looking at a right answer (Zhou et al., "Batch Calibration", ICLR
2024). A calibration whose gain is gone after it has changed the lean, not the understanding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from act_export.tasks import EncodedExample


def without_choice_bias(
    scores: Sequence[tuple[float, ...]], others: Sequence[tuple[float, ...]]
) -> list[tuple[float, ...]]:
    """Log-likelihoods among the choices, less their mean over other questions.

    Args:
        scores: By example, log-likelihoods of the choices.
        others: The same of other examples, with the same choices.
    """
    return [tuple(row) for row in (_among_choices(scores) - _among_choices(others).mean(0)).tolist()]


def same_choices(examples: Sequence[EncodedExample]) -> bool:
    """Whether all examples have the same choices, in the same order; only then is there a bias to speak of."""
    return len({example.choices for example in examples}) == 1


def _among_choices(scores: Sequence[tuple[float, ...]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    values = np.array(scores, dtype=np.float64)
    return values - np.logaddexp.reduce(values, axis=1, keepdims=True)
