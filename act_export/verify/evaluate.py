"""Accuracy of a model on a task, and what calibration gains on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.errors import ActExportError
from act_export.hooks import HookedModel
from act_export.tasks import (
    Example,
    LanguageModel,
    Session,
    SessionLanguageModel,
    TorchLanguageModel,
    encode_examples,
    predicted_choice,
    score_choices,
)
from act_export.tasks.scoring import BATCH_SIZE
from act_export.tasks.statistics import accuracy_interval, gain_interval, mcnemar_p

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class EvaluationError(ActExportError):
    """Two evaluations that can't be compared."""


@dataclass(frozen=True)
class Evaluation:
    """How a model answers.

    Attributes:
        log_likelihoods: By example, one per choice.
        predictions: By example, index of the likeliest choice.
        answers: By example, index of the right choice.
    """

    log_likelihoods: tuple[tuple[float, ...], ...]
    predictions: tuple[int, ...]
    answers: tuple[int, ...]

    @property
    def correct(self) -> tuple[bool, ...]:
        """By example, whether the prediction is right."""
        return tuple(map(int.__eq__, self.predictions, self.answers))

    @property
    def accuracy(self) -> float:
        """Share of right predictions."""
        return sum(self.correct) / len(self.correct)

    @property
    def interval(self) -> tuple[float, float]:
        """95% interval of the accuracy."""
        return accuracy_interval(sum(self.correct), len(self.correct))


@dataclass(frozen=True)
class Comparison:
    """What calibration changes, on the same examples.

    Attributes:
        gain: Calibrated accuracy minus plain accuracy.
        interval: 95% interval of the gain, by a paired bootstrap.
        p: McNemar's, exact and two-sided: how often luck alone makes so uneven a change.
        gained: Number of examples that only the calibrated model answers rightly.
        lost: Number of examples that only the plain model answers rightly.
    """

    gain: float
    interval: tuple[float, float]
    p: float
    gained: int
    lost: int


def evaluate(
    model: Session | HookedModel | LanguageModel,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Sequence[Example],
    *,
    batch_size: int = BATCH_SIZE,
    length_normalized: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:
    """Answers every example with its likeliest choice.

    Args:
        model: An open session, a PyTorch model under `act_export.hooks.attention_hook`, or another that can be scored.
        tokenizer: The model's.
        examples: At least one.
        batch_size: Prompts that run together.
        length_normalized: Compare choices by log-likelihood per token.
        on_batch: Called after each batch with the number of examples in it.

    Raises:
        TaskError: If there is no tokenizer or no example, or an example can't be scored.
    """
    scores = score_choices(
        _language_model(model),
        encode_examples(tokenizer, examples),
        batch_size=batch_size,
        length_normalized=length_normalized,
        on_batch=on_batch,
    )
    return Evaluation(
        tuple(scores), tuple(map(predicted_choice, scores)), tuple(example.answer for example in examples)
    )


def compare(plain: Evaluation, calibrated: Evaluation) -> Comparison:
    """What the second evaluation gains over the first.

    Raises:
        EvaluationError: If they aren't of the same examples.
    """
    if plain.answers != calibrated.answers:
        raise EvaluationError(
            f"the evaluations have {len(plain.answers)} and {len(calibrated.answers)} examples with different answers; "
            f"compare two models on the same examples"
        )
    pairs = list(zip(plain.correct, calibrated.correct, strict=True))
    gained, lost = pairs.count((False, True)), pairs.count((True, False))
    return Comparison(
        gain=(gained - lost) / len(pairs),
        interval=gain_interval(plain.correct, calibrated.correct),
        p=mcnemar_p(plain.correct, calibrated.correct),
        gained=gained,
        lost=lost,
    )


def _language_model(model: Session | HookedModel | LanguageModel) -> LanguageModel:
    if isinstance(model, HookedModel):
        return TorchLanguageModel(model)
    return SessionLanguageModel(model) if isinstance(model, Session) else model
