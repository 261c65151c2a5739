"""Greedy and sampled generation."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from act_export.errors import ActExportError
from act_export.runtime.cache import DEFAULT_CAPACITY
from act_export.runtime.generation_settings import GenerationSettings
from act_export.runtime.request import DEFAULT, Choices
from act_export.runtime.sampling import Sampling, left_pad, next_tokens
from act_export.runtime.session import Session

if TYPE_CHECKING:
    from act_export.runtime.generation_settings import GenerationRules


def generate_steps(
    session: Session,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
    pad_token: int = 0,
    settings: GenerationSettings | None = None,
    calibration: Choices = DEFAULT,
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
        calibration: Of the sequences, as `Session.allocate` takes it.

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
    capacity = ids.shape[1] + min(max_new_tokens, DEFAULT_CAPACITY)
    cache = session.allocate(len(prompts), capacity, calibration=calibration)
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
    calibration: Choices = DEFAULT,
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
        calibration=calibration,
    )
    for step in steps:
        for tokens, token in zip(generated, step, strict=True):
            if token is not None:
                tokens.append(token)
    return generated
