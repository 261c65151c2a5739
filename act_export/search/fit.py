"""Strengths of all heads, fitted by a few gradient steps on the ranking questions.

Both knobs of every head move together, by Adam on the logarithms of beta and gamma: the loss is the right answers'
negative log-likelihood, with an L2 penalty that draws strengths back to 1 and, where asked for, an L1 penalty that
leaves strengths at exactly 1 whose derivative is smaller than a share of the largest. A few steps only: the more, the
better the ranking questions are known by heart. Which step is used, and whether any, is decided on other questions,
among all other candidates.

The model that is differentiated is the definition's own (`act_export.calibration.reference`); only the set of later
sinks is taken as it is. The first step's gradient is the ranking's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from act_export.attention.call import AttentionCall, LayerState, empty_state, flatten_heads
from act_export.attention.fast_attention import (
    calibrated_probabilities,
    head_groups,
    join_past,
    map_probabilities,
    values_of,
)
from act_export.calibration.file import STRENGTHS
from act_export.checkpoint.load import Checkpoint
from act_export.journal import are_numbers
from act_export.search.answers import EncodedTask, cost_of
from act_export.search.gates import likelihood_gradient
from act_export.search.processes import Unit, Workers
from act_export.search.rank import GRADIENT_COST, compares_per_token, gradient_batches, name_of
from act_export.search.request import SearchOptions, Threshold
from act_export.tasks import EncodedExample
from act_export.tasks.remedies import Remedy, fitted_remedy

STEP_COST = GRADIENT_COST + 1  # of a batch, in forward passes: attention is computed twice
_LEARNING_RATE = 0.15  # of log strengths
_WEAKEST = 1 / 16  # beta
_ROUNDING = 1e-6  # of a logarithm in float32, so that its exponential is still in range
_LOWEST = torch.tensor([_WEAKEST, STRENGTHS["gamma"][0]], dtype=torch.float64).log().view(2, 1, 1) + _ROUNDING
_HIGHEST = torch.tensor([STRENGTHS["beta"][1], STRENGTHS["gamma"][1]]).double().log().view(2, 1, 1) - _ROUNDING


class FittedAttention:
    """An attention hook: every head calibrated with strengths that can be differentiated by."""

    def __init__(self, log_strengths: Tensor, threshold: Threshold) -> None:
        """Takes log(beta) and log(gamma) of all heads, (2, layers, heads), and what a later sink is."""
        self.log_strengths = log_strengths
        self.threshold = threshold

    def attend(self, call: AttentionCall) -> tuple[Tensor, LayerState]:
        """See `act_export.attention.call.AttentionHook`. Attention maps are computed again when going backward."""
        past = call.past if call.past is not None else empty_state(call, call.query.shape[1])
        key, value = join_past(call, past)
        outputs, sums = [], []
        for heads in head_groups(call):

            def of_group(
                query: Tensor, key: Tensor, value: Tensor, log_strengths: Tensor, heads: tuple[int, ...] = heads
            ) -> tuple[Tensor, Tensor]:
                of_query = call._replace(query=query)
                beta, gamma = log_strengths[:, list(heads)].exp()
                maps = map_probabilities(of_query, key, heads, gamma)
                calibrated = calibrated_probabilities(
                    of_query,
                    maps,
                    past.sink_scores[:, list(heads)].squeeze(-1),
                    beta=beta,
                    threshold=self.threshold.value,
                    threshold_mode=self.threshold.mode,
                )
                return calibrated.probabilities @ values_of(of_query, value, heads), calibrated.column_sums.detach()

            output, of_heads = recomputed(
                of_group,
                call.query,
                key,
                value,
                self.log_strengths[:, call.layer].to(call.query.device),
                use_reentrant=False,
            )
            outputs.append(output)
            sums.append(of_heads)
        state = LayerState(key, value, torch.cat(sums, 1).unsqueeze(-1).float())
        return flatten_heads(torch.cat(outputs, 1).to(call.query.dtype)), state


def fit_strengths(
    checkpoint: Checkpoint,
    tasks: Sequence[EncodedTask],
    slopes: Tensor,
    threshold: Threshold,
    l2: float,
    options: SearchOptions,
    workers: Workers,
    remedies: Mapping[str, Remedy] | None = None,
) -> dict[int, Tensor]:
    """Strengths after so many steps, fitted on the ranking questions of all these tasks; each task counts the same.

    Args:
        checkpoint: The model.
        tasks: At least one.
        slopes: Derivatives at beta = gamma = 1, mean over the tasks, see `act_export.search.rank.Effects`.
        threshold: What a later sink is.
        l2: How strongly strengths are drawn back to 1.
        options: `fit_steps`, `fit_l1`.
        workers: Who computes the gradients.
        remedies: As `act_export.search.rank.rank_heads`, for the plain model. From the third step on, each task's is
            the best for the strengths of the step before, as the gradient there showed.

    Returns:
        By step, of those in `options.fit_steps`: beta and gamma, float64 (2, layers, heads).

    Raises:
        ActExportError: If a score or a gradient isn't finite.
    """
    logs = torch.zeros_like(slopes, dtype=torch.float64)
    optimizer = torch.optim.Adam([logs], lr=_LEARNING_RATE)
    least = _LEARNING_RATE * options.fit_l1 * slopes.abs().max()
    found: dict[int, Tensor] = {}
    remedies = remedies or {}
    for step in range(1, max(options.fit_steps) + 1):
        gained = slopes
        if step > 1:
            gained, remedies = _gradient(checkpoint, tasks, logs, threshold, options, workers, remedies)
        logs.grad = 2 * l2 * logs - gained
        optimizer.step()
        logs.copy_(torch.clamp(logs, _LOWEST, _HIGHEST))
        if options.fit_l1:
            logs.copy_(logs.sign() * (logs.abs() - least / _scale(optimizer, logs)).clamp(min=0))
        logs.copy_(torch.round(logs, decimals=9))  # the same on processors that round otherwise
        if step in options.fit_steps:
            found[step] = logs.exp()
    return found


def _scale(optimizer: torch.optim.Adam, logs: Tensor) -> Tensor:
    """What Adam divides each derivative by."""
    state, (_, decay) = optimizer.state[logs], optimizer.param_groups[0]["betas"]
    second: Tensor = state["exp_avg_sq"] / (1 - decay ** float(state["step"]))
    return second.sqrt() + float(optimizer.param_groups[0]["eps"])


def fitting_cost(task: EncodedTask, options: SearchOptions) -> float:
    """About what fitting costs for each task, in the unit of `Unit.cost`."""
    plain = sum(cost_of(batch) for batch in gradient_batches(task, options))
    return len(options.thresholds) * len(options.fit_l2) * (max(options.fit_steps) - 1) * STEP_COST * plain


def _gradient(
    checkpoint: Checkpoint,
    tasks: Sequence[EncodedTask],
    logs: Tensor,
    threshold: Threshold,
    options: SearchOptions,
    workers: Workers,
    remedies: Mapping[str, Remedy],
) -> tuple[Tensor, dict[str, Remedy]]:
    """Mean derivative of the right answers' log-likelihood by log strengths; remedies that are best with these."""
    at = hashlib.sha256(logs.numpy().tobytes()).hexdigest()[:16]

    def compute(task: EncodedTask, batch: Sequence[EncodedExample]) -> list[float]:
        parameter = logs.to(checkpoint.model.device, torch.float32)
        found = likelihood_gradient(
            checkpoint.model,
            FittedAttention(parameter, threshold),
            parameter,
            batch,
            length_normalized=compares_per_token(task),
            checkpointed_layers=checkpoint.identity.num_layers if options.gradient_checkpointing else None,
            remedy=remedies.get(task.name),
        )
        values: list[float] = found.gradient.flatten().tolist()
        return values + [score for row in found.scores for score in row] if task.name in remedies else values

    def length(task: EncodedTask, batch: Sequence[EncodedExample]) -> int:
        return logs.numel() + (sum(len(e.choices) for e in batch) if task.name in remedies else 0)

    plan = [(task, number, batch) for task in tasks for number, batch in enumerate(gradient_batches(task, options))]
    units = [
        Unit(
            f"fit {name_of(task, threshold, remedies)} {number} {at}",
            STEP_COST * cost_of(batch),
            lambda task=task, batch=batch: compute(task, batch),  # type: ignore[misc]
            lambda value, task=task, batch=batch: are_numbers(value, length(task, batch)),  # type: ignore[misc]
        )
        for task, number, batch in plan
    ]
    total = torch.zeros_like(logs)
    scores: dict[str, list[list[float]]] = {}
    answers: dict[str, list[int]] = {}
    for (task, _, batch), values in zip(plan, workers.run("fitting strengths", units), strict=True):
        counted = len(tasks) * sum(len(batch) for batch in gradient_batches(task, options))
        total += torch.tensor(values[: logs.numel()], dtype=torch.float64).view(logs.shape) / counted
        said = iter(values[logs.numel() :])
        scores.setdefault(task.name, []).extend(list(islice(said, len(example.choices))) for example in batch)
        answers.setdefault(task.name, []).extend(example.answer for example in batch)
    better = {
        name: fitted_remedy(scores[name], answers[name], offsets=bool(remedies[name].offsets))
        for name in scores
        if name in remedies
    }
    return total, better
