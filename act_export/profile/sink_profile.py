"""The sink profile: where a model's attention sinks are, by layer, head, position and token."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import Calibration, ModelIdentity
from act_export.errors import ActExportError

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]

ABSOLUTE, RELATIVE = "absolute", "relative"
MODES = (ABSOLUTE, RELATIVE)
ALL = "all"
"""Name of the statistics over every source."""

GRID = 32
"""Rows and columns of a mean attention map."""

POSITION_EDGES = (*range(1, 9), *(base << shift for shift in range(19) for base in (12, 16)))
"""Bin b of absolute positions holds POSITION_EDGES[b] to POSITION_EDGES[b + 1] - 1; the last has no end."""

RELATIVE_BINS = 20
"""Bin b of relative positions holds those whose share of the way, position / (tokens - 1), lies from b to b + 1
twentieths; the last token is in the last bin."""


class ProfileError(ActExportError):
    """A profile that is malformed, or prompts that can't be profiled."""


@dataclass(frozen=True, eq=False)
class SinkTokens:
    """Tokens that were later sinks, those with the most attention first; n of them.

    Attributes:
        ids: Token ids (n,).
        texts: What each stands for, n of them.
        occurrences: How often each came in the prompts, initial tokens not counted (n,).
        sinks: How often a head of a layer had each as a later sink (n, layers); of an occurrence at most num_heads
            times in a layer.
        mass: Share of all attention that went to each as a later sink, mean over prompts, layers and heads (n,). They
            sum to the mean of `LaterSinks.mass`.
    """

    ids: Counts
    texts: tuple[str, ...]
    occurrences: Counts
    sinks: Counts
    mass: Floats


@dataclass(frozen=True, eq=False)
class LaterSinks:
    """Sinks by one threshold. Arrays are means over the prompts, (layers, heads) unless said otherwise.

    Attributes:
        mode: "absolute" or "relative".
        threshold: tau, or alpha where the mode is relative: tau = alpha / tokens of the prompt.
        initial_rate: Share of prompts whose initial token is a sink, in [0, 1].
        rate: Share of prompts with at least one later sink, in [0, 1].
        count: Number of later sinks.
        mass: Share of all attention that goes to later sinks, in [0, 1].
        absolute_positions: Number of later sinks by position (layers, heads, bins of `POSITION_EDGES`).
        relative_positions: Number of later sinks by share of the way (layers, heads, RELATIVE_BINS).
        tokens: Which tokens they are.
    """

    mode: str
    threshold: float
    initial_rate: Floats
    rate: Floats
    count: Floats
    mass: Floats
    absolute_positions: Floats
    relative_positions: Floats
    tokens: SinkTokens


@dataclass(frozen=True, eq=False, repr=False)
class SinkStatistics:
    """The sinks of one source of prompts. Arrays are means over the prompts, (layers, heads) unless said otherwise.

    Attributes:
        name: The source: a task's name, a file's, or `ALL`.
        prompts: Number of prompts.
        tokens: Number of their tokens.
        shortest: Tokens of the shortest prompt.
        longest: Tokens of the longest.
        initial_score: Sink score of the initial token, in [0, 1].
        initial_score_std: Its standard deviation over the prompts.
        mass_std: Standard deviation of the later sinks' mass (absolute threshold) over the prompts.
        entropy: Of a row of the attention map, mean over the rows, in nats.
        mean_map: Mean attention map (layers, heads, GRID, GRID): rows are queries, columns keys, both by share of the
            way through the prompt. A row is the mean over its queries of the attention that goes to each column's
            keys, so it sums to 1. Tokens on a border count in proportion.
        absolute_exposure: Number of tokens by position, initial token not counted (bins of `POSITION_EDGES`,).
        relative_exposure: Number of tokens by share of the way, initial token not counted (RELATIVE_BINS,).
        by: Later sinks by threshold mode, "absolute" and "relative".
        effects: What calibrating each head alone would change in the log-likelihood of the right answer, to first
            order (see `act_export.search.gates`); None where it wasn't measured.
        effect_prompts: Number of prompts that `effects` is the mean over.
    """

    name: str
    prompts: int
    tokens: int
    shortest: int
    longest: int
    initial_score: Floats
    initial_score_std: Floats
    mass_std: Floats
    entropy: Floats
    mean_map: Floats
    absolute_exposure: Floats
    relative_exposure: Floats
    by: Mapping[str, LaterSinks]
    effects: Floats | None = None
    effect_prompts: int = 0

    def __repr__(self) -> str:
        """What it is of, without the arrays."""
        return f"<SinkStatistics of {self.name}: {self.prompts} prompts, {self.tokens} tokens>"


@dataclass(frozen=True, eq=False)
class ExamplePrompt:
    """One prompt, token by token.

    Attributes:
        source: Name of the statistics it belongs to.
        ids: Token ids (tokens,).
        texts: What each token stands for.
        scores: Sink scores without calibration (layers, heads, tokens).
        calibrated_scores: With the profile's calibration; None where there is none.
    """

    source: str
    ids: Counts
    texts: tuple[str, ...]
    scores: Floats
    calibrated_scores: Floats | None = None


@dataclass(frozen=True, eq=False, repr=False)
class SinkProfile:
    """Where a model's attention sinks are.

    Attributes:
        model: The model it belongs to.
        model_name: As it was asked for.
        overall: Statistics over the prompts of all sources, each prompt with the same weight.
        sources: Statistics by source, in the order they were asked for.
        examples: One prompt of each source, with its sink scores.
        calibration: The one that the examples were also run with; None for none.
        options: How it was made: strings and numbers by name.
        versions: Of the packages that took part.
    """

    model: ModelIdentity
    model_name: str
    overall: SinkStatistics
    sources: Mapping[str, SinkStatistics]
    examples: tuple[ExamplePrompt, ...] = ()
    calibration: Calibration | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        """What it is of, without the arrays."""
        size = f"{self.model.num_layers} layers of {self.model.num_heads} heads"
        return f"<SinkProfile of {self.model_name}, {size}: {', '.join(self.sources)}>"

    def __getitem__(self, source: str) -> SinkStatistics:
        """Statistics of one source, or of `ALL`.

        Raises:
            ProfileError: If there is no such source, with those there are.
        """
        if source == ALL:
            return self.overall
        if source not in self.sources:
            raise ProfileError(f"the profile has no source {source!r}; it has {', '.join((*self.sources, ALL))}")
        return self.sources[source]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes PATH (safetensors), and a JSON file of the same name beside it; see `profile_file`.

        Raises:
            ProfileError: If the name doesn't end with .safetensors, or the files can't be written.
        """
        from act_export.profile.profile_file import save_profile

        save_profile(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SinkProfile:
        """Reads and checks a profile.

        Raises:
            ProfileError: If a file is missing or isn't a profile's, naming what doesn't fit.
        """
        from act_export.profile.profile_file import load_profile

        return load_profile(path)


def unreachable(profile: SinkProfile) -> list[str]:
    """Thresholds that no sink score of some prompts can exceed, since none is above 1: a line for each."""
    lines = []
    for mode, sinks in profile.overall.by.items():
        shortest = profile.overall.shortest
        tau = sinks.threshold if mode == ABSOLUTE else sinks.threshold / shortest
        if tau >= 1:
            of = f"{sinks.threshold:g}" if mode == ABSOLUTE else f"{sinks.threshold:g} / {shortest} tokens"
            lines.append(
                f"the {mode} threshold is {of} for the shortest prompt; no sink score is above 1, so there are none"
            )
    return lines
