"""Which examples run together: those with prompts of about the same length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.tasks.encoding import EncodedExample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16
LOGITS_BYTES = 10**9  # of one call at the most, as if it computed the logits of all positions: older files do
_LOGIT_BYTES = 4


@dataclass(frozen=True)
class Batching:
    """How much runs together: speed and memory, not the result.

    Attributes:
        size: Examples at the most; None for any number.
        tokens: Positions at the most, padding included, unless one example alone has more; None for any number.
        done: Called after each batch with the number of examples in it.
    """

    size: int | None = BATCH_SIZE
    tokens: int | None = None
    done: Callable[[int], None] = lambda _: None


USUAL = Batching()


def positions_of(batch: Sequence[EncodedExample]) -> int:
    """Positions that a batch's states hold, padding included: those of its prompts, and of each choice that goes on."""
    longest = max(len(example.prompt) for example in batch)
    going_on = [len(tokens) for example in batch for tokens in example.choices if len(tokens) > 1]
    return len(batch) * longest + len(going_on) * (longest + max(going_on, default=1) - 1)


def batches(
    examples: Sequence[EncodedExample],
    batching: Batching,
    positions: Callable[[Sequence[EncodedExample]], int] = positions_of,
) -> Iterator[list[int]]:
    """Indices of examples with prompts of about the same length, the longest first.

    Args:
        examples: In any order.
        batching: How many.
        positions: What counts as tokens of a batch.
    """
    by_length = sorted(range(len(examples)), key=lambda index: -len(examples[index].prompt))
    batch: list[int] = []
    for index in by_length:
        grown = [*batch, index]
        full = batching.size is not None and len(grown) > batching.size
        full = full or (batching.tokens is not None and positions([examples[i] for i in grown]) > batching.tokens)
        if batch and full:
            yield batch
            grown = [index]
        batch = grown
    if batch:
        yield batch


def default_batch_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that run together at the most, so that logits of all of them take no more than `LOGITS_BYTES`."""
    return LOGITS_BYTES // (_LOGIT_BYTES * len(tokenizer))
