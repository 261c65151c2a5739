"""ACT in plain PyTorch: the definition that every kernel, function body and export is tested against.

The method is from Yu et al., "Unveiling and Harnessing Hidden Attention Sinks" (ICML 2024, arXiv 2406.15765); padding,
batches, prompts in chunks, decode and sliding windows follow the definition below. One sequence, one calibrated head; P
tokens are already in the cache, this call brings S, T = P + S. Only real (not padding) tokens count. A is the softmax
of the logits with log(gamma) added in the initial token's column, which multiplies its weight by gamma (ZeroTuning: Han
et al., arXiv 2505.11739); with gamma = 1 it is the model's own map.

    C[j]     = sum over all real rows i >= j seen so far of A[i, j]                     running column sums
    a[j]     = C[j] / (number of real rows that can see key j)                          sink scores
    K        = { j : a[j] > tau, j is not the initial token }                           later sinks
    s[i]     = sum_{j in K} A[i, j]          n[i] = sum_{j not in K} A[i, j]
    A'[i, j] = beta * A[i, j]                                     for j in K
    A'[i, j] = A[i, j] * (1 + (1 - beta) * s[i] / n[i])           otherwise
    A'[i, :] = A[i, :]                                            where n[i] <= 1e-6

Where (beta - 1) * s[i] > n[i], row i uses beta = 1 + n[i] / s[i], so that no probability turns negative. tau is
absolute, or relative: alpha / (number of real tokens so far). Rows sum to 1, or to less where the model has learned
sink logits: one more key without a value, which takes its share of each row's softmax and isn't among the columns.
Rows of a call in which the head's beta is 1 add nothing to C, though they count among the rows that can see a key: what
a plain head costs nothing extra. beta, gamma and tau may change from call to call, and from sequence to sequence.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

THRESHOLD_MODES = ("absolute", "relative")
BETAS = (0.0, 2.0)  # lowest and highest
GAMMAS = (1 / 16, 16.0)
SMALLEST_REST = 1e-6  # n[i] at or below this leaves row i as it is


def check_range(name: str, value: float | Tensor, allowed: tuple[float, float]) -> None:
    """Raises ValueError unless all values lie between the lowest and the highest that are allowed."""
    lowest, highest = allowed
    given = torch.as_tensor(value)
    if not torch.all((given >= lowest) & (given <= highest)):
        raise ValueError(f"{name} is {value}; it must lie in [{lowest:g}, {highest:g}]")


class CalibratedProbabilities(NamedTuple):
    """What `calibrate_with_state` returns.

    Attributes:
        probabilities: A', shape (..., sequence, total).
        column_sums: C after this call, shape (..., total).
        sinks: K as a boolean mask, shape (..., total).
    """

    probabilities: Tensor
    column_sums: Tensor
    sinks: Tensor


def visible_rows(real: Tensor, sliding_window: int = -1) -> Tensor:
    """Number of real rows that can see each key.

    Args:
        real: Boolean (..., total), true for real tokens.
        sliding_window: A row sees this many keys, itself included; -1 for all.

    Returns:
        Integer (..., total). A padding key's count is meaningless; its column sum is zero.

    Raises:
        ValueError: If the window is 0.
    """
    if sliding_window == 0:
        raise ValueError("sliding_window is 0, so no row sees anything; pass a positive number, or -1 for none")
    rows_from = real.long().flip(-1).cumsum(-1).flip(-1)
    if sliding_window < 0:
        return rows_from
    return rows_from - pad(rows_from[..., sliding_window:], (0, min(sliding_window, real.shape[-1])))


def later_sinks(
    column_sums: Tensor,
    real: Tensor,
    *,
    threshold: float | Tensor,
    threshold_mode: str = "absolute",
    sliding_window: int = -1,
) -> Tensor:
    """The set K: keys whose sink score exceeds the threshold, without the initial token.

    Args:
        column_sums: C, shape (..., total).
        real: Boolean, broadcastable to (..., total).
        threshold: tau, or alpha where the mode is "relative"; a tensor broadcasts to (..., 1).
        threshold_mode: "absolute", or "relative" (tau = alpha / number of real tokens).
        sliding_window: As in `visible_rows`.

    Returns:
        Boolean (..., total).

    Raises:
        ValueError: If the threshold is negative or the mode unknown.
    """
    margins = sink_margins(
        column_sums, real, threshold=threshold, threshold_mode=threshold_mode, sliding_window=sliding_window
    )
    return (margins > 0) & real & ~initial_tokens(real)


def sink_margins(
    column_sums: Tensor,
    real: Tensor,
    *,
    threshold: float | Tensor,
    threshold_mode: str = "absolute",
    sliding_window: int = -1,
) -> Tensor:
    """a - tau, shape (..., total): how far each key's sink score lies above the threshold; else as `later_sinks`."""
    if not torch.all(torch.as_tensor(threshold) >= 0):
        raise ValueError(f"threshold is {threshold}; it must not be negative")
    if threshold_mode not in THRESHOLD_MODES:
        raise ValueError(f"threshold_mode is {threshold_mode!r}; it must be one of {', '.join(THRESHOLD_MODES)}")
    scores = column_sums / visible_rows(real, sliding_window).clamp(min=1)
    if threshold_mode == "relative":
        return scores - threshold / real.sum(-1, keepdim=True).clamp(min=1)
    return scores - threshold


def move_sink_mass(probabilities: Tensor, sinks: Tensor, beta: float | Tensor) -> Tensor:
    """A' from A and K: scales the later sinks by beta and gives what they lose to the row's other keys in proportion.

    Args:
        probabilities: A, shape (..., sequence, total). A row may sum to less than one; its sum is kept.
        sinks: K, boolean (..., total).
        beta: In [0, 2]; a float, or a tensor that broadcasts to (..., 1, 1).

    Returns:
        A', same shape and type as `probabilities`.
    """
    in_sinks = sinks.unsqueeze(-2)
    s = probabilities.masked_fill(~in_sinks, 0).sum(-1, keepdim=True)
    n = probabilities.masked_fill(in_sinks, 0).sum(-1, keepdim=True)
    has_rest = n > SMALLEST_REST
    n_safe = torch.where(has_rest, n, torch.ones_like(n))
    clamped = (beta - 1) * s > n
    s_safe = torch.where(clamped, s, torch.ones_like(s))
    on_sinks = torch.where(clamped, 1 + n / s_safe, torch.ones_like(s) * beta)
    on_rest = torch.where(clamped, torch.zeros_like(s), 1 + (1 - beta) * s / n_safe)
    moved = probabilities * torch.where(in_sinks, on_sinks, on_rest)
    return torch.where(has_rest, moved, probabilities)


def calibrate_with_state(
    probabilities: Tensor,
    *,
    beta: float | Tensor,
    threshold: float | Tensor,
    threshold_mode: str = "absolute",
    real: Tensor | None = None,
    past_column_sums: Tensor | None = None,
    sliding_window: int = -1,
) -> CalibratedProbabilities:
    """Calibrates attention maps and returns the running column sums with them.

    Args:
        probabilities: A, shape (..., sequence, total): the last `sequence` of `total` positions are this call's rows.
        beta: In [0, 2]; a float, or a tensor that broadcasts to (..., 1, 1).
        threshold: tau, or alpha where the mode is "relative"; a tensor broadcasts to (..., 1).
        threshold_mode: "absolute" or "relative".
        real: Boolean, broadcastable to (..., total), true for real tokens; None for all.
        past_column_sums: C before this call, shape (..., total - sequence); None for zeros.
        sliding_window: Number of keys a row sees, itself included; -1 for all.

    Returns:
        A', C and K.

    Raises:
        ValueError: For shapes that don't fit, beta outside [0, 2], a negative threshold or an unknown mode.
    """
    sequence, total = probabilities.shape[-2:]
    past = total - sequence
    if past < 0:
        raise ValueError(f"probabilities have {sequence} rows but only {total} columns; each row needs its own column")
    check_range("beta", beta, BETAS)
    if real is None:
        real = torch.ones(total, dtype=torch.bool, device=probabilities.device)
    if real.shape[-1] != total:
        raise ValueError(f"real has length {real.shape[-1]}; the probabilities have {total} columns")
    if past_column_sums is not None and past_column_sums.shape[-1] != past:
        raise ValueError(f"past_column_sums has length {past_column_sums.shape[-1]}; {past} columns came before")
    real_rows = real[..., past:].unsqueeze(-1)
    column_sums = probabilities.masked_fill(~real_rows, 0).sum(-2)
    if past_column_sums is not None:
        column_sums = torch.cat([column_sums[..., :past] + past_column_sums, column_sums[..., past:]], -1)
    sinks = later_sinks(
        column_sums, real, threshold=threshold, threshold_mode=threshold_mode, sliding_window=sliding_window
    )
    return CalibratedProbabilities(move_sink_mass(probabilities, sinks, beta), column_sums, sinks)


def calibrate_one_at_a_time(
    probabilities: Tensor,
    *,
    beta: float | Tensor,
    threshold: float | Tensor,
    threshold_mode: str = "absolute",
    real: Tensor,
    past_column_sums: Tensor,
    sliding_window: int = -1,
) -> CalibratedProbabilities:
    """What `calibrate_with_state` gives when each row comes in a call of its own, computed for all rows at once.

    Row i is then calibrated with the statistics of the rows up to i, so every row has later sinks of its own. Arguments
    and errors as in `calibrate_with_state`.

    Returns:
        A' and C as there, and K by row: boolean (..., sequence, total).
    """
    sequence, total = probabilities.shape[-2:]
    past = total - sequence
    columns = torch.arange(total, device=probabilities.device)
    rows = columns[past:, None]
    own_sums = probabilities.masked_fill(~real[..., past:].unsqueeze(-1), 0).cumsum(-2)
    column_sums = own_sums + pad(past_column_sums, (0, sequence)).unsqueeze(-2)
    seen = real.unsqueeze(-2) & (columns <= rows)
    if isinstance(threshold, Tensor):
        threshold = threshold.unsqueeze(-1)
    sinks = later_sinks(
        column_sums, seen, threshold=threshold, threshold_mode=threshold_mode, sliding_window=sliding_window
    )
    by_row = beta.unsqueeze(-1) if isinstance(beta, Tensor) else beta
    moved = move_sink_mass(probabilities.unsqueeze(-2), sinks, by_row).squeeze(-2)
    return CalibratedProbabilities(moved, column_sums[..., -1, :], sinks)


def calibrate_probabilities(
    probabilities: Tensor,
    *,
    beta: float | Tensor,
    threshold: float | Tensor,
    threshold_mode: str = "absolute",
    real: Tensor | None = None,
    past_column_sums: Tensor | None = None,
    sliding_window: int = -1,
) -> Tensor:
    """A' for attention maps A of shape (..., sequence, total); arguments and errors as in `calibrate_with_state`."""
    return calibrate_with_state(
        probabilities,
        beta=beta,
        threshold=threshold,
        threshold_mode=threshold_mode,
        real=real,
        past_column_sums=past_column_sums,
        sliding_window=sliding_window,
    ).probabilities


def initial_tokens(real: Tensor) -> Tensor:
    """Which token is the first real one: boolean, of the shape of `real` (..., total)."""
    return real & (real.long().cumsum(-1) == 1)
