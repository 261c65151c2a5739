"""How likely each choice is: the log-likelihood of its tokens after the prompt.

The prompt runs once, left-padded in a batch with others of about its length. A choice's first token is read off that
pass; further tokens go on from the prompt's state as if they were decoded one at a time, as generation would (PyTorch
computes that in one pass, ONNX Runtime in a call for each token). They are not run together with the prompt: sink
statistics of a call include all its rows, so the prompt, and the choice's early tokens, would be calibrated with
statistics of tokens that have not been generated yet, and differently for every choice.

Scored by the first token, as in the papers of ACT and ZeroTuning, an answer is right only if the likeliest token after
the prompt, which greedy decoding would give, is the right choice's first; where it is no choice's first token, the
answer is invalid. So choices are their first tokens, and a row of scores has one more number: the log-likelihood of the
likeliest of all other tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from act_export.errors import ActExportError
from act_export.runtime.sampling import left_pad
from act_export.tasks.batching import USUAL, Batching, batches
from act_export.tasks.encoding import EncodedExample
from act_export.tasks.language_model import ContinuesAtOnce, LanguageModel


def score_choices(
    model: LanguageModel,
    examples: Sequence[EncodedExample],
    batching: Batching = USUAL,
    *,
    length_normalized: bool = False,
) -> list[tuple[float, ...]]:
    """Log-likelihood of every choice of every example.

    Args:
        model: PyTorch or ONNX Runtime.
        examples: In any order.
        batching: How many run together.
        length_normalized: Divide by the number of the choice's tokens.

    Returns:
        In the order of `examples`, one number per choice; by the first token, another of the likeliest other token.

    Raises:
        ActExportError: If a log-likelihood isn't finite, naming the prompt.
    """
    scores: list[tuple[float, ...]] = [()] * len(examples)
    with torch.no_grad():
        for indices in batches(examples, batching):
            batch = [examples[index] for index in indices]
            for index, row in zip(
                indices, choice_scores(model, batch, length_normalized=length_normalized), strict=True
            ):
                scores[index] = tuple(row.tolist())
            batching.done(len(indices))
    return scores


def predicted_choice(scores: Sequence[float]) -> int:
    """Index of the likeliest choice; of equals the first. Where another token is likelier, the number of choices."""
    return max(range(len(scores)), key=lambda index: scores[index])


def scores_of_choices(rows: Sequence[Sequence[float]], examples: Sequence[EncodedExample]) -> list[tuple[float, ...]]:
    """Rows of scores without the number of all other tokens."""
    return [tuple(row[: len(example.choices)]) for row, example in zip(rows, examples, strict=True)]


def choice_scores(
    model: LanguageModel, batch: Sequence[EncodedExample], *, length_normalized: bool = False
) -> list[Tensor]:
    """Log-likelihoods of the choices of one batch, differentiable where the model is.

    Returns:
        One per example, shape (choices,), or where first tokens are compared (choices + 1,).

    Raises:
        ActExportError: If one isn't finite, naming the prompt.
    """
    input_ids, attention_mask = map(torch.from_numpy, left_pad([example.prompt for example in batch]))
    logits, state = model(input_ids, attention_mask, None)
    choices = [tokens for example in batch for tokens in example.choices]
    prompts = torch.tensor([index for index, example in enumerate(batch) for _ in example.choices])
    following = logits.log_softmax(-1)
    scores = following[prompts, torch.tensor([tokens[0] for tokens in choices])]

    going_on = [index for index, tokens in enumerate(choices) if len(tokens) > 1]
    if going_on:
        state, rows = model.select(state, prompts[going_on]), prompts[going_on]
        longer = [choices[index] for index in going_on]
        rest = (
            _at_once(model, longer, attention_mask[rows], state)
            if isinstance(model, ContinuesAtOnce)
            else _token_by_token(model, longer, attention_mask[rows], state)
        )
        scores = scores.index_add(0, torch.tensor(going_on), rest)
    if length_normalized:
        scores = scores / torch.tensor([len(tokens) for tokens in choices])
    by_example = list(torch.split(scores, [len(example.choices) for example in batch]))
    for index, example in enumerate(batch):
        if example.first_token:
            others = following[index].index_fill(0, torch.tensor(example.choices).flatten(), float("-inf"))
            by_example[index] = torch.cat([by_example[index], others.max()[None]])
    for example, row in zip(batch, by_example, strict=True):
        if not row.isfinite().all():
            raise ActExportError(
                f"the model's log-likelihoods of the choices after the prompt {example.text} are {row.tolist()}, not "
                f"all finite numbers; its weights or its precision are at fault"
            )
    return by_example


def _at_once(model: ContinuesAtOnce, choices: Sequence[tuple[int, ...]], attention_mask: Tensor, state: Any) -> Tensor:
    """Log-likelihood of each choice after its first token, in one pass.

    Args:
        model: The model.
        choices: Token ids, two or more each.
        attention_mask: (choices, prompt) of the prompts.
        state: Of the prompts, a row per choice.

    Returns:
        (choices,).
    """
    longest = max(map(len, choices)) - 1
    lengths = torch.tensor([len(tokens) - 1 for tokens in choices])
    real = (torch.arange(longest) < lengths[:, None]).long()
    inputs, targets = (
        torch.tensor(
            [[*tokens[first : len(tokens) - 1 + first], *[0] * (longest + 1 - len(tokens))] for tokens in choices]
        )
        for first in (0, 1)
    )
    log_likelihoods = model.continue_at_once(inputs, targets, torch.cat([attention_mask, real], 1), state)
    return log_likelihoods.masked_fill(real == 0, 0).sum(1)


def _token_by_token(
    model: LanguageModel, choices: Sequence[tuple[int, ...]], attention_mask: Tensor, state: Any
) -> Tensor:
    """As `_at_once`, a call for each position."""
    total: Tensor | None = None
    decoding = list(range(len(choices)))
    position = 1
    while decoding:
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(decoding), 1)], 1)
        tokens = torch.tensor([[choices[index][position - 1]] for index in decoding])
        logits, state = model(tokens, attention_mask, state)
        following = torch.tensor([choices[index][position] for index in decoding])
        step = logits.log_softmax(-1).gather(1, following[:, None])[:, 0]
        total = step if total is None else total.index_add(0, torch.tensor(decoding), step)
        position += 1
        left = [row for row, index in enumerate(decoding) if len(choices[index]) > position]
        if len(left) < len(decoding) and left:
            rows = torch.tensor(left)
            state, attention_mask = model.select(state, rows), attention_mask[rows]
        decoding = [decoding[row] for row in left]
    assert total is not None  # every choice has a second token
    return total
