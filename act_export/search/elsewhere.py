"""What a calibration costs elsewhere: on tasks that it wasn't found on, and in the perplexity of a text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.search.answers import REPORT, Answers, EncodedTask, answer
from act_export.search.processes import Workers
from act_export.search.request import SearchOptions, SearchTask
from act_export.search.results import Gain, gain_of
from act_export.tasks import Example, Splits, encode_examples, load_examples, unused
from act_export.tasks.encoding import sequence_beginning
from act_export.tasks.splits import drawn
from act_export.tasks.statistics import mean_interval

PIECE = 256  # tokens


@dataclass(frozen=True)
class TextCost:
    """What calibrations do to a text.

    Attributes:
        plain: Perplexity of the plain model.
        calibrated: Perplexity with each calibration.
        intervals: With each, the 95% interval of what the mean log-likelihood of a token gains.
    """

    plain: float
    calibrated: tuple[float, ...]
    intervals: tuple[tuple[float, float], ...]


def used_questions(calibrations: Sequence[Calibration]) -> frozenset[str]:
    """Digests of the questions that the calibrations were found with."""
    recorded = (c.provenance.notes.get("used", ()) for c in calibrations if c.provenance is not None)
    return frozenset(digest for digests in recorded for digest in digests)


def questions_elsewhere(name: str, count: int, used: frozenset[str], *, seed: int = 0) -> list[Example]:
    """Questions of a built-in task, scored by likelihood, that no search used.

    Raises:
        TaskError: If there is no such task, or its rows can't be had.
    """
    return drawn(unused(load_examples(name, scoring="likelihood").examples, used), seed)[:count]


def cost_in_answers(
    checkpoint: Checkpoint, name: str, questions: Sequence[Example], calibrations: Sequence[Calibration]
) -> tuple[Answers, list[Gain]]:
    """The plain model's answers, and what each calibration gains over them, or loses.

    Args:
        checkpoint: The model, with a tokenizer.
        name: The task's.
        questions: At least one; those that are too long for the model are cut on the left.
        calibrations: To measure.
    """
    longest = getattr(checkpoint.model.config, "max_position_embeddings", None)
    report = tuple(encode_examples(checkpoint.tokenizer, questions, max_length=longest, truncate=True))
    task = EncodedTask(SearchTask(name, Splits((), (), tuple(questions))), {REPORT: report})
    asked = [(task, REPORT, calibration) for calibration in (None, *calibrations)]
    plain, *others = answer(checkpoint, asked, SearchOptions(), Workers(), step=name)
    return plain, [gain_of(plain, other) for other in others]


def pieces_of(checkpoint: Checkpoint, text: str | None, most: int) -> list[list[int]]:
    """Pieces of a text of `PIECE` tokens, evenly spread; fewer where it is short.

    Each begins as the tokenizer begins every sequence.

    Args:
        checkpoint: Whose tokenizer cuts it.
        text: None for the passages of the task squad.
        most: Pieces at the most.

    Raises:
        TaskError: If the task's rows can't be had.
    """
    if text is None:
        text = "\n".join(dict.fromkeys(example.group for example in load_examples("squad").examples))
    assert checkpoint.tokenizer is not None
    tokens = checkpoint.tokenizer(text, add_special_tokens=False).input_ids
    first = sequence_beginning(checkpoint.tokenizer)
    step = PIECE - len(first)
    starts = range(0, len(tokens) - step + 1, step)
    return [[*first, *tokens[start : start + step]] for start in starts[:: max(1, len(starts) // most)]][:most]


def cost_in_text(
    checkpoint: Checkpoint, pieces: Sequence[Sequence[int]], calibrations: Sequence[Calibration]
) -> TextCost:
    """Perplexities, each token decoded after those before it, so that it is calibrated with these.

    Args:
        checkpoint: The model.
        pieces: Token ids, at least one piece of at least two tokens.
        calibrations: To measure.
    """
    before = _log_likelihoods(checkpoint, pieces, None)
    after = [_log_likelihoods(checkpoint, pieces, calibration) for calibration in calibrations]
    return TextCost(
        _perplexity(before),
        tuple(map(_perplexity, after)),
        tuple(mean_interval([[b - a for a, b in zip(before, of, strict=True)]]) for of in after),
    )


def _perplexity(log_likelihoods: Sequence[float]) -> float:
    return math.exp(-float(np.mean(log_likelihoods)))


def _log_likelihoods(
    checkpoint: Checkpoint, pieces: Sequence[Sequence[int]], calibration: Calibration | None
) -> list[float]:
    """By piece, mean log-likelihood of its tokens."""
    found = []
    with torch.no_grad(), attention_hook(checkpoint.model, FastAttention(calibration)) as hooked:
        for piece in pieces:
            ids = torch.tensor([piece], device=checkpoint.model.device)
            logits = hooked(ids, torch.ones_like(ids), one_at_a_time=True).logits[0, :-1].float()
            found.append(float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).mean()))
    return found
