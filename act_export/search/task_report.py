"""From all answers to a task's reported questions to its report."""

from __future__ import annotations

from collections.abc import Mapping

from act_export.search.answers import CHOOSE, CONTENT_FREE, RANK, REPORT, Answers, EncodedTask
from act_export.search.choose import Choice
from act_export.search.controls import (
    best_control,
    choice_bias_accuracies,
    control_answers,
    measures_of,
    predicted_shares,
)
from act_export.search.provenance import tried
from act_export.search.results import CONTROL, WITH_REMEDY, TaskReport, gain_of, invalid_of

JOINT = "joint"
OWN = "own"


def on_split(label: str, split: str) -> str:
    """What answers to another split than the reported one are called."""
    return f"{label}, {split}"


def answers_with_controls(
    task: EncodedTask, answers: Mapping[str, Answers], chosen: Mapping[str, Answers]
) -> dict[str, Answers]:
    """The plain model's answers with each remedy, called `CONTROL` and its name, and calibrated ones with the best.

    Args:
        task: The task.
        answers: By label, "plain" and where there are such `OWN` and `JOINT`, to the report split, and by `on_split` to
            others.
        chosen: By the same labels, to the choose split.

    Returns:
        The calibrated ones by label and `WITH_REMEDY`.
    """
    remedied = {}
    for label in chosen:
        given = {REPORT: answers[label], CHOOSE: chosen[label]}
        others = {split: answers.get(on_split(label, split)) for split in (RANK, CONTENT_FREE)}
        given |= {split: of for split, of in others.items() if of is not None}
        remedied[label] = control_answers(task, given)
    plain = remedied.pop("plain")
    best = best_control(plain)
    found = {CONTROL + name: of for name, of in plain.items()}
    return found | {label + WITH_REMEDY: of[best] for label, of in remedied.items()}


def task_report(task: EncodedTask, choice: Choice, answers: Mapping[str, Answers], passes: float) -> TaskReport:
    """The report.

    Args:
        task: The task.
        choice: Of the task's own set.
        answers: To the report split by label: "plain", `OWN`, `JOINT`, "random N", "published NAME", and those of
            `answers_with_controls`.
        passes: That ranking took.
    """
    plain, own = answers["plain"], answers.get(OWN)
    splits = task.task.splits
    generated = task.task.generation is not None
    controls = {name: a for name, a in answers.items() if name.startswith(CONTROL)}
    best = best_control(controls)
    measures, invalid = measures_of(task, plain), invalid_of(plain)
    return TaskReport(
        task=task.name,
        plain_accuracy=round(plain.accuracy, 4),
        own=gain_of(plain, own) if own is not None else None,
        joint=gain_of(plain, answers[JOINT]) if JOINT in answers else None,
        random_heads=tuple(round(a.accuracy, 4) for label, a in answers.items() if label.startswith("random ")),
        controls={name.removeprefix(CONTROL): round(a.accuracy, 4) for name, a in controls.items()},
        control=best.removeprefix(CONTROL),
        beyond=gain_of(controls[best], own) if own is not None else None,
        with_remedy=gain_of(controls[best], answers[OWN + WITH_REMEDY]) if own is not None else None,
        joint_beyond=gain_of(controls[best], answers[JOINT]) if JOINT in answers else None,
        joint_with_remedy=gain_of(controls[best], answers[JOINT + WITH_REMEDY]) if JOINT in answers else None,
        measures=None if measures is None else (measures, measures_of(task, own) if own is not None else None),
        invalid=None if invalid is None else (invalid, invalid_of(own) if own is not None else None),
        choice_bias=choice_bias_accuracies(
            task, (plain, own), (choice.candidates[0].answers[0], choice.chosen.answers[0])
        )
        if own is not None
        else None,
        published={
            label.removeprefix("published "): round(a.accuracy, 4)
            for label, a in answers.items()
            if label.startswith("published ")
        },
        predicted_shares=predicted_shares(plain, own) if own is not None and not generated else None,
        p=round(choice.p, 4),
        choose_accuracy=tried(choice),
        forward_passes=round(passes, 1),
        sizes={RANK: len(splits.rank), CHOOSE: len(splits.choose), REPORT: len(splits.report)},
        duplicates=splits.duplicates,
    )
