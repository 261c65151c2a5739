"""Greedy and sampled generation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError, shown
from act_export.runtime.generation_settings import GenerationSettings
from act_export.runtime.kv_cache import DEFAULT_CAPACITY
from act_export.runtime.session import Session

if TYPE_CHECKING:
    from act_export.runtime.generation_settings import GenerationRules

_LOWEST_TEMPERATURE = 1e-4  # below, the most likely token is all there is, and logits divided by it overflow


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
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ActExportError(f"temperature is {self.temperature}; it must not be negative (0 is greedy)")
        if 0 < self.temperature < _LOWEST_TEMPERATURE:
            raise ActExportError(
                f"temperature is {self.temperature}; give 0 (greedy), or at least {_LOWEST_TEMPERATURE}"
            )
        if not _is_whole(self.top_k) or self.top_k < 0:
            raise ActExportError(f"top_k is {self.top_k}; it must be a whole number, not negative (0 is all)")
        if not 0 < self.top_p <= 1:
            raise ActExportError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not _is_whole(self.seed) or self.seed < 0:
            raise ActExportError(f"seed is {self.seed}; it must be a whole number, not negative")


def left_pad(prompts: Sequence[Sequence[int]], pad_token: int = 0) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and mask, both (batch, longest), of prompts of any lengths.

    Raises:
        ActExportError: If there is no prompt, an empty one, or one with something that is no whole number.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ActExportError("the list of prompts is empty, or one of them has no token; give at least one token each")
    longest = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), longest), pad_token, np.int64)
    mask = np.zeros((len(prompts), longest), np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = _checked_ids(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _checked_ids(prompt: Sequence[int]) -> NDArray[np.integer[Any]]:
    found = np.asarray(prompt)
    whole = found.ndim == 1 and found.dtype.kind in "iu"
    # Of a list with whole numbers too, numpy makes whole numbers of booleans.
    wrong: list[Any] = []
    if not whole or isinstance(prompt, list | tuple):
        wrong = [token for token in prompt if not _is_whole(token)]
    if wrong or not whole:
        raise ActExportError(f"a prompt has {shown(wrong[0] if wrong else prompt)} in it; token ids are whole numbers")
    return found


def _is_whole(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and abs(int(value)) < 2**63


def generate_steps(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    pad_token: int = 0,
    settings: GenerationSettings | None = None,
) -> Iterator[list[int | None]]:
    """Generates for a batch, one step at a time.

    A model whose rotary frequencies are others beyond some length, and whose own code then computes the sequence again
    (Phi-3's longrope), is run so here too, where its file says so.

    Args:
        session: The model.
        prompts: Token ids, one list per sequence; lengths may differ.
        max_new_tokens: Steps at the most.
        stop_tokens: A sequence ends after one of these.
        sampling: How tokens are drawn; None is greedy.
        pad_token: Fills shorter prompts; never attended to.
        settings: A generation configuration's, such as penalties, applied to the logits before `sampling`; those that
            are about drawing only where tokens are drawn. None for the logits as they are. Needs transformers.

    Yields:
        The new token of each sequence, None for those that have ended. Stops when all have, or one has filled the
        model's context.

    Raises:
        ActExportError: For an empty prompt, one that isn't of whole numbers, settings that transformers refuses, or
            logits that aren't numbers.
    """
    sampling = sampling or Sampling()
    random = np.random.default_rng(sampling.seed)
    ids, mask = left_pad(prompts, pad_token)
    running = np.ones(len(prompts), bool)
    rules = _rules(settings, session, ids, mask, max_new_tokens, stop_tokens, sampling)
    cache = session.allocate(len(prompts), ids.shape[1] + min(max_new_tokens, DEFAULT_CAPACITY))
    switch = session.record.recompute_beyond or 0
    all_ids, all_mask = ids, mask
    for _ in range(max_new_tokens):
        if 0 < cache.length <= switch < all_ids.shape[1]:
            cache.reset()
            ids, mask = all_ids, all_mask
        scores = cache.step(ids, mask)[:, -1]
        if rules is not None:
            scores = rules.scores(all_ids, scores)
        _check_numbers(session, scores[running])
        tokens = next_tokens(scores, sampling, random)
        yield [int(token) if alive else None for token, alive in zip(tokens, running, strict=True)]
        running &= ~np.isin(tokens, list(stop_tokens))
        if rules is not None:
            running &= ~rules.ended(np.concatenate([all_ids, tokens[:, None]], 1))
        if not running.any():
            return
        if session.limits.context is not None and (cache.tokens >= session.limits.context)[running].any():
            return
        ids = np.where(running, tokens, pad_token)[:, None]
        mask = running[:, None].astype(np.int64)
        all_ids, all_mask = np.concatenate([all_ids, ids], 1), np.concatenate([all_mask, mask], 1)


def _rules(
    settings: GenerationSettings | None,
    session: Session,
    ids: NDArray[np.int64],
    mask: NDArray[np.int64],
    max_new_tokens: int,
    stop_tokens: Collection[int],
    sampling: Sampling,
) -> GenerationRules | None:
    if settings is None:
        return None
    return settings.rules(
        ids,
        mask,
        max_new_tokens=max_new_tokens,
        stop_tokens=stop_tokens,
        vocabulary=session.logits_size,
        drawing=sampling.temperature > 0,
    )


def _check_numbers(session: Session, scores: NDArray[Any]) -> None:
    likeliest = np.asarray(scores, np.float32).max(-1)
    if np.isnan(likeliest).any():
        raise ActExportError(
            f"logits of {session.path} aren't numbers (NaN); its weights or its precision are at fault: export it as "
            f"float32, which is compared with PyTorch"
        )
    if (likeliest == -np.inf).any():
        raise ActExportError("no token is left to choose from: the generation configuration suppresses them all")


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    pad_token: int = 0,
    settings: GenerationSettings | None = None,
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
        settings=settings,
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
