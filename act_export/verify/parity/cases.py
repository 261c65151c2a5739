"""What is run on both sides: prompts, a ragged batch, a chunked prompt, decode steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.checkpoint.text_tower import placeholders_of
from act_export.runtime.request import DEFAULT, Choices
from act_export.runtime.sampling import left_pad
from act_export.tasks.encoding import sequence_beginning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DECODE_STEPS = 32
_PROMPT_LENGTHS = (1, 2, 17, 64, 193)
_RAGGED_LENGTHS = (3, 40, 19, 61)
_CHUNKS = (31, 1, 32)
_MIXED_STEPS = 4
_DECODE_PROMPT = 48
_LONGEST_PROMPT = 2048  # about two and a half times the tokens of all other cases
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
        calls: Token ids (batch, sequence), or embeddings (batch, sequence, hidden size), of each call.
        attention_mask: (batch, total of all calls), 1 for real tokens.
        decode_steps: Single-token calls that follow, with the reference's own greedy tokens.
        position_ids: (axes, batch, total of all calls); None counts the real tokens.
        calibrations: Names, one for all sequences or one for each; None for the default.
    """

    name: str
    calls: tuple[NDArray[Any], ...]
    attention_mask: NDArray[np.int64]
    decode_steps: int = 0
    position_ids: NDArray[np.int64] | None = None
    calibrations: tuple[str, ...] | None = None

    @property
    def choice(self) -> Choices:
        """As a session takes it."""
        if self.calibrations is None:
            return DEFAULT
        return self.calibrations[0] if len(self.calibrations) == 1 else self.calibrations

    def positions(self, start: int, end: int) -> NDArray[np.int64] | None:
        """Position ids (axes, batch, end - start) of some columns; after the last call one more for each."""
        if self.position_ids is None:
            return None
        real = np.where(self.attention_mask != 0, self.position_ids, -1)
        total = real.shape[-1]
        after = real.max((0, 2))[:, None] + 1 + np.arange(max(end - total, 0))
        after = np.broadcast_to(after, (len(real), *after.shape))
        return np.concatenate([self.position_ids, after], -1)[..., start:end]

    def without_padding(self) -> Case:
        """The sequences that have no padding, for models that can't leave it out."""
        whole = self.attention_mask.all(1)
        calls = tuple(ids[whole] for ids in self.calls)
        name = self.name if whole.all() else f"{self.name}, the unpadded"
        positions = self.position_ids[:, whole] if self.position_ids is not None else None
        each = self.calibrations
        if each is not None and len(each) > 1:
            each = tuple(name for name, kept in zip(each, np.atleast_1d(whole), strict=True) if kept)
        return replace(
            self,
            name=name,
            calls=calls,
            attention_mask=self.attention_mask[whole],
            position_ids=positions,
            calibrations=each,
        )


def calibration_cases(cases: Sequence[Case], names: Sequence[str], default: str) -> list[Case]:
    """The ragged batch of these cases with every other calibration, and batches that mix all, with tokens after them.

    Args:
        cases: As `parity_cases` made them.
        names: Of the calibrations, "plain" among them.
        default: That `cases` are run with.
    """
    ragged = next(case for case in cases if case.name.startswith("ragged"))
    found = [replace(ragged, name=f"{name}, {ragged.name}", calibrations=(name,)) for name in names if name != default]
    rows = len(ragged.attention_mask)
    for start in range(0, len(names) if len(names) > 1 else 0, rows):
        part = [names[(start + i) % len(names)] for i in range(rows)]
        title = f"mixed {', '.join(dict.fromkeys(part))}, {_MIXED_STEPS} decode steps"
        found.append(replace(ragged, name=title, calibrations=tuple(part), decode_steps=_MIXED_STEPS))
    return found


def parity_cases(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, seed: int = 0) -> list[Case]:
    """The cases for a model: real text where there is a tokenizer, random token ids otherwise.

    Each sequence begins with what the tokenizer begins all with. Lengths beyond the model's own limit are left out or
    cut. A model with a sliding window gets a prompt of twice the window, and decode steps after it, where the window
    holds more than the other cases' prompts and the prompt has no more than 2,048 tokens.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 10**9
    first = sequence_beginning(tokenizer) if tokenizer is not None else ()
    tokens = _tokens(model, tokenizer, max(_PROMPT_LENGTHS), seed)

    def some(length: int, start: int = 0) -> list[int]:
        length = min(length, limit - 1)
        return [*first, *(tokens[(start + i) % len(tokens)] for i in range(length))][:length]

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
    half = len(prompt) // 2
    decode_ids, decode_mask = ragged_batch([prompt, some(len(prompt) - half, half)])
    cases.append(Case(f"{steps} decode steps", (decode_ids,), decode_mask, decode_steps=steps))
    window = max((size for size in sliding_windows(model) if 2 * size <= _LONGEST_PROMPT), default=0)
    beyond = some(min(2 * window, limit - steps))
    if len(beyond) > max(window, _DECODE_PROMPT):
        name = f"prompt of {len(beyond)} and {steps} decode steps, window of {window}"
        cases.append(Case(name, (_row(beyond),), np.ones((1, len(beyond)), np.int64), decode_steps=steps))
    return cases


def sliding_windows(model: PreTrainedModel) -> list[int]:
    """The sliding windows that the model's layers ask for, each once."""
    attention = ReferenceAttention(None)
    ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    with torch.no_grad(), attention_hook(model, attention) as hooked:
        hooked(ids, torch.ones_like(ids), logits_to_keep=hooked.fewest_logits)
    return sorted({window for window in attention.sliding_windows.values() if window > 0})


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
    words = np.setdiff1d(np.arange(vocabulary), placeholders_of(model))
    return [int(i) for i in words[np.random.default_rng(seed).integers(0, len(words), count)]]
