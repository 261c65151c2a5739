"""Profiles drawn at random: plausible, of any shape, and without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import DEFAULT_THRESHOLD, Calibration, ModelIdentity
from act_export.profile.answer_pair import AnswerPair, AnswerPairs
from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import (
    ALL,
    GRID,
    MODES,
    POSITION_EDGES,
    RELATIVE_BINS,
    ExamplePrompt,
    LaterSinks,
    SinkStatistics,
    SinkTokens,
)

TEXTS = ("\n", " the", ".", ",", "<|im_end|>", " Review", ":", " and", "Sentiment", "\t", " of", "ing", "\u202e", "é")


def random_profile(
    layers: int = 3,
    heads: int = 2,
    sources: Sequence[str] = ("sst2",),
    *,
    seed: int = 0,
    prompts: int = 20,
    longest: int = 60,
    effects: bool = True,
    calibration: Calibration | None = None,
    texts: Sequence[str] = TEXTS,
    no_later_sinks: bool = False,
) -> SinkProfile:
    """A profile whose parts fit each other; not what any model has.

    Args:
        layers: Of the model.
        heads: Of each layer.
        sources: Names.
        seed: Of everything.
        prompts: Of each source.
        longest: Tokens of the longest prompt, at least 2.
        effects: Whether effects were measured.
        calibration: What the examples were also run with.
        texts: Of the vocabulary's tokens.
        no_later_sinks: Whether no head has any.
    """
    random = np.random.default_rng(seed)
    level = np.zeros((layers, heads)) if no_later_sinks else _level(random, layers, heads)
    made = {name: _statistics(random, name, level, prompts, longest, effects, texts) for name in sources}
    overall = _statistics(random, ALL, level, prompts * len(made), longest, effects, texts)
    return SinkProfile(
        model=ModelIdentity("llama", layers, heads, "sha256:" + "0" * 64),
        model_name="smollm2-135m",
        overall=overall,
        sources=made,
        examples=tuple(_example(random, name, level, longest, texts, calibration is not None) for name in made),
        calibration=calibration,
        answers=some_answers(sources[0], texts) if calibration is not None else None,
        options={"absolute": 0.1, "relative": 5.0, "batch_tokens": 2048},
        versions={"act-export": "0.1.0", "torch": "2.13.0"},
    )


def some_answers(source: str, texts: Sequence[str] = TEXTS) -> AnswerPairs:
    """A question with choices, a text that goes on otherwise, and one that goes on alike."""
    asked = "Review: the plot is as thin as paper, and yet it moves.\nSentiment:"
    shown = (
        AnswerPair(source, asked, "negative", "positive", "positive", plain_right=False, calibrated_right=True),
        AnswerPair(source, "".join(texts), "It is a town\nin the north.", "It is a city\nin the north, and old."),
        AnswerPair(source, "Once upon a time", "", ""),
    )
    return AnswerPairs(shown, tried=12, differing=2)


def _level(random: np.random.Generator, layers: int, heads: int) -> NDArray[np.float64]:
    """How much later sinks a head has, (layers, heads): most in the first third of the layers, none in some heads."""
    depth = np.arange(layers)[:, None] / layers
    level = np.exp(-(((depth - 0.25) / 0.18) ** 2)) + 0.15
    return level * random.beta(0.7, 2.5, (layers, heads)) * (random.random((layers, heads)) < 0.85)


def _statistics(
    random: np.random.Generator,
    name: str,
    level: NDArray[np.float64],
    prompts: int,
    longest: int,
    effects: bool,
    texts: Sequence[str],
) -> SinkStatistics:
    lengths = random.integers(max(2, longest // 2), longest + 1, prompts)
    lengths[0] = longest
    absolute, relative = _exposure(lengths)
    initial = _floats(np.clip(random.normal(0.62, 0.2, level.shape), 0.01, 0.97))
    return SinkStatistics(
        name=name,
        prompts=prompts,
        tokens=int(lengths.sum()),
        shortest=int(lengths.min()),
        longest=longest,
        shared=3,
        initial_score=initial,
        initial_score_std=_floats(0.1 * initial),
        mass_std=_floats(0.05 * level),
        entropy=_floats(random.uniform(0.5, 3.2, level.shape)),
        mean_map=_mean_map(random, level, initial),
        absolute_exposure=absolute,
        relative_exposure=relative,
        by={mode: _later_sinks(random, mode, level, prompts, absolute, relative, texts, initial) for mode in MODES},
        effects=_floats(random.normal(0.01 * level, 0.004)) if effects else None,
        effect_prompts=prompts if effects else 0,
    )


def _exposure(lengths: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    absolute, relative = np.zeros(len(POSITION_EDGES)), np.zeros(RELATIVE_BINS)
    for length in lengths:
        position = np.arange(1, length)
        np.add.at(absolute, np.searchsorted(POSITION_EDGES, position, "right") - 1, 1)
        np.add.at(relative, np.minimum(position * RELATIVE_BINS // (length - 1), RELATIVE_BINS - 1), 1)
    return _floats(absolute), _floats(relative)


def _later_sinks(
    random: np.random.Generator,
    mode: str,
    level: NDArray[np.float64],
    prompts: int,
    absolute: NDArray[np.float32],
    relative: NDArray[np.float32],
    texts: Sequence[str],
    initial: NDArray[np.float32],
) -> LaterSinks:
    strength = level if mode == "absolute" else 0.7 * level
    mass = _floats(np.clip(0.5 * strength * random.uniform(0.6, 1, level.shape), 0, 1))
    shares = random.dirichlet(np.full(len(texts), 0.4))
    order = np.argsort(-shares)
    occurrences = random.integers(prompts, 20 * prompts, len(texts))
    at_most = level.shape[1] * occurrences[:, None] * np.minimum(1, level.mean(1))[None]
    sinks = np.maximum(np.rint(at_most * random.random(at_most.shape)), level.sum(1)[None] > 0)
    kept = order[sinks[order].sum(1) > 0]
    fading = np.exp(-np.arange(RELATIVE_BINS) / 6)
    early = np.exp(-np.arange(len(POSITION_EDGES)) / 9)

    def positions(exposure: NDArray[np.float32], profile: NDArray[np.float64]) -> NDArray[np.float32]:
        noise = random.uniform(0.6, 1, (*level.shape, len(exposure)))
        return _floats(0.2 * np.minimum(1, strength)[..., None] * noise * profile * exposure / prompts)

    by_absolute = positions(absolute, early)
    return LaterSinks(
        mode=mode,
        threshold=DEFAULT_THRESHOLD[mode],
        initial_rate=_floats(np.clip(initial * 1.4, 0, 1)),
        rate=_floats(np.clip(3 * strength, 0, 1)),
        count=_floats(by_absolute.sum(-1)),
        mass=mass,
        absolute_positions=by_absolute,
        relative_positions=positions(relative, fading),
        tokens=SinkTokens(
            ids=kept.astype(np.int64),
            texts=tuple(texts[index] for index in kept),
            occurrences=occurrences[kept].astype(np.int64),
            sinks=sinks[kept].astype(np.int64),
            mass=_floats(shares[kept] / max(shares[kept].sum(), 1e-9) * mass.mean()),
            mass_outside=_floats(0.6 * shares[kept] / max(shares[kept].sum(), 1e-9) * mass.mean()),
        ),
    )


def _mean_map(
    random: np.random.Generator, level: NDArray[np.float64], initial: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Rows sum to 1: the initial token's column, a few later columns, the diagonal, and the rest evenly."""
    row, column = np.mgrid[:GRID, :GRID]
    seen = column <= row
    columns = random.choice(GRID, 4, replace=False)
    maps = np.where(seen, 0.02 + np.exp(-(row - column) / 1.5) * 0.3, 0)[None, None] * np.ones((*level.shape, 1, 1))
    maps = maps * random.uniform(0.6, 1, maps.shape)
    for at in columns:
        maps[..., at] += level[..., None] * seen[:, at]
    maps[..., 0] += 3.0 * initial[..., None]
    return _floats(maps / maps.sum(-1, keepdims=True))


def _example(
    random: np.random.Generator,
    source: str,
    level: NDArray[np.float64],
    tokens: int,
    texts: Sequence[str],
    calibrated: bool,
) -> ExamplePrompt:
    ids = random.integers(0, len(texts), tokens)
    scores = random.exponential(0.01, (*level.shape, tokens))
    scores[..., 0] = random.uniform(0.3, 0.8, level.shape)
    for at in random.choice(np.arange(1, tokens), min(4, tokens - 1), replace=False):
        scores[..., at] += np.minimum(0.6, level)
    scores = np.minimum(scores, 1)
    after = np.minimum(scores * np.where(scores > 0.1, 0.4, 1.1), 1)
    after[..., 0] = np.minimum(1, scores[..., 0] * 1.1)
    return ExamplePrompt(
        source=source,
        ids=ids.astype(np.int64),
        texts=tuple(texts[token] for token in ids),
        scores=_floats(scores),
        calibrated_scores=_floats(after) if calibrated else None,
    )


def some_calibration(layers: int, heads: int, *, seed: int = 0, share: float = 0.1) -> Calibration:
    """Some heads of a model of that shape, at least one."""
    random = np.random.default_rng(seed)
    chosen = random.random((layers, heads)) < share
    chosen[layers // 2, heads // 2] = True
    found: Mapping[int, tuple[int, ...]] = {
        layer: tuple(int(head) for head in np.flatnonzero(chosen[layer])) for layer in range(layers)
    }
    return Calibration(heads=found)


def _floats(values: NDArray[np.generic]) -> NDArray[np.float32]:
    return values.astype(np.float32)
