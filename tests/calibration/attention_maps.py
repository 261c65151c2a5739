"""The definition, read off the page: no vector operation, and nothing of act_export."""

from __future__ import annotations

import math

import numpy as np

MARGIN = 1e-9  # of a score around the threshold, within which being a sink is a matter of rounding


def map_by_loop(logits, *, real, window=-1, gamma=1.0, sink=None):
    """A of the last rows' logits, (sequence, total): what each key weighs, by what they and the learned sink weigh."""
    sequence, total = logits.shape
    initial = next((j for j in range(total) if real[j]), None)
    A = np.zeros((sequence, total))
    for i in range(sequence):
        row = total - sequence + i
        seen = [j for j in range(row + 1) if real[j] and (window < 0 or j > row - window)]
        weights = [math.exp(logits[i, j]) * (gamma if j == initial else 1.0) for j in seen]
        for j, weight in zip(seen, weights, strict=True):
            A[i, j] = weight / (sum(weights) + (0.0 if sink is None else math.exp(sink)))
    return A


def by_loop(A, *, beta, threshold, mode="absolute", real=None, past_sums=None, window=-1):
    """A', C, K, and how close a score comes to the threshold."""
    sequence, total = A.shape
    past = total - sequence
    real = [True] * total if real is None else list(real)
    C = [0.0] * total
    for j in range(total):
        if j < past and past_sums is not None:
            C[j] = float(past_sums[j])
        for i in range(sequence):
            if real[past + i]:
                C[j] += A[i, j]
    initial = next((j for j in range(total) if real[j]), None)
    tau = threshold if mode == "absolute" else threshold / max(1, sum(real))
    K, closest = [], math.inf
    for j in range(total):
        seeing = sum(real[i] for i in range(j, total) if window < 0 or i < j + window)
        score = C[j] / max(1, seeing)
        if real[j] and j != initial:
            closest = min(closest, abs(score - tau))
            if score > tau:
                K.append(j)
    out = A.copy()
    for i in range(sequence):
        s = sum(A[i, j] for j in K)
        n = sum(A[i, j] for j in range(total) if j not in K)
        if n <= 1e-6:
            continue
        for j in range(total):
            if (beta - 1) * s > n:
                out[i, j] = A[i, j] * (1 + n / s) if j in K else 0.0
            else:
                out[i, j] = A[i, j] * beta if j in K else A[i, j] * (1 + (1 - beta) * s / n)
    return out, np.array(C), K, closest
