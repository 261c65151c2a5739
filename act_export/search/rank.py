"""What calibrating each head alone would gain: the order in which heads are considered."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from act_export.checkpoint import Checkpoint
from act_export.search.answers import RANK, EncodedTask, cost_of
from act_export.search.exhaustive import PlainRun
from act_export.search.gates import gate_gradients
from act_export.search.processes import Unit, Workers
from act_export.search.request import SearchOptions, Threshold
from act_export.tasks import EncodedExample, batches

GRADIENT_COST = 3  # of a batch, in forward passes: the backward pass computes twice what the forward pass does


@dataclass(frozen=True)
class Effects:
    """Effect of calibrating each head alone.

    Attributes:
        log_likelihood: By beta, float64 (layers, heads): mean gain in the right answer's log-likelihood. From gates it
            is the first-order estimate. -inf where "gates+confirm" didn't measure the head.
        correct: By beta, int64 (layers, heads): right answers gained less lost; empty from gates.
        passes: Forward passes of one prompt that it took; a backward pass counts as two.
    """

    log_likelihood: Mapping[float, Tensor]
    correct: Mapping[float, Tensor]
    passes: float


def rank_heads(
    checkpoint: Checkpoint, task: EncodedTask, threshold: Threshold, options: SearchOptions, workers: Workers
) -> Effects:
    """Effects of all heads on a task's ranking split, by the method of the options.

    Raises:
        ScoringError: If a score or a gradient isn't finite.
        UnsupportedModelError: If the method needs the model's decoder layers and can't find them.
    """
    if options.method == "exhaustive":
        return _exact(checkpoint, task, threshold, options, workers, dict.fromkeys(options.betas))
    estimated = _by_gates(checkpoint, task, threshold, options, workers)
    if options.method == "gates":
        return estimated
    wanted = {beta: first_heads(effect, options.confirm) for beta, effect in estimated.log_likelihood.items()}
    exact = _exact(checkpoint, task, threshold, options, workers, wanted)
    return Effects(exact.log_likelihood, exact.correct, estimated.passes + exact.passes)


def first_heads(effect: Tensor, count: int) -> list[tuple[int, int]]:
    """The heads (layer, head) with the largest positive effects, the largest first.

    Args:
        effect: (layers, heads).
        count: How many at the most.
    """
    order = torch.argsort(effect.flatten(), descending=True, stable=True)[: min(count, int((effect > 0).sum()))]
    return [divmod(index, effect.shape[1]) for index in order.tolist()]


def ranking_cost(task: EncodedTask, options: SearchOptions, num_layers: int, num_heads: int) -> float:
    """About what ranking costs, in the unit of `Unit.cost`."""
    plain = sum(cost_of(batch) for batch in _batches(task, options))
    gates = 0 if options.method == "exhaustive" else GRADIENT_COST * plain
    every = num_layers * num_heads
    heads = {"gates": 0, "exhaustive": every, "gates+confirm": min(options.confirm, every)}[options.method]
    return len(options.thresholds) * (gates + len(options.betas) * heads * plain / 2)


def _batches(task: EncodedTask, options: SearchOptions) -> list[list[EncodedExample]]:
    examples = task.splits[RANK]
    return [[examples[index] for index in indices] for indices in batches(examples, None, options.batch_tokens)]


def _by_gates(
    checkpoint: Checkpoint, task: EncodedTask, threshold: Threshold, options: SearchOptions, workers: Workers
) -> Effects:
    shape = (checkpoint.identity.num_layers, checkpoint.identity.num_heads)

    def compute(batch: Sequence[EncodedExample]) -> list[float]:
        gradient = gate_gradients(
            checkpoint.model,
            batch,
            num_layers=shape[0],
            num_heads=shape[1],
            beta=0.0,  # the gradient is proportional to 1 - beta: one pass for all
            threshold=threshold.value,
            threshold_mode=threshold.mode,
            length_normalized=task.task.length_normalized,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        values: list[float] = gradient.flatten().tolist()
        return values

    units = [
        Unit(
            f"gates {task.task.name} {threshold.mode} {threshold.value} {number}",
            GRADIENT_COST * cost_of(batch),
            lambda batch=batch: compute(batch),  # type: ignore[misc]
        )
        for number, batch in enumerate(_batches(task, options))
    ]
    count = len(task.splits[RANK])
    total = torch.tensor(workers.run(f"ranking heads on {task.task.name}", units), dtype=torch.float64).sum(0)
    erased = total.view(shape) / count
    return Effects({beta: (1 - beta) * erased for beta in options.betas}, {}, GRADIENT_COST * count)


def _exact(
    checkpoint: Checkpoint,
    task: EncodedTask,
    threshold: Threshold,
    options: SearchOptions,
    workers: Workers,
    wanted: Mapping[float, Collection[tuple[int, int]] | None],
) -> Effects:
    """Effects of switching on each of the heads wanted for each beta (None for all)."""
    num_layers, num_heads = checkpoint.identity.num_layers, checkpoint.identity.num_heads
    parts = _batches(task, options)

    @lru_cache(maxsize=1)  # units of one batch come one after the other
    def plain_run(number: int) -> PlainRun:
        return PlainRun(
            checkpoint.model,
            parts[number],
            num_layers=num_layers,
            num_heads=num_heads,
            threshold=threshold,
            length_normalized=task.task.length_normalized,
        )

    def compute(number: int, beta: float, layer: int, heads: list[int]) -> list[list[float]]:
        effects = plain_run(number).effects(layer, heads, beta=beta, batch_tokens=options.batch_tokens)
        return [list(effects.log_likelihood), list(effects.correct), [effects.passes]]

    plan = [
        (beta, number, layer, heads)
        for number in range(len(parts))
        for beta, chosen in wanted.items()
        for layer in range(num_layers)
        if (heads := [h for h in range(num_heads) if chosen is None or (layer, h) in set(chosen)])
    ]
    units = [
        Unit(
            f"exact {task.task.name} {threshold.mode} {threshold.value} {beta} {number} {layer} {heads}",
            cost_of(parts[number]) * len(heads) * (num_layers - layer) / num_layers,
            lambda number=number, beta=beta, layer=layer, heads=heads: compute(  # type: ignore[misc]
                number, beta, layer, heads
            ),
        )
        for beta, number, layer, heads in plan
    ]
    count = len(task.splits[RANK])
    gained = {beta: torch.full((num_layers, num_heads), float("-inf"), dtype=torch.float64) for beta in wanted}
    correct = {beta: torch.zeros(num_layers, num_heads, dtype=torch.int64) for beta in wanted}
    passes = float(count)  # the plain model's, once for all betas
    results = workers.run(f"measuring heads on {task.task.name}", units)
    for (beta, _, layer, heads), (log_likelihood, right, took) in zip(plan, results, strict=True):
        for head in heads:
            before = gained[beta][layer, head]
            gained[beta][layer, head] = log_likelihood[head] + (0 if before == float("-inf") else before)
        correct[beta][layer] += torch.tensor(right, dtype=torch.int64)
        passes += took[0]
    return Effects({beta: total / count for beta, total in gained.items()}, correct, passes)
