"""An evaluation without the model's label prior; see `act_export.tasks.label_prior`."""

from __future__ import annotations

from collections.abc import Sequence

from act_export.tasks import Example, predicted_choice
from act_export.tasks.label_prior import content_free_examples
from act_export.tasks.label_prior import without_label_prior as scores_without_label_prior
from act_export.verify.evaluate import Evaluation

__all__ = ["content_free_examples", "without_label_prior"]


def without_label_prior(evaluation: Evaluation, examples: Sequence[Example], content_free: Evaluation) -> Evaluation:
    """The evaluation with each choice's log-likelihood less that after the content-free prompt.

    Args:
        evaluation: Of `examples`.
        examples: Each with a content-free prompt.
        content_free: The same model's, of `content_free_examples(examples)`.
    """
    scores = tuple(scores_without_label_prior(evaluation.log_likelihoods, examples, content_free.log_likelihoods))
    return Evaluation(scores, tuple(map(predicted_choice, scores)), evaluation.answers)
