"""What a model says after a prompt, as text: a batch of prompts at a time, one token a step.

A sequence leaves its batch when it has ended, so long answers don't make short ones cost more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from act_export.errors import ActExportError
from act_export.runtime.sampling import Sampling, left_pad, next_tokens
from act_export.tasks.batching import USUAL, Batching, batches
from act_export.tasks.encoding import EncodedExample
from act_export.tasks.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Ending:
    """Where an answer ends.

    Attributes:
        max_new_tokens: Tokens at the most.
        texts: It ends before the first of these; one that is a special token of the tokenizer works too.
        tokens: It ends before one of these.
    """

    max_new_tokens: int
    texts: tuple[str, ...] = ()
    tokens: frozenset[int] = frozenset()


@dataclass
class _Answer:
    index: int
    tokens: list[int] = field(default_factory=list)


def generate_answers(
    model: LanguageModel,
    examples: Sequence[EncodedExample],
    batching: Batching = USUAL,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    stop_tokens: Collection[int] = (),
    sampling: Sampling | None = None,
) -> list[str]:
    """Answers every prompt.

    Args:
        model: PyTorch or ONNX Runtime.
        examples: In any order; only their prompts are used.
        batching: How many run together; tokens to come count.
        tokenizer: Of the model. Its end-of-sequence token ends an answer.
        max_new_tokens: Tokens of an answer at the most.
        stop: An answer ends before the first of these texts.
        stop_tokens: Other tokens that end an answer.
        sampling: How tokens are drawn; None is greedy. What is drawn depends on which prompts share a batch.

    Returns:
        In the order of `examples`, each without the prompt, special tokens and what ended it.

    Raises:
        ActExportError: If the model's logits aren't finite, naming the prompt.
    """
    ending = _ending(tokenizer, max_new_tokens, stop, stop_tokens)
    answers = [""] * len(examples)
    random = np.random.default_rng(sampling.seed if sampling is not None else 0)

    def positions(batch: Sequence[EncodedExample]) -> int:
        return len(batch) * (max(len(example.prompt) for example in batch) + max_new_tokens)

    with torch.no_grad():
        for indices in batches(examples, batching, positions):
            batch = [examples[index] for index in indices]
            texts = _generate(model, batch, tokenizer, ending, sampling or Sampling(), random)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
            batching.done(len(indices))
    return answers


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """The text before the first of these texts that is in it; all of it where none is."""
    return text[: min((text.find(end) for end in stop if end and end in text), default=len(text))]


def _ending(
    tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, stop: Sequence[str], stop_tokens: Collection[int]
) -> _Ending:
    special = set(tokenizer.all_special_tokens)
    tokens = {*stop_tokens, tokenizer.eos_token_id} - {None}
    tokens.update(tokenizer.added_tokens_encoder[text] for text in stop if text in special)
    return _Ending(max_new_tokens, tuple(text for text in stop if text not in special), frozenset(tokens))


def _generate(
    model: LanguageModel,
    batch: Sequence[EncodedExample],
    tokenizer: PreTrainedTokenizerBase,
    ending: _Ending,
    sampling: Sampling,
    random: np.random.Generator,
) -> list[str]:
    input_ids, attention_mask = map(torch.from_numpy, left_pad([example.prompt for example in batch]))
    answers = [_Answer(index) for index in range(len(batch))]
    running = answers
    state = None
    for _ in range(ending.max_new_tokens):
        logits, state = model(input_ids, attention_mask, state)
        for answer, likeliest in zip(running, logits.amax(-1).tolist(), strict=True):
            if not math.isfinite(likeliest):
                raise ActExportError(
                    f"the model's logits after the prompt {batch[answer.index].text} aren't finite numbers; its "
                    f"weights or its precision are at fault"
                )
        tokens = next_tokens(logits.numpy(), sampling, random).tolist()
        left = [
            row
            for row, (answer, token) in enumerate(zip(running, tokens, strict=True))
            if _goes_on(answer, token, tokenizer, ending)
        ]
        if not left:
            break
        if len(left) < len(running):
            rows = torch.tensor(left)
            state, attention_mask = model.select(state, rows), attention_mask[rows]
            running = [running[row] for row in left]
        input_ids = torch.tensor([[tokens[row]] for row in left])
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(left), 1)], 1)
    return [cut_at_stop(_decode(tokenizer, answer.tokens), ending.texts) for answer in answers]


def _goes_on(answer: _Answer, token: int, tokenizer: PreTrainedTokenizerBase, ending: _Ending) -> bool:
    """Adds the token to the answer, unless it ends it; whether another may follow."""
    if token in ending.tokens:
        return False
    answer.tokens.append(token)
    if not ending.texts:
        return True
    text = _decode(tokenizer, answer.tokens)
    return not any(end in text for end in ending.texts)


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))
