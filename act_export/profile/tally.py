"""Sums over prompts, from which the statistics of a source follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from act_export.errors import ActExportError
from act_export.profile.profiling import PromptStatistics
from act_export.profile.sink_statistics import (
    ABSOLUTE,
    GRID,
    MODES,
    POSITION_EDGES,
    RELATIVE_BINS,
    Floats,
    LaterSinks,
    SinkStatistics,
    SinkTokens,
)


class Tally:
    """Running sums of one source, float64: what was added before a stop and after it gives the same to the last bit."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], num_layers: int, num_heads: int, thresholds: Mapping[str, float]
    ) -> None:
        """Begins at nothing.

        Args:
            prompts: Token ids of all prompts that will be added.
            num_layers: Attention layers of the model.
            num_heads: Query heads per layer.
            thresholds: tau for "absolute", alpha for "relative".
        """
        self.thresholds = dict(thresholds)
        self.num_heads = num_heads
        self._lengths = [len(prompt) for prompt in prompts]
        self.shared = _shared_beginning(prompts)
        self._vocabulary = torch.tensor(sorted({token for prompt in prompts for token in prompt}), dtype=torch.long)
        shape = (num_layers, num_heads)
        tokens = len(self._vocabulary)
        sums = {
            "prompts": (),
            "initial_score": shape,
            "initial_score_squared": shape,
            "entropy": shape,
            "mean_map": (*shape, GRID, GRID),
            "absolute_exposure": (len(POSITION_EDGES),),
            "relative_exposure": (RELATIVE_BINS,),
            "occurrences": (tokens,),
            "mass_squared": shape,
            "effects": shape,
            "effect_prompts": (),
        }
        for mode in MODES:
            sums |= {
                f"{mode}/initial_rate": shape,
                f"{mode}/rate": shape,
                f"{mode}/count": shape,
                f"{mode}/mass": shape,
                f"{mode}/absolute_positions": (*shape, len(POSITION_EDGES)),
                f"{mode}/relative_positions": (*shape, RELATIVE_BINS),
                f"{mode}/token_sinks": (tokens, num_layers),
                f"{mode}/token_mass": (tokens,),
                f"{mode}/token_mass_outside": (tokens,),
            }
        self.sums = {name: torch.zeros(size, dtype=torch.float64) for name, size in sums.items()}

    def add(self, ids: Sequence[int], prompt: PromptStatistics) -> None:
        """Adds one prompt.

        Args:
            ids: Its tokens.
            prompt: Their statistics.

        Raises:
            ActExportError: If they aren't finite, or the prompt isn't one that was announced.
        """
        if not (prompt.scores.isfinite().all() and prompt.entropy.isfinite().all()):
            raise ActExportError(
                f"the attention of a prompt of {len(ids)} tokens is not finite; the model's weights or their precision "
                f"are at fault, --dtype float32 may help"
            )
        tokens = len(ids)
        place = torch.searchsorted(self._vocabulary, torch.tensor(ids))
        absolute, relative = _position_bins(tokens)
        later = torch.ones(tokens, dtype=torch.float64)
        later[0] = 0  # the initial token is no later sink
        initial = prompt.scores[..., 0].double()
        self._add("prompts", torch.ones(()))
        self._add("initial_score", initial)
        self._add("initial_score_squared", initial.square())
        self._add("entropy", prompt.entropy)
        self._add("mean_map", prompt.mean_map)
        self._add("absolute_exposure", later @ absolute)
        self._add("relative_exposure", later @ relative)
        self.sums["occurrences"].index_add_(0, place, later)
        for mode, threshold in self.thresholds.items():
            tau = threshold if mode == ABSOLUTE else threshold / tokens
            sinks = (prompt.scores > tau) & (later > 0)
            marked = sinks.double()
            mass = prompt.column_sums.double() * marked / tokens
            self._add(f"{mode}/initial_rate", prompt.scores[..., 0] > tau)
            self._add(f"{mode}/rate", sinks.any(-1))
            self._add(f"{mode}/count", marked.sum(-1))
            self._add(f"{mode}/mass", mass.sum(-1))
            self._add(f"{mode}/absolute_positions", marked @ absolute)
            self._add(f"{mode}/relative_positions", marked @ relative)
            self.sums[f"{mode}/token_sinks"].index_add_(0, place, marked.sum(1).T)
            of_tokens = mass.mean((0, 1))
            self.sums[f"{mode}/token_mass"].index_add_(0, place, of_tokens)
            outside = slice(self.shared, None)
            self.sums[f"{mode}/token_mass_outside"].index_add_(0, place[outside], of_tokens[outside])
            if mode == ABSOLUTE:
                self._add("mass_squared", mass.sum(-1).square())

    def add_effects(self, gradients: Tensor, prompts: int) -> None:
        """Adds the gradients of a batch, summed over its prompts: (layers, heads)."""
        self._add("effects", gradients)
        self.sums["effect_prompts"] += prompts

    def statistics(self, name: str, texts: Mapping[int, str]) -> SinkStatistics:
        """The means.

        Args:
            name: Of the source.
            texts: What tokens stand for, by id; of all that were sinks.
        """
        return statistics_of(name, [self], texts)

    def sink_ids(self) -> list[int]:
        """Tokens that were later sinks, by any threshold."""
        counts = sum(self.sums[f"{mode}/token_sinks"].sum(1) for mode in MODES)
        assert isinstance(counts, Tensor)  # there are modes
        return [int(token) for token in self._vocabulary[counts > 0]]

    def _add(self, name: str, value: Tensor) -> None:
        self.sums[name] += value.double()


def statistics_of(name: str, tallies: Sequence[Tally], texts: Mapping[int, str]) -> SinkStatistics:
    """Means over the prompts of several sources, each prompt with the same weight.

    Args:
        name: What to call them together.
        tallies: At least one, with the same thresholds.
        texts: What tokens stand for, by id; of all that were sinks.
    """
    per_token = ("occurrences", "token_sinks", "token_mass", "token_mass_outside")
    sums = {key: _total(tally.sums[key] for tally in tallies) for key in tallies[0].sums if not key.endswith(per_token)}
    prompts = float(sums["prompts"])
    lengths = [length for tally in tallies for length in tally._lengths]

    def mean(key: str) -> Floats:
        return _floats(sums[key] / prompts)

    def deviation(key: str, squared: str) -> Floats:
        return _floats((sums[squared] / prompts - (sums[key] / prompts).square()).clamp(min=0).sqrt())

    by = {
        mode: LaterSinks(
            mode,
            threshold,
            mean(f"{mode}/initial_rate"),
            mean(f"{mode}/rate"),
            mean(f"{mode}/count"),
            mean(f"{mode}/mass"),
            mean(f"{mode}/absolute_positions"),
            mean(f"{mode}/relative_positions"),
            _tokens(tallies, mode, prompts, texts),
        )
        for mode, threshold in tallies[0].thresholds.items()
    }
    effect_prompts = int(sums["effect_prompts"])
    return SinkStatistics(
        name=name,
        prompts=int(prompts),
        tokens=sum(lengths),
        shortest=min(lengths),
        longest=max(lengths),
        shared=min(tally.shared for tally in tallies),
        initial_score=mean("initial_score"),
        initial_score_std=deviation("initial_score", "initial_score_squared"),
        mass_std=deviation(f"{ABSOLUTE}/mass", "mass_squared"),
        entropy=mean("entropy"),
        mean_map=mean("mean_map"),
        absolute_exposure=_floats(sums["absolute_exposure"]),
        relative_exposure=_floats(sums["relative_exposure"]),
        by=by,
        effects=_floats(sums["effects"] / effect_prompts) if effect_prompts else None,
        effect_prompts=effect_prompts,
    )


def _tokens(tallies: Sequence[Tally], mode: str, prompts: float, texts: Mapping[int, str]) -> SinkTokens:
    ids = torch.tensor(sorted({int(token) for tally in tallies for token in tally._vocabulary}), dtype=torch.long)
    num_layers = tallies[0].sums[f"{mode}/token_sinks"].shape[1]
    occurrences = torch.zeros(len(ids), dtype=torch.float64)
    sinks = torch.zeros(len(ids), num_layers, dtype=torch.float64)
    mass, outside = (torch.zeros(len(ids), dtype=torch.float64) for _ in range(2))
    for tally in tallies:
        place = torch.searchsorted(ids, tally._vocabulary)
        occurrences.index_add_(0, place, tally.sums["occurrences"])
        sinks.index_add_(0, place, tally.sums[f"{mode}/token_sinks"])
        mass.index_add_(0, place, tally.sums[f"{mode}/token_mass"])
        outside.index_add_(0, place, tally.sums[f"{mode}/token_mass_outside"])
    order = torch.argsort(mass, descending=True, stable=True)
    order = order[sinks[order].sum(1) > 0]
    return SinkTokens(
        ids[order].numpy(),
        tuple(texts[int(token)] for token in ids[order]),
        occurrences[order].numpy().astype(np.int64),
        sinks[order].numpy().astype(np.int64),
        _floats(mass[order] / prompts),
        _floats(outside[order] / prompts),
    )


def _shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all prompts begin with; none of one prompt alone, which has nothing to share."""
    if len(prompts) < 2:
        return 0
    first, last = min(map(tuple, prompts)), max(map(tuple, prompts))  # those between begin alike too
    return next((at for at, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), len(first))


def _position_bins(tokens: int) -> tuple[Tensor, Tensor]:
    """Which bin each position is in, absolute (tokens, bins) and relative (tokens, RELATIVE_BINS): one 1 in a row."""
    position = torch.arange(tokens)
    absolute = torch.bucketize(position, torch.tensor(POSITION_EDGES), right=True).sub(1).clamp(min=0)
    relative = (position * RELATIVE_BINS // max(tokens - 1, 1)).clamp(max=RELATIVE_BINS - 1)
    return (
        torch.nn.functional.one_hot(absolute, len(POSITION_EDGES)).double(),
        torch.nn.functional.one_hot(relative, RELATIVE_BINS).double(),
    )


def _total(tensors: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)


def _floats(tensor: Tensor) -> Floats:
    return tensor.numpy().astype(np.float32)
