"""Exported files on several tasks in one run: the same questions, the same prompts, one file after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from act_export.calibration.file import Calibration
from act_export.calibration.strengths import PLAIN as PLAIN_NAME
from act_export.progress import Progress
from act_export.tasks import Questions
from act_export.tasks.examples import TaskExamples
from act_export.tasks.splits import place
from act_export.verify.evaluate.files import read_files
from act_export.verify.evaluate.held_out import held_out
from act_export.verify.evaluate.request import CALIBRATED, EvaluationRequest

if TYPE_CHECKING:
    from act_export.verify.evaluate.results import EvaluationReport


def evaluate_files(request: EvaluationRequest, *, progress: Progress = lambda _step, _done: None) -> EvaluationReport:
    """Evaluates a file, and what it is compared with, on questions that no search used.

    Args:
        request: What to evaluate.
        progress: Called after every batch.

    Raises:
        ActExportError: If the files are of different models, or a task has no question left; if the model's scores
            aren't finite; if a file can't be read or run, or has no tokenizer.
        TaskError: If there is no such task, its rows can't be had, or an example can't be scored.
    """
    files, calibrations = read_files(request)
    asked = replace(request.questions, seed=_seed(request.questions, list(calibrations.values()))).load()
    tasks = [_questions(task, list(calibrations.values()), request) for task in asked]
    from act_export.verify.evaluate.answer_tasks import answer_tasks  # with torch

    report = answer_tasks(request, files, calibrations, tasks, progress)
    own = files[CALIBRATED].record.calibrations
    if len(files) > 1 or own is None or request.calibration is not None:
        return report
    return replace(report, others=tuple(name for name in own.names if name != PLAIN_NAME))


def _seed(questions: Questions, calibrations: Sequence[Calibration | None]) -> int:
    """What few-shot examples are drawn with: what the file's search drew them with, unless another is asked for."""
    origins = [calibration.provenance for calibration in calibrations if calibration is not None]
    seeds = [questions.seed, *(origin.seed for origin in origins if origin is not None)]
    return next((seed for seed in seeds if seed is not None), 0)


def _questions(
    task: TaskExamples, calibrations: Sequence[Calibration | None], request: EvaluationRequest
) -> TaskExamples:
    """The task with the questions that may be counted, no more than the limit."""
    left = held_out(task.examples, calibrations, split=request.split, seed=request.questions.seed, task=task.name)
    if request.limit is not None and request.limit < len(left):
        left = sorted(left, key=lambda example: place(example, request.questions.drawing_seed))[: request.limit]
    return replace(task, examples=tuple(left))
