"""Has the files of an evaluation answer the questions of its tasks, one file after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.onnx_file.language_model import ModelFile
from act_export.progress import Progress
from act_export.runtime.session import Session
from act_export.runtime.text import load_tokenizer
from act_export.tasks import EncodedExample, Example, encode_examples, prompt_digest
from act_export.tasks.batching import BATCH_SIZE, Batching, default_batch_tokens
from act_export.tasks.examples import TaskExamples
from act_export.tasks.generation import generate_answers
from act_export.tasks.label_prior import content_free_examples, without_label_prior
from act_export.tasks.language_model import SessionLanguageModel
from act_export.tasks.remedies import share_choices, without_choice_bias
from act_export.tasks.scoring import score_choices, scores_of_choices
from act_export.verify.evaluate.answers import AnswerEvaluation, Evaluation
from act_export.verify.evaluate.files import is_plain
from act_export.verify.evaluate.request import CALIBRATED, PLAIN, EvaluationRequest
from act_export.verify.evaluate.results import (
    CHOICE_BIAS,
    LABEL_PRIOR,
    EvaluationReport,
    TaskResult,
    average_over,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class _Work:
    """A task's questions, as tokens."""

    task: TaskExamples
    encoded: Sequence[EncodedExample]
    content_free: Sequence[EncodedExample]


def answer_tasks(
    request: EvaluationRequest,
    files: Mapping[str, ModelFile],
    calibrations: Mapping[str, Calibration | None],
    tasks: Sequence[TaskExamples],
    progress: Progress,
) -> EvaluationReport:
    """Opens each file in turn, and asks it.

    Args:
        request: How to ask.
        files: By side, what `act_export.verify.evaluate.files.read_files` gave.
        calibrations: By side, of the file.
        tasks: With the questions that may be counted.
        progress: Called after every batch.

    Raises:
        ActExportError: As `act_export.verify.evaluate.job.evaluate_files`.
    """
    plain = list(files)[-1]
    has_controls = is_plain(calibrations[plain])
    steps = _Steps(progress)
    work: list[_Work] = []
    found: dict[str, list[tuple[Evaluation | AnswerEvaluation, dict[str, Evaluation]]]] = {}
    tokenizer: PreTrainedTokenizerBase | None = None
    for name, file in files.items():
        opened = Session.open(
            file.path, native=not request.portable, device=request.device, calibration=_choice(file, calibrations[name])
        )
        with opened as session:
            if tokenizer is None:
                tokenizer = load_tokenizer(session, request.tokenizer, trust_remote_code=request.trust_remote_code)
                work = [_encode(task, tokenizer, file.limits.context, request, has_controls) for task in tasks]
                steps.plan(work, len(files))
            controlled = has_controls and name == plain
            found[name] = [_evaluate(session, tokenizer, one, request, steps, name, controlled) for one in work]
    results = tuple(
        TaskResult(
            one.task.name,
            tuple(prompt_digest(example.question) for example in one.task.examples),
            found[CALIBRATED][index][0],
            found[PLAIN][index][0] if PLAIN in found else None,
            found[plain][index][1],
        )
        for index, one in enumerate(work)
    )
    return EvaluationReport(request, results, average_over(results))


def _choice(file: ModelFile, calibration: Calibration | None) -> Calibration | None:
    """What a session over the file is asked for: a file of somebody else knows only plain."""
    return calibration if file.record.calibrations is not None else None


def _encode(
    task: TaskExamples,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    request: EvaluationRequest,
    has_controls: bool,
) -> _Work:
    if task.generation is not None and context is not None:
        if context <= task.generation.max_new_tokens:
            raise ActExportError(
                f"an answer of {task.name} may have {task.generation.max_new_tokens} tokens; the context of "
                f"{request.file} holds {context}, so there is no room for a question"
            )
        context -= task.generation.max_new_tokens

    def encode(examples: Sequence[Example]) -> list[EncodedExample]:
        asked = request.questions
        return encode_examples(tokenizer, examples, max_length=context, chat=asked.chat, truncate=asked.truncate)

    content_free = content_free_examples(task.examples) if has_controls and task.generation is None else ()
    return _Work(task, encode(task.examples), encode(content_free) if content_free else ())


class _Steps:
    """Counts prompt tokens, which is about what the time goes by."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.total = 1.0
        self.passed = 0.0

    def plan(self, work: Sequence[_Work], files: int) -> None:
        self.total = sum(files * _tokens(one.encoded) + _tokens(one.content_free) for one in work)

    def counter(self, step: str, examples: Sequence[EncodedExample]) -> Callable[[int], None]:
        tokens_of_one = _tokens(examples) / len(examples)
        self.progress(step, min(1.0, self.passed / self.total))

        def count(batch: int) -> None:
            self.passed += batch * tokens_of_one
            self.progress(step, min(1.0, self.passed / self.total))

        return count


def _tokens(examples: Sequence[EncodedExample]) -> int:
    return sum(len(example.prompt) for example in examples)


def _evaluate(
    session: Session,
    tokenizer: PreTrainedTokenizerBase,
    work: _Work,
    request: EvaluationRequest,
    steps: _Steps,
    name: str,
    controlled: bool,
) -> tuple[Evaluation | AnswerEvaluation, dict[str, Evaluation]]:
    """What a file answers, and its controls by name."""
    model = SessionLanguageModel(session)
    size = BATCH_SIZE if request.batch_tokens is None else None
    if not session.pads_left:
        size = 1
    tokens = request.batch_tokens or default_batch_tokens(tokenizer)
    step, generation = f"{work.task.name}, {name}", work.task.generation
    batching = Batching(size, tokens, steps.counter(step, work.encoded))
    if generation is not None:
        texts = generate_answers(
            model,
            work.encoded,
            batching,
            tokenizer=tokenizer,
            max_new_tokens=generation.max_new_tokens,
            stop=generation.stop,
            stop_tokens=session.limits.stop_tokens,
        )
        return AnswerEvaluation.of(texts, [example.references for example in work.encoded], generation.metric), {}
    per_token = work.task.length_normalized
    scores = score_choices(model, work.encoded, batching, length_normalized=per_token)
    evaluation = Evaluation.of(scores, work.encoded)
    controls: dict[str, list[tuple[float, ...]]] = {}
    if controlled and work.content_free:
        counter = steps.counter(f"{work.task.name}, label prior", work.content_free)
        rows = score_choices(model, work.content_free, replace(batching, done=counter), length_normalized=per_token)
        priors = scores_of_choices(rows, work.content_free)
        controls[LABEL_PRIOR] = without_label_prior(evaluation.log_likelihoods, work.task.examples, priors)
    if controlled and share_choices(work.encoded) and len(scores) > 1:
        controls[CHOICE_BIAS] = without_choice_bias(evaluation.log_likelihoods)
    return evaluation, {name: Evaluation.of(rows, work.encoded) for name, rows in controls.items()}
