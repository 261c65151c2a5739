"""Statistics of attention sinks: by layer, head, position and token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

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
        mass_outside: Of that, what went to occurrences outside the tokens that all prompts of a source begin with (n,).
    """

    ids: Counts
    texts: tuple[str, ...]
    occurrences: Counts
    sinks: Counts
    mass: Floats
    mass_outside: Floats


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
        shared: Tokens that all prompts begin with; of several sources, the fewest that those of one do. What leads
            there as a sink may lead because every prompt has it.
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
    shared: int
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
