"""How a model answers the questions of one task, and what calibration gains on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.attention.hook import HookedModel
from act_export.errors import ActExportError
from act_export.runtime.session import Session
from act_export.tasks import EncodedExample, Example, Generation, encode_examples
from act_export.tasks.generation import generate_answers
from act_export.tasks.label_prior import without_label_prior as scores_without_label_prior
from act_export.tasks.language_model import LanguageModel, SessionLanguageModel, TorchLanguageModel
from act_export.tasks.metrics import exact_match, token_f1
from act_export.tasks.scoring import BATCH_SIZE, predicted_choice, score_choices
from act_export.tasks.statistics import accuracy_interval, gain_interval, mcnemar_p, mean_interval
from act_export.verify.evaluate.held_out import held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


__all__ = [
    "AnswerEvaluation",
    "Comparison",
    "Evaluation",
    "compare",
    "evaluate",
    "evaluate_answers",
    "evaluate_choices",
    "held_out",
    "language_model",
    "metric_interval",
]

ACCURACY, EXACT_MATCH, F1 = "accuracy", "exact_match", "f1"
LOGITS_BYTES = 10**9  # of one call at the most, as if it computed the logits of all positions: older files do
_LOGIT_BYTES = 4

OnBatch = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """How a model answers by choosing.

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

    @property
    def main_metric(self) -> str:
        """The metric that averages over tasks are of."""
        return ACCURACY

    @property
    def metrics(self) -> Mapping[str, tuple[float, ...]]:
        """By metric, each example's number, in [0, 1]."""
        return {ACCURACY: tuple(map(float, self.correct))}

    @property
    def questions_asked(self) -> tuple[object, ...]:
        """What two evaluations of the same examples agree in."""
        return self.answers


@dataclass(frozen=True)
class AnswerEvaluation:
    """How a model answers in its own words.

    Attributes:
        texts: By example, what it said.
        references: By example, texts that count as right.
        exact_match: By example, 1 where it said one of these, else 0; see `act_export.tasks.metrics`.
        f1: By example, F1 over words against the best of these.
        main_metric: "exact_match" or "f1": the metric that averages over tasks are of.
    """

    texts: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    exact_match: tuple[float, ...]
    f1: tuple[float, ...]
    main_metric: str

    @property
    def metrics(self) -> Mapping[str, tuple[float, ...]]:
        """By metric, each example's number, in [0, 1]."""
        return {EXACT_MATCH: self.exact_match, F1: self.f1}

    @property
    def questions_asked(self) -> tuple[object, ...]:
        """What two evaluations of the same examples agree in."""
        return self.references


@dataclass(frozen=True)
class Comparison:
    """What calibration changes, on the same examples.

    Attributes:
        gain: The calibrated model's mean minus the plain model's.
        interval: 95% interval of the gain, by a paired bootstrap.
        p: McNemar's, exact and two-sided: how often luck alone makes so uneven a change. None for F1, where an answer
            is right by part.
        gained: Number of examples that the calibrated model answers better.
        lost: Number of examples that the plain model answers better.
    """

    gain: float
    interval: tuple[float, float]
    p: float | None
    gained: int
    lost: int


def evaluate(
    model: Session | HookedModel | LanguageModel,
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Sequence[Example],
    *,
    batch_size: int | None = BATCH_SIZE,
    length_normalized: bool = False,
    on_batch: OnBatch | None = None,
) -> Evaluation:
    """Encodes examples and answers every one with its likeliest choice.

    Args:
        model: An open session, a PyTorch model under `act_export.attention.hook.attention_hook`, or another that can be
        scored. tokenizer: The model's.
        examples: At least one, with choices.
        batch_size: Prompts that run together at the most; fewer where logits of all positions would take over
            `LOGITS_BYTES`.
        length_normalized: Compare choices by log-likelihood per token.
        on_batch: Called after each batch with the number of examples in it.

    Raises:
        TaskError: If there is no tokenizer or no example, or an example can't be scored.
        ActExportError: If the model's scores aren't finite, naming the prompt.
    """
    encoded = encode_examples(tokenizer, examples)
    assert tokenizer is not None  # else refused above
    return evaluate_choices(
        language_model(model),
        encoded,
        batch_size=batch_size,
        batch_tokens=default_batch_tokens(tokenizer),
        length_normalized=length_normalized,
        on_batch=on_batch,
    )


def evaluate_choices(
    model: LanguageModel,
    examples: Sequence[EncodedExample],
    *,
    batch_size: int | None = BATCH_SIZE,
    batch_tokens: int | None = None,
    length_normalized: bool = False,
    on_batch: OnBatch | None = None,
) -> Evaluation:
    """Answers every example with its likeliest choice; arguments and errors as of `act_export.tasks.score_choices`."""
    scores = score_choices(
        model,
        examples,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        length_normalized=length_normalized,
        on_batch=on_batch,
    )
    return Evaluation(
        tuple(scores), tuple(map(predicted_choice, scores)), tuple(example.answer for example in examples)
    )


def evaluate_answers(
    model: LanguageModel,
    examples: Sequence[EncodedExample],
    generation: Generation,
    *,
    tokenizer: PreTrainedTokenizerBase,
    stop_tokens: Sequence[int] = (),
    batch_size: int | None = BATCH_SIZE,
    batch_tokens: int | None = None,
    on_batch: OnBatch | None = None,
) -> AnswerEvaluation:
    """Lets the model answer every example in its own words, greedily.

    Args:
        model: PyTorch or ONNX Runtime.
        examples: With references.
        generation: How long an answer may be, what ends it, and the metric that counts.
        tokenizer: Of the model.
        stop_tokens: Tokens that end an answer, beside the tokenizer's own.
        batch_size: See `act_export.tasks.generation.generate_answers`, as for the rest.
        batch_tokens: Tokens that run together at the most.
        on_batch: Called after each batch with the number of examples in it.

    Raises:
        ActExportError: If the model's logits aren't finite, naming the prompt.
    """
    texts = generate_answers(
        model,
        examples,
        tokenizer=tokenizer,
        max_new_tokens=generation.max_new_tokens,
        stop=generation.stop,
        stop_tokens=stop_tokens,
        batch_size=batch_size,
        batch_tokens=batch_tokens,
        on_batch=on_batch,
    )
    references = tuple(example.references for example in examples)
    return AnswerEvaluation(
        texts=tuple(texts),
        references=references,
        exact_match=tuple(map(exact_match, texts, references)),
        f1=tuple(map(token_f1, texts, references)),
        main_metric=EXACT_MATCH if generation.metric == "exact" else F1,
    )


def compare(
    plain: Evaluation | AnswerEvaluation, calibrated: Evaluation | AnswerEvaluation, *, metric: str | None = None
) -> Comparison:
    """What the second evaluation gains over the first.

    Args:
        plain: Of the plain model.
        calibrated: Of the calibrated model, on the same examples.
        metric: One of the evaluations' `metrics`; None for the main one.

    Raises:
        ActExportError: If they aren't of the same examples.
    """
    if plain.questions_asked != calibrated.questions_asked:
        raise ActExportError(
            f"the evaluations have {len(plain.questions_asked)} and {len(calibrated.questions_asked)} examples with "
            f"different answers; compare two models on the same examples"
        )
    metric = metric or plain.main_metric
    before, after = plain.metrics[metric], calibrated.metrics[metric]
    differences = [new - old for old, new in zip(before, after, strict=True)]
    by_part = metric == F1
    return Comparison(
        gain=sum(differences) / len(differences),
        interval=mean_interval([differences]) if by_part else gain_interval(before, after),
        p=None if by_part else mcnemar_p(before, after),
        gained=sum(difference > 0 for difference in differences),
        lost=sum(difference < 0 for difference in differences),
    )


def metric_interval(evaluation: Evaluation | AnswerEvaluation, metric: str) -> tuple[float, float]:
    """95% interval of a metric's mean: by Wilson's score, of F1 by a bootstrap."""
    values = evaluation.metrics[metric]
    return mean_interval([values]) if metric == F1 else accuracy_interval(int(sum(values)), len(values))


def language_model(model: Session | HookedModel | LanguageModel) -> LanguageModel:
    """What scoring and generation run, of a session or a PyTorch model under a hook."""
    if isinstance(model, HookedModel):
        return TorchLanguageModel(model)
    return SessionLanguageModel(model) if isinstance(model, Session) else model


def default_batch_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that run together at the most, so that logits of all of them take no more than `LOGITS_BYTES`."""
    return LOGITS_BYTES // (_LOGIT_BYTES * len(tokenizer))


def without_label_prior(evaluation: Evaluation, examples: Sequence[Example], content_free: Evaluation) -> Evaluation:
    """The evaluation with each choice's log-likelihood less that after the content-free prompt.

    Args:
        evaluation: Of `examples`.
        examples: Each with a content-free prompt.
        content_free: The same model's, of `content_free_examples(examples)`.
    """
    scores = tuple(scores_without_label_prior(evaluation.log_likelihoods, examples, content_free.log_likelihoods))
    return Evaluation(scores, tuple(map(predicted_choice, scores)), evaluation.answers)
