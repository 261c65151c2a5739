"""What changing each head alone would gain: the order in which heads are considered."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from act_export.checkpoint.load import Checkpoint
from act_export.journal import are_numbers
from act_export.search.answers import RANK, EncodedTask, cost_of
from act_export.search.exhaustive import PlainRun
from act_export.search.gates import gate_gradients
from act_export.search.processes import Unit, Workers
from act_export.search.request import SearchOptions, Threshold
from act_export.tasks import EncodedExample
from act_export.tasks.batching import Batching, batches
from act_export.tasks.remedies import Remedy

GRADIENT_COST = 3  # of a batch, in forward passes: the backward pass computes twice what the forward pass does

GRADIENT_TOKENS = 256  # that run together: all layers' activations of these are in memory

Heads = Sequence[tuple[int, int]]
"""(layer, head) pairs."""


@dataclass(frozen=True)
class Effects:
    """Effect of calibrating each head alone.

    Attributes:
        log_likelihood: By beta, float64 (layers, heads): mean gain in the right answer's log-likelihood. By gradient it
            is the first-order estimate. -inf where the head wasn't measured.
        correct: By beta, int64 (layers, heads): right answers gained less lost, the paper's criterion; none from the
            gradient.
        passes: Forward passes of one prompt that it took; a backward pass counts as two.
        slopes: Derivatives of the mean log-likelihood by beta and by log(gamma), at 1 and 0: float64 (2, layers,
            heads). None where no backward pass was taken.
    """

    log_likelihood: Mapping[float, Tensor]
    correct: Mapping[float, Tensor]
    passes: float
    slopes: Tensor | None = None


@dataclass(frozen=True)
class Ranking:
    """Effects of heads, by threshold.

    Attributes:
        own: By task and threshold.
        joint: By threshold, for all tasks together; their mean.
    """

    own: tuple[tuple[Effects, ...], ...]
    joint: tuple[Effects, ...]


def rank_heads(
    checkpoint: Checkpoint,
    tasks: Sequence[EncodedTask],
    options: SearchOptions,
    workers: Workers,
    *,
    joint: bool = False,
    remedies: Mapping[str, Remedy] | None = None,
) -> Ranking:
    """Effects of all heads on the tasks' ranking splits, by the ranking and the methods of the options.

    Args:
        checkpoint: The model.
        tasks: At least one.
        options: Methods, ranking, betas, thresholds.
        workers: Who does it.
        joint: The ranking for all tasks together will be used: "gradient+confirm" measures its first heads too.
        remedies: By task, as `act_export.search.gates.log_likelihoods`; None for effects on accuracy as it is.

    Raises:
        ActExportError: If a score or a gradient isn't finite; if the method needs the model's decoder layers and can't
            find them.
    """
    remedies = remedies or {}
    estimated = _by_gates(checkpoint, tasks, options, workers, remedies) if _takes_gradients(options) else None
    if estimated is not None and (options.ranking == "gradient" or "act" not in options.methods):
        return Ranking(estimated, _together(estimated))
    first: list[list[Mapping[float, Heads] | None]] = [[None] * len(options.thresholds)] * len(tasks)
    if estimated is not None and options.ranking == "gradient+confirm":
        first = [[_first(effects, options.confirm) for effects in of_task] for of_task in estimated]
    own = _with_slopes(_exact(checkpoint, tasks, options, workers, remedies, first), estimated)
    if not joint:
        return Ranking(own, ())
    if estimated is None or options.ranking == "exhaustive":
        return Ranking(own, _together(own))
    shared = [_first(effects, options.confirm) for effects in _together(estimated)]
    exact = _exact(checkpoint, tasks, options, workers, remedies, [shared] * len(tasks))
    return Ranking(own, _together(_with_slopes(exact, estimated)))


def first_heads(effect: Tensor, count: int) -> list[tuple[int, int]]:
    """The heads (layer, head) with the largest positive effects, the largest first.

    Args:
        effect: (layers, heads).
        count: How many at the most.
    """
    order = torch.argsort(effect.flatten(), descending=True, stable=True)[: min(count, int((effect > 0).sum()))]
    return [divmod(index, effect.shape[1]) for index in order.tolist()]


def _takes_gradients(options: SearchOptions) -> bool:
    return options.ranking != "exhaustive" or options.methods != ("act",)


def _with_slopes(
    exact: tuple[tuple[Effects, ...], ...], estimated: tuple[tuple[Effects, ...], ...] | None
) -> tuple[tuple[Effects, ...], ...]:
    """Measured effects, with the slopes of the estimate before them and what both took."""
    if estimated is None:
        return exact
    return tuple(
        tuple(
            replace(after, passes=b.passes + after.passes, slopes=b.slopes) for b, after in zip(*of_task, strict=True)
        )
        for of_task in zip(estimated, exact, strict=True)
    )


def ranking_cost(task: EncodedTask, options: SearchOptions, num_layers: int, num_heads: int) -> float:
    """About what ranking costs, in the unit of `Unit.cost`."""
    plain = sum(cost_of(batch) for batch in gradient_batches(task, options))
    gates = GRADIENT_COST * plain if _takes_gradients(options) else 0
    heads = {
        "gradient": 0,
        "exhaustive": num_layers * num_heads,
        "gradient+confirm": min(options.confirm, num_layers * num_heads),
    }[options.ranking if "act" in options.methods else "gradient"]
    return len(options.thresholds) * (gates + len(options.betas) * heads * plain / 2)


def _first(effects: Effects, count: int) -> dict[float, Heads]:
    return {beta: first_heads(effect, count) for beta, effect in effects.log_likelihood.items()}


def _together(own: Sequence[Sequence[Effects]]) -> tuple[Effects, ...]:
    """Mean over the tasks, by threshold."""
    return tuple(
        Effects(
            {
                beta: torch.stack([effects.log_likelihood[beta] for effects in of_tasks]).mean(0)
                for beta in of_tasks[0].log_likelihood
            },
            {},
            sum(effects.passes for effects in of_tasks),
            _mean_slopes(of_tasks),
        )
        for of_tasks in zip(*own, strict=True)
    )


def _mean_slopes(of_tasks: Sequence[Effects]) -> Tensor | None:
    slopes = [effects.slopes for effects in of_tasks if effects.slopes is not None]
    return torch.stack(slopes).mean(0) if slopes else None


def ranking_batches(task: EncodedTask, tokens: int) -> list[list[EncodedExample]]:
    """The ranking split's examples, as they run together: so many tokens at the most."""
    examples = task.splits[RANK]
    return [[examples[index] for index in indices] for indices in batches(examples, Batching(None, tokens))]


def gradient_batches(task: EncodedTask, options: SearchOptions) -> list[list[EncodedExample]]:
    """The ranking split's examples, as they run together where activations are kept for a backward pass."""
    return ranking_batches(task, min(options.batch_tokens, GRADIENT_TOKENS))


def compares_per_token(task: EncodedTask) -> bool:
    """A generated answer's likelihood is taken per token, so that it counts as much as that of a choice."""
    return task.task.length_normalized or task.task.generation is not None


def name_of(task: EncodedTask, threshold: Threshold, remedies: Mapping[str, Remedy]) -> str:
    """What a journal's keys call them."""
    name = f"{task.name} {threshold.mode} {threshold.value}"
    if task.name not in remedies:
        return name
    numbers = [round(number, 6) for number in (remedies[task.name].sharpness, *remedies[task.name].offsets)]
    return f"{name} remedy {hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]}"


def _by_gates(
    checkpoint: Checkpoint,
    tasks: Sequence[EncodedTask],
    options: SearchOptions,
    workers: Workers,
    remedies: Mapping[str, Remedy],
) -> tuple[tuple[Effects, ...], ...]:
    """By task and threshold."""
    shape = (checkpoint.identity.num_layers, checkpoint.identity.num_heads)

    def compute(task: EncodedTask, threshold: Threshold, batch: Sequence[EncodedExample]) -> list[float]:
        gradient = gate_gradients(
            checkpoint.model,
            batch,
            num_layers=shape[0],
            num_heads=shape[1],
            beta=0.0,  # the gradient is proportional to 1 - beta: one pass for all
            threshold=threshold.value,
            threshold_mode=threshold.mode,
            length_normalized=compares_per_token(task),
            gradient_checkpointing=options.gradient_checkpointing,
            remedy=remedies.get(task.name),
        )
        values: list[float] = gradient.flatten().tolist()
        return values

    plan = [
        (task, threshold, number, batch)
        for task in tasks
        for threshold in options.thresholds
        for number, batch in enumerate(gradient_batches(task, options))
    ]
    units = [
        Unit(
            f"gates {name_of(task, threshold, remedies)} {number}",
            GRADIENT_COST * cost_of(batch),
            lambda task=task, threshold=threshold, batch=batch: compute(task, threshold, batch),  # type: ignore[misc]
            lambda value: are_numbers(value, 2 * shape[0] * shape[1]),
        )
        for task, threshold, number, batch in plan
    ]
    totals: dict[str, Tensor] = {}
    for (task, threshold, _, _), values in zip(plan, workers.run("ranking heads", units), strict=True):
        gradient = torch.tensor(values, dtype=torch.float64).view(2, *shape)
        name = name_of(task, threshold, remedies)
        totals[name] = totals[name] + gradient if name in totals else gradient

    def effects(task: EncodedTask, threshold: Threshold) -> Effects:
        count = len(task.splits[RANK])
        erased, log_gamma = totals[name_of(task, threshold, remedies)] / count
        slopes = torch.stack([-erased, log_gamma])  # an open gate takes beta from 1 to 0
        return Effects({beta: (1 - beta) * erased for beta in options.betas}, {}, GRADIENT_COST * count, slopes)

    return tuple(tuple(effects(task, threshold) for threshold in options.thresholds) for task in tasks)


class _PlainRuns:
    """The plain model on a batch: kept for the units that follow, which are mostly of the same batch."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.kept: tuple[str, PlainRun] | None = None

    def get(self, key: str, batch: Sequence[EncodedExample], threshold: Threshold, per_token: bool) -> PlainRun:
        if self.kept is not None and self.kept[0] == key:
            return self.kept[1]
        self.kept = None  # before the next one takes its memory
        run = PlainRun(
            self.checkpoint.model,
            batch,
            num_layers=self.checkpoint.identity.num_layers,
            num_heads=self.checkpoint.identity.num_heads,
            threshold=threshold,
            length_normalized=per_token,
        )
        self.kept = (key, run)
        return run


def _exact(
    checkpoint: Checkpoint,
    tasks: Sequence[EncodedTask],
    options: SearchOptions,
    workers: Workers,
    remedies: Mapping[str, Remedy],
    wanted: Sequence[Sequence[Mapping[float, Heads] | None]],
) -> tuple[tuple[Effects, ...], ...]:
    """Effects, by task and threshold, of switching on each head that is wanted there for a beta (None for all)."""
    num_layers, num_heads = checkpoint.identity.num_layers, checkpoint.identity.num_heads
    runs = _PlainRuns(checkpoint)
    units: list[Unit] = []
    plan: list[tuple[int, int, float, int, list[int]]] = []
    for t, task in enumerate(tasks):
        for k, threshold in enumerate(options.thresholds):
            chosen = wanted[t][k]
            for number, batch in enumerate(ranking_batches(task, options.batch_tokens)):
                for beta in options.betas:
                    for layer in range(num_layers):
                        heads = [h for h in range(num_heads) if chosen is None or (layer, h) in chosen[beta]]
                        if heads:
                            plan.append((t, k, beta, layer, heads))
                            units.append(
                                _exact_unit(runs, task, threshold, number, batch, beta, layer, heads, options, remedies)
                            )
    shape = (num_layers, num_heads)
    gained = {key: torch.full(shape, float("-inf"), dtype=torch.float64) for key in {p[:3] for p in plan}}
    correct = {key: torch.zeros(shape, dtype=torch.int64) for key in gained}
    passes = {(t, k): float(len(task.splits[RANK])) for t, task in enumerate(tasks) for k in range(len(wanted[t]))}
    for (t, k, beta, layer, heads), result in zip(plan, workers.run("measuring heads", units), strict=True):
        log_likelihood, right, took = result
        total = gained[t, k, beta]
        for head in heads:
            before = float(total[layer, head])
            total[layer, head] = log_likelihood[head] + (0 if before == float("-inf") else before)
        correct[t, k, beta][layer] += torch.tensor(right, dtype=torch.int64)
        passes[t, k] += took[0]

    def effects(t: int, k: int) -> Effects:
        nothing = torch.full(shape, float("-inf"), dtype=torch.float64)
        count = len(tasks[t].splits[RANK])
        return Effects(
            {beta: gained.get((t, k, beta), nothing) / count for beta in options.betas},
            {beta: correct[t, k, beta] for beta in options.betas if (t, k, beta) in correct},
            passes[t, k],
        )

    return tuple(tuple(effects(t, k) for k in range(len(options.thresholds))) for t in range(len(tasks)))


def _exact_unit(
    runs: _PlainRuns,
    task: EncodedTask,
    threshold: Threshold,
    number: int,
    batch: Sequence[EncodedExample],
    beta: float,
    layer: int,
    heads: list[int],
    options: SearchOptions,
    remedies: Mapping[str, Remedy],
) -> Unit:
    name = name_of(task, threshold, remedies)

    def compute() -> list[list[float]]:
        plain = runs.get(f"{name} {number}", batch, threshold, compares_per_token(task))
        effects = plain.effects(
            layer, heads, beta=beta, batch_tokens=options.batch_tokens, remedy=remedies.get(task.name)
        )
        return [list(effects.log_likelihood), list(effects.correct), [effects.passes]]

    num_layers = runs.checkpoint.identity.num_layers
    share = (num_layers - layer) / num_layers
    key = f"exact {name} {beta} {number} {layer} {heads}"
    num_heads = runs.checkpoint.identity.num_heads
    return Unit(key, cost_of(batch) * len(heads) * share, compute, lambda value: _are_effects(value, num_heads))


def _are_effects(value: Any, num_heads: int) -> bool:
    """Whether a journal's value has gains and right answers by head, and passes."""
    if not isinstance(value, list) or not all(map(are_numbers, value, (num_heads, num_heads, 1))):
        return False
    return len(value) == 3 and all(isinstance(right, int) for right in value[1])
