"""What is run on both sides: prompts, a ragged batch, a chunked prompt, decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from act_export.runtime.generate import left_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DECODE_STEPS = 32
_PROMPT_LENGTHS = (1, 2, 17, 64, 193)
_RAGGED_LENGTHS = (3, 40, 19, 61)
_CHUNKS = (31, 1, 32)
_DECODE_PROMPT = 48
_TEXT = """The lighthouse keeper wrote every evening: wind, tide, the colour of the sky. On the first page stood a \
list.

1. Trim the wick.
2. Clean the glass; use the soft cloth, not the brush.
3. Write down what you saw.

Years later his granddaughter found the books in a chest. "Why did you never write about yourself?" she asked. He \
smiled and said: "I did. Read the third rule again." She opened a volume at random: 12 March, gale from the north, two \
ships, one light. Below, in smaller letters, was a question: did anybody see it? She copied the line into her own \
notebook, and the answer came to her only much later, in another country, on a night without any stars at all.

Question: Who found the books?
Answer: His granddaughter found them in a chest, years later.

"""


@dataclass(frozen=True)
class Case:
    """One comparison: calls that follow each other, each continuing the one before.

    Attributes:
        name: For the report.
        calls: Token ids (batch, sequence) of each call.
        attention_mask: (batch, total of all calls), 1 for real tokens.
        decode_steps: Single-token calls that follow, with the reference's own greedy tokens.
    """

    name: str
    calls: tuple[NDArray[np.int64], ...]
    attention_mask: NDArray[np.int64]
    decode_steps: int = 0

    def without_padding(self) -> Case:
        """The sequences that have no padding, for models that can't leave it out."""
        whole = self.attention_mask.all(1)
        calls = tuple(ids[whole] for ids in self.calls)
        name = self.name if whole.all() else f"{self.name}, the unpadded"
        return replace(self, name=name, calls=calls, attention_mask=self.attention_mask[whole])


def parity_cases(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, seed: int = 0) -> list[Case]:
    """The cases for a model: real text where there is a tokenizer, random token ids otherwise.

    Lengths beyond the model's own limit are left out or cut.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    tokens = _tokens(model, tokenizer, max(_PROMPT_LENGTHS), seed)

    def some(length: int, start: int = 0) -> list[int]:
        length = min(length, limit - 1)
        return [tokens[(start + i) % len(tokens)] for i in range(length)]

    cases = [
        Case(f"prompt of {len(ids)}", (_row(ids),), np.ones((1, len(ids)), np.int64))
        for ids in map(some, sorted({min(length, limit - 1) for length in _PROMPT_LENGTHS}))
    ]
    ragged_ids, ragged_mask = ragged_batch([some(n, 5 * n) for n in _RAGGED_LENGTHS])
    cases.append(Case(f"ragged batch of {len(ragged_ids)}", (ragged_ids,), ragged_mask))
    whole = some(sum(_CHUNKS))
    chunk_ids, chunk_mask = ragged_batch([whole, some(len(whole) * 2 // 3, 11)])
    ends = np.minimum(np.cumsum((0, *_CHUNKS)), len(whole))
    chunks = tuple(chunk_ids[:, a:b] for a, b in pairwise(ends) if b > a)
    cases.append(Case(f"prompts in {len(chunks)} chunks", chunks, chunk_mask))
    steps = min(DECODE_STEPS, max(limit - 2, 0))
    prompt = some(min(_DECODE_PROMPT, limit - steps))
    decode_ids, decode_mask = ragged_batch([prompt, prompt[len(prompt) // 2 :]])
    cases.append(Case(f"{steps} decode steps", (decode_ids,), decode_mask, decode_steps=steps))
    return cases


def ragged_batch(prompts: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Left-padded ids and mask. Padding repeats a real token, so that attending to it would show."""
    return left_pad(prompts, pad_token=prompts[0][0])


def _row(ids: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(ids, np.int64)[None]


def _tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, count: int, seed: int) -> list[int]:
    vocabulary = int(model.config.vocab_size)
    if tokenizer is not None:
        ids = [int(i) for i in tokenizer(_TEXT, add_special_tokens=False).input_ids if i < vocabulary]
        if ids:
            return ids
    return [int(i) for i in np.random.default_rng(seed).integers(0, vocabulary, count)]
