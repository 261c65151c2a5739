"""Continuations of contexts: how likely each is, and whether greedy decoding would make it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from act_export.tasks import EncodedExample
from act_export.tasks.batching import USUAL, Batching, positions_of
from act_export.tasks.language_model import LanguageModel
from act_export.tasks.scoring import score_choices


@dataclass(frozen=True)
class Continuation:
    """What may follow a context.

    Attributes:
        context: Token ids, at least one.
        tokens: Token ids that may follow; none is certain.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]


def score_continuations(
    model: LanguageModel,
    continuations: Sequence[Continuation],
    batching: Batching = USUAL,
) -> list[tuple[float, bool]]:
    """Log-likelihood of each continuation, and whether each of its tokens is the likeliest where it stands.

    Continuations of the same context run from one pass over it.

    Args:
        model: PyTorch or ONNX Runtime.
        continuations: In any order.
        batching: How many passes over a context run together, see `passes`.

    Raises:
        ActExportError: If a log-likelihood isn't finite.
    """
    examples = passes(continuations, batching.tokens)
    recording = _RecordsLikeliest(model)
    scores = score_choices(recording, examples, batching)
    found = {continuation: (0.0, True) for continuation in continuations if not continuation.tokens}
    for example, row in zip(examples, scores, strict=True):
        for tokens, log_likelihood in zip(example.choices, row, strict=True):
            greedy = recording.is_greedy(example.prompt, tokens)
            found[Continuation(example.prompt, tokens)] = (log_likelihood, greedy)
    return [found[continuation] for continuation in continuations]


def passes(continuations: Sequence[Continuation], batch_tokens: int | None = None) -> list[EncodedExample]:
    """Different contexts, each with what may follow it; more than once where that would be too many tokens at a time.

    Args:
        continuations: In any order; those without tokens are left out.
        batch_tokens: At the most; None for any number.
    """
    by_context: dict[tuple[int, ...], list[list[tuple[int, ...]]]] = {}
    for continuation in dict.fromkeys(continuations):
        if not continuation.tokens:
            continue
        parts = by_context.setdefault(continuation.context, [[]])
        grown = [*parts[-1], continuation.tokens]
        if parts[-1] and batch_tokens is not None and positions_of([_pass(continuation.context, grown)]) > batch_tokens:
            parts.append([])
        parts[-1].append(continuation.tokens)
    return [_pass(context, part) for context, parts in by_context.items() for part in parts]


def _pass(context: tuple[int, ...], followers: Sequence[tuple[int, ...]]) -> EncodedExample:
    return EncodedExample(context, tuple(followers), 0, f"of {len(context)} tokens")


class _Recorded(NamedTuple):
    """The inner state, and the tokens of each row so far, as bytes."""

    inner: Any
    rows: list[bytes]


class _RecordsLikeliest:
    """A language model that remembers, of every sequence it was given, which token is the likeliest to follow."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self.likeliest: dict[bytes, int] = {}

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, state: _Recorded | None) -> tuple[Tensor, _Recorded]:
        """See `act_export.tasks.language_model.LanguageModel`."""
        real = attention_mask[:, -input_ids.shape[1] :] != 0
        new = [_as_bytes(ids[mask].tolist()) for ids, mask in zip(input_ids, real, strict=True)]
        rows = [old + added for old, added in zip(state.rows, new, strict=True)] if state is not None else new
        logits, inner = self.model(input_ids, attention_mask, state.inner if state is not None else None)
        self.likeliest.update(zip(map(_digest, rows), logits.argmax(-1).tolist(), strict=True))
        return logits, _Recorded(inner, rows)

    def select(self, state: _Recorded, rows: Tensor) -> _Recorded:
        """See `act_export.tasks.LanguageModel`."""
        return _Recorded(self.model.select(state.inner, rows), [state.rows[row] for row in rows.tolist()])

    def is_greedy(self, context: Sequence[int], tokens: Sequence[int]) -> bool:
        """Whether greedy decoding after the context, which was run, begins with these tokens."""
        begun = _as_bytes(context)
        for token in tokens:
            if self.likeliest.get(_digest(begun)) != token:
                return False
            begun += _as_bytes([token])
        return True


def _as_bytes(tokens: Sequence[int]) -> bytes:
    return np.array(tokens, np.int64).tobytes()


def _digest(tokens: bytes) -> bytes:
    return blake2b(tokens, digest_size=16).digest()
