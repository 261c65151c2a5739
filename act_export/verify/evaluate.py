"""Accuracy of a model on questions that its search didn't use, and what calibration gains on the same questions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.calibration import Calibration, Provenance
from act_export.errors import ActExportError
from act_export.hooks import HookedModel
from act_export.runtime.session import Session
from act_export.tasks import (
    Example,
    LanguageModel,
    SessionLanguageModel,
    Splits,
    TaskError,
    TorchLanguageModel,
    encode_examples,
    predicted_choice,
    prompt_digest,
    score_choices,
    split_examples,
    unused,
)
from act_export.tasks.scoring import BATCH_SIZE
from act_export.tasks.splits import CHOOSE, RANK, REPORT
from act_export.tasks.statistics import accuracy_interval, gain_interval, mcnemar_p

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LOGITS_BYTES = 10**9  # of one call at the most, as if it computed the logits of all positions: older files do
_LOGIT_BYTES = 4


class EvaluationError(ActExportError):
    """Two evaluations that can't be compared, or examples that can't be held out."""


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
        batch_size: Prompts that run together at the most; fewer where logits of all positions would take over
            `LOGITS_BYTES`.
        length_normalized: Compare choices by log-likelihood per token.
        on_batch: Called after each batch with the number of examples in it.

    Raises:
        TaskError: If there is no tokenizer or no example, or an example can't be scored.
        ScoringError: If the model's scores aren't finite, naming the prompt.
    """
    encoded = encode_examples(tokenizer, examples)
    assert tokenizer is not None  # else refused above
    scores = score_choices(
        _language_model(model),
        encoded,
        batch_size=batch_size,
        batch_tokens=LOGITS_BYTES // (_LOGIT_BYTES * len(tokenizer)),
        length_normalized=length_normalized,
        on_batch=on_batch,
    )
    return Evaluation(
        tuple(scores), tuple(map(predicted_choice, scores)), tuple(example.answer for example in examples)
    )


def held_out(
    examples: Sequence[Example], calibrations: Sequence[Calibration | None], *, split: str, seed: int | None = None
) -> Sequence[Example]:
    """The examples to evaluate on: none that heads were ranked or chosen with.

    A calibration was searched where its provenance has a seed. Where none was, the examples are those that a search
    with the default sizes would leave, so that a plain model alone is measured on the same ones.

    Args:
        examples: All of the task or the data.
        calibrations: Of every model that will be evaluated; None for a plain one.
        split: "report", the search's report split; "held-out", all that no search used; "all", used or not.
        seed: Of the search; None for the one in the calibrations, or 0 where there is none.

    Raises:
        EvaluationError: For another split, a seed that isn't the search's, or where no example is left.
        TaskError: If there are too few examples to draw the search's splits again.
    """
    if split == "all":
        return examples
    if split not in ("report", "held-out"):
        raise EvaluationError(f"there is no split {split!r}; pass report, held-out or all")
    found = [calibration.provenance for calibration in calibrations if calibration is not None]
    searches = [origin for origin in found if origin is not None and origin.seed is not None]
    if not searches:
        searches = [Provenance("none", seed=seed or 0)]
    drawing = next((search for search in searches if seed in (None, search.seed)), None)
    if drawing is None:
        raise EvaluationError(
            f"the seed is {seed}, but the heads were searched with seed "
            f"{' and '.join(str(search.seed) for search in searches)}; leave it out to evaluate on what that search "
            f"didn't use"
        )
    used = {digest for search in searches for digest in _used_prompts(search, examples)}
    left = unused(_drawn_again(drawing, examples).report if split == "report" else examples, used)
    if not left:
        raise EvaluationError("heads were ranked or chosen with all of these examples; evaluate on others")
    return left


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


def _used_prompts(search: Provenance, examples: Sequence[Example]) -> Collection[str]:
    """Digests of the prompts that heads were ranked or chosen with: recorded, or else drawn again."""
    recorded: Collection[str] | None = search.notes.get("used")
    if recorded is not None:
        return recorded
    splits = _drawn_again(search, examples)
    return [prompt_digest(example.prompt) for example in (*splits.rank, *splits.choose)]


def _drawn_again(search: Provenance, examples: Sequence[Example]) -> Splits:
    defaults = {"rank": RANK, "choose": CHOOSE, "report": REPORT}
    sizes = {name: search.samples.get(name, default) for name, default in defaults.items()}
    try:
        return split_examples(examples, **sizes, seed=search.seed or 0)
    except TaskError as error:
        raise TaskError(f"the search's splits can't be drawn again: {error}; or pass another split") from error
