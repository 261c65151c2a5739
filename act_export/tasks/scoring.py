"""How likely each choice is: the log-likelihood of its tokens after the prompt.

The prompt runs once, left-padded in a batch with others of about its length. A choice's first token is read off that
pass; further tokens are decoded from the prompt's state one at a time, as generation would. They are not run together
with the prompt: sink statistics of a call include all its rows, so the prompt, and the choice's early tokens, would be
calibrated with statistics of tokens that have not been generated yet, and differently for every choice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from act_export.errors import ActExportError
from act_export.runtime.generate import left_pad
from act_export.tasks.encoding import EncodedExample
from act_export.tasks.language_model import LanguageModel

BATCH_SIZE = 16


class ScoringError(ActExportError):
    """A model that gives no usable scores."""


def score_choices(
    model: LanguageModel,
    examples: Sequence[EncodedExample],
    *,
    batch_size: int = BATCH_SIZE,
    batch_tokens: int | None = None,
    length_normalized: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> list[tuple[float, ...]]:
    """Log-likelihood of every choice of every example.

    Args:
        model: PyTorch or ONNX Runtime.
        examples: In any order.
        batch_size: Prompts that run together at the most; changes speed and memory, not the result.
        batch_tokens: Tokens that run together at the most, padding included, unless one prompt alone has more; None
            for any number.
        length_normalized: Divide by the number of the choice's tokens.
        on_batch: Called after each batch with the number of examples in it.

    Returns:
        In the order of `examples`, one number per choice.

    Raises:
        ScoringError: If a log-likelihood isn't finite, naming the prompt.
    """
    scores: list[tuple[float, ...]] = [()] * len(examples)
    with torch.no_grad():
        for indices in batches(examples, batch_size, batch_tokens):
            batch = [examples[index] for index in indices]
            for index, row in zip(
                indices, choice_scores(model, batch, length_normalized=length_normalized), strict=True
            ):
                scores[index] = tuple(row.tolist())
            if on_batch is not None:
                on_batch(len(indices))
    return scores


def predicted_choice(scores: Sequence[float]) -> int:
    """Index of the likeliest choice; of equals the first."""
    return max(range(len(scores)), key=lambda index: scores[index])


def batches(
    examples: Sequence[EncodedExample], batch_size: int, batch_tokens: int | None = None
) -> Iterator[list[int]]:
    """Indices of examples with prompts of about the same length, the longest first; limits as in `score_choices`."""
    by_length = sorted(range(len(examples)), key=lambda index: -len(examples[index].prompt))
    start = 0
    while start < len(by_length):
        longest = len(examples[by_length[start]].prompt)
        size = batch_size if batch_tokens is None else max(1, min(batch_size, batch_tokens // longest))
        yield by_length[start : start + size]
        start += size


def choice_scores(
    model: LanguageModel, batch: Sequence[EncodedExample], *, length_normalized: bool = False
) -> list[Tensor]:
    """Log-likelihoods of the choices of one batch, differentiable where the model is.

    Returns:
        One per example, shape (choices,).

    Raises:
        ScoringError: If one isn't finite, naming the prompt.
    """
    input_ids, attention_mask = map(torch.from_numpy, left_pad([example.prompt for example in batch]))
    logits, state = model(input_ids, attention_mask, None)
    choices = [tokens for example in batch for tokens in example.choices]
    prompts = torch.tensor([index for index, example in enumerate(batch) for _ in example.choices])
    scores = logits.log_softmax(-1)[prompts, torch.tensor([tokens[0] for tokens in choices])]

    decoding = [index for index, tokens in enumerate(choices) if len(tokens) > 1]
    rows = prompts[decoding]
    position = 1
    while decoding:
        state = model.select(state, rows)
        attention_mask = torch.cat([attention_mask[rows], attention_mask.new_ones(len(decoding), 1)], 1)
        logits, state = model(
            torch.tensor([[choices[index][position - 1]] for index in decoding]), attention_mask, state
        )
        tokens = torch.tensor([choices[index][position] for index in decoding])
        step = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        scores = scores.index_add(0, torch.tensor(decoding), step)
        position += 1
        rows = torch.tensor([row for row, index in enumerate(decoding) if len(choices[index]) > position])
        decoding = [index for index in decoding if len(choices[index]) > position]
    if length_normalized:
        scores = scores / torch.tensor([len(tokens) for tokens in choices])
    by_example = list(torch.split(scores, [len(example.choices) for example in batch]))
    for example, row in zip(batch, by_example, strict=True):
        if not row.isfinite().all():
            raise ScoringError(
                f"the model's log-likelihoods of the choices after the prompt {example.text} are {row.tolist()}, not "
                f"all finite numbers; its weights or its precision are at fault"
            )
    return by_example
