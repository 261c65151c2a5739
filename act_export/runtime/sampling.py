"""Which token comes next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError, shown

_LOWEST_TEMPERATURE = 1e-4  # below, the most likely token is all there is, and logits divided by it overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from this many most likely tokens; 0 for all.
        top_p: Draw from the smallest set of tokens that holds this much probability.
        seed: Of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ActExportError for a value out of range."""
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ActExportError(f"temperature is {self.temperature}; it must not be negative (0 is greedy)")
        if 0 < self.temperature < _LOWEST_TEMPERATURE:
            raise ActExportError(
                f"temperature is {self.temperature}; give 0 (greedy), or at least {_LOWEST_TEMPERATURE}"
            )
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise ActExportError(f"top_k is {self.top_k}; it must be a whole number, not negative (0 is all)")
        if not 0 < self.top_p <= 1:
            raise ActExportError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not _is_whole(self.seed) or self.seed < 0:
            raise ActExportError(f"seed is {self.seed}; it must be a whole number, not negative")


def left_pad(prompts: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and mask, both (batch, longest), of prompts of any lengths.

    Raises:
        ActExportError: If there is no prompt, an empty one, or one with something that is no whole number.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ActExportError("the list of prompts is empty, or one of them has no token; give at least one token each")
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad_token, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = _checked_ids(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _checked_ids(prompt: Sequence[int]) -> NDArray[np.integer[Any]]:
    found = np.asarray(prompt)
    whole = found.ndim == 1 and found.dtype.kind in "iu"
    # Of a list with whole numbers too, numpy makes whole numbers of booleans.
    wrong: list[Any] = []
    if not whole or isinstance(prompt, list | tuple):
        wrong = [token for token in prompt if not _is_whole(token)]
    if wrong or not whole:
        raise ActExportError(f"a prompt has {shown(wrong[0] if wrong else prompt)} in it; token ids are whole numbers")
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and abs(int(value)) < 2**63


def next_tokens(logits: NDArray[np.float32], sampling: Sampling, random: np.random.Generator) -> NDArray[np.int64]:
    """Draws one token per row of logits (batch, vocabulary)."""
    if sampling.temperature == 0:
        return np.asarray(logits.argmax(-1), np.int64)
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    ranked = np.take_along_axis(scaled, order, -1)
    probabilities = np.exp(ranked - ranked[:, :1])
    if sampling.top_k:
        probabilities[:, sampling.top_k :] = 0
    probabilities /= probabilities.sum(-1, keepdims=True)
    before = probabilities.cumsum(-1) - probabilities
    probabilities[before >= sampling.top_p] = 0
    probabilities /= probabilities.sum(-1, keepdims=True)
    picks = [random.choice(len(row), p=row) for row in probabilities]
    return np.asarray(order[np.arange(len(picks)), picks], np.int64)
