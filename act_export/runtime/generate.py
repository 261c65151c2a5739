"""Greedy and sampled generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError
from act_export.runtime.kv_cache import DEFAULT_CAPACITY
from act_export.runtime.session import Session


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
        if self.temperature < 0:
            raise ActExportError(f"temperature is {self.temperature}; it must not be negative (0 is greedy)")
        if self.top_k < 0:
            raise ActExportError(f"top_k is {self.top_k}; it must not be negative (0 is all)")
        if not 0 < self.top_p <= 1:
            raise ActExportError(f"top_p is {self.top_p}; it must lie in (0, 1]")


def left_pad(prompts: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and mask, both (batch, longest), of prompts of any lengths.

    Raises:
        ActExportError: If there is no prompt, or an empty one.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ActExportError("the list of prompts is empty, or one of them has no token; give at least one token each")
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad_token, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def generate_steps(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    pad_token: int = 0,
) -> Iterator[list[int | None]]:
    """Generates for a batch, one step at a time.

    Args:
        session: The model.
        prompts: Token ids, one list per sequence; lengths may differ.
        max_new_tokens: Steps at the most.
        stop_tokens: A sequence ends after one of these.
        sampling: How tokens are drawn; None is greedy.
        pad_token: Fills shorter prompts; never attended to.

    Yields:
        The new token of each sequence, None for those that have ended. Stops when all have, or one has filled the
        model's context.

    Raises:
        ActExportError: For an empty prompt.
    """
    sampling = sampling or Sampling()
    random = np.random.default_rng(sampling.seed)
    ids, mask = left_pad(prompts, pad_token)
    running = np.ones(len(prompts), bool)
    cache = session.allocate(len(prompts), ids.shape[1] + min(max_new_tokens, DEFAULT_CAPACITY))
    for _ in range(max_new_tokens):
        logits = cache.step(ids, mask)
        tokens = next_tokens(logits[:, -1], sampling, random)
        yield [int(token) if alive else None for token, alive in zip(tokens, running, strict=True)]
        running &= ~np.isin(tokens, list(stop_tokens))
        if not running.any():
            return
        if session.limits.context is not None and (cache.tokens >= session.limits.context)[running].any():
            return
        ids = np.where(running, tokens, pad_token)[:, None]
        mask = running[:, None].astype(np.int64)


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    pad_token: int = 0,
) -> list[list[int]]:
    """As `generate_steps`, all at once: the new tokens of each sequence."""
    generated: list[list[int]] = [[] for _ in prompts]
    steps = generate_steps(
        session,
        prompts,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        sampling=sampling,
        pad_token=pad_token,
    )
    for step in steps:
        for tokens, token in zip(generated, step, strict=True):
            if token is not None:
                tokens.append(token)
    return generated


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
