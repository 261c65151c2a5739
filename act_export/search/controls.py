"""What else would have helped the plain model: cheap remedies, fitted on questions that took part in the search.

A calibration is worth what it adds beyond the best of them. The best is taken by its accuracy on the reported questions
themselves, which favours the remedies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from act_export.search.answers import CHOOSE, CONTENT_FREE, RANK, REPORT, Answers, EncodedTask
from act_export.tasks.label_prior import without_label_prior
from act_export.tasks.measures import Measures, measure
from act_export.tasks.remedies import (
    fitted_offsets,
    fitted_remedy,
    remedied_log_likelihoods,
    same_choices,
    share_choices,
    with_offsets,
    without_choice_bias,
)
from act_export.tasks.scoring import predicted_choice

PLAIN = "plain"


def have_same_choices(task: EncodedTask) -> bool:
    """Whether all questions of a task have the same choices, in the same order."""
    return task.task.generation is None and same_choices([e for split in task.splits.values() for e in split])


def can_lean(task: EncodedTask) -> bool:
    """Whether a task's questions share their choices, so that a lean to one can be told and taken off."""
    return task.task.generation is None and share_choices([e for split in task.splits.values() for e in split])


def control_answers(task: EncodedTask, plain: Mapping[str, Answers]) -> dict[str, Answers]:
    """Answers of a model to the reported questions with each remedy that fits the task, and with none.

    Args:
        task: The task.
        plain: The model's answers by split, mostly the plain one's; of the ranking split only where it `can_lean`.

    Returns:
        By name: "plain"; "choices only" where first tokens are compared: no other token may be the answer; "label
        prior", see `act_export.tasks.label_prior`; "choice bias" and "offsets", see `act_export.tasks.remedies`.
    """
    answers = plain[REPORT]
    if task.task.generation is not None:
        return {PLAIN: answers}
    rows = {PLAIN: answers.scores}
    if answers.valid is not None:
        rows["choices only"] = answers.scores
    if task.splits[CONTENT_FREE]:
        neutral = plain[CONTENT_FREE].scores
        rows["label prior"] = tuple(without_label_prior(answers.scores, task.task.splits.report, neutral))
    if can_lean(task):
        rows["choice bias"] = tuple(without_choice_bias(answers.scores, plain[CHOOSE].scores))
        labelled = [e.answer for split in (RANK, CHOOSE) for e in task.splits[split]]  # as many as a calibration has
        offsets = fitted_offsets([*plain[RANK].scores, *plain[CHOOSE].scores], labelled)
        rows["offsets"] = tuple(with_offsets(answers.scores, offsets))
    return {name: answers if name == PLAIN else with_scores(task, answers, given) for name, given in rows.items()}


def best_control(controls: Mapping[str, Answers]) -> str:
    """Name of the most accurate; of equals the first."""
    return max(controls, key=lambda name: controls[name].accuracy)


def with_scores(task: EncodedTask, answers: Answers, scores: Sequence[tuple[float, ...]]) -> Answers:
    """Answers to the reported questions by other scores: the likeliest choice."""
    right = (float(predicted_choice(row) == e.answer) for row, e in zip(scores, task.splits[REPORT], strict=True))
    return replace(answers, scores=tuple(scores), credits=tuple(right), valid=None)


def log_likelihoods_beyond_remedy(task: EncodedTask, split: str, answers: Answers) -> tuple[float, ...]:
    """By example of the split, what its right answer is worth where neither lean nor confidence counts.

    See `act_export.tasks.remedies.remedied_log_likelihoods`.
    """
    right = [example.answer for example in task.splits[split]]
    return remedied_log_likelihoods(answers.scores, right, offsets=can_lean(task))


def credits_with_remedy(task: EncodedTask, split: str, answers: Answers) -> tuple[float, ...]:
    """By example of the split, 1 where its answer is right with the same remedy, else 0."""
    right = [example.answer for example in task.splits[split]]
    remedy = fitted_remedy(answers.scores, right, offsets=can_lean(task))
    said = with_offsets(answers.scores, [offset / remedy.sharpness for offset in remedy.offsets])
    return tuple(float(predicted_choice(row) == answer) for row, answer in zip(said, right, strict=True))


def choice_bias_accuracies(
    task: EncodedTask, report: tuple[Answers, Answers], choose: tuple[Answers, Answers]
) -> tuple[float, float] | None:
    """Accuracies of the plain and the calibrated model on the report split without their mean preference on the other.

    None where the questions don't share their choices.
    """
    if not can_lean(task):
        return None
    plain, calibrated = (
        with_scores(task, mine, without_choice_bias(mine.scores, others.scores)).accuracy
        for mine, others in zip(report, choose, strict=True)
    )
    return round(plain, 4), round(calibrated, 4)


def predicted_shares(plain: Answers, calibrated: Answers) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How often each choice, by its index, is the likeliest of the choices."""
    most = max(map(len, plain.scores))
    counts = [
        np.bincount([predicted_choice(row) for row in answers.scores], minlength=most) / len(answers.scores)
        for answers in (plain, calibrated)
    ]
    first, second = (tuple(round(float(share), 4) for share in shares) for shares in counts)
    return first, second


def measures_of(task: EncodedTask, answers: Answers) -> Measures | None:
    """Measures that leaning to one answer doesn't raise; None where answers are generated."""
    if task.task.generation is not None:
        return None
    return measure(
        answers.scores, [e.answer for e in task.splits[REPORT]], same_choices=have_same_choices(task)
    ).rounded()
