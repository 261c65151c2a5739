"""Exported files on several tasks in one run: the same questions, the same prompts, one file after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from act_export.calibration.file import Calibration
from act_export.calibration.strengths import PLAIN as PLAIN_NAME
from act_export.errors import ActExportError
from act_export.onnx_file.language_model import ModelFile, read_model_file
from act_export.progress import Progress
from act_export.runtime.adapter import SUFFIX
from act_export.runtime.session import Session
from act_export.runtime.text import load_tokenizer
from act_export.tasks import EncodedExample, Example, Questions, encode_examples, prompt_digest
from act_export.tasks.batching import BATCH_SIZE, Batching, default_batch_tokens
from act_export.tasks.examples import TaskExamples
from act_export.tasks.generation import generate_answers
from act_export.tasks.label_prior import content_free_examples, without_label_prior
from act_export.tasks.language_model import SessionLanguageModel
from act_export.tasks.remedies import without_choice_bias
from act_export.tasks.scoring import score_choices, scores_of_choices
from act_export.tasks.splits import place
from act_export.verify.evaluate.answers import (
    AnswerEvaluation,
    Evaluation,
)
from act_export.verify.evaluate.held_out import held_out
from act_export.verify.evaluate.results import (
    CALIBRATED,
    CHOICE_BIAS,
    LABEL_PRIOR,
    PLAIN,
    EvaluationReport,
    EvaluationRequest,
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
    files, calibrations = _read_files(request)
    asked = replace(request.questions, seed=_seed(request.questions, list(calibrations.values()))).load()
    tasks = [_questions(task, list(calibrations.values()), request) for task in asked]
    plain = list(files)[-1]
    has_controls = _is_plain(calibrations[plain])
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


def _seed(questions: Questions, calibrations: Sequence[Calibration | None]) -> int:
    """What few-shot examples are drawn with: what the file's search drew them with, unless another is asked for."""
    origins = [calibration.provenance for calibration in calibrations if calibration is not None]
    seeds = [questions.seed, *(origin.seed for origin in origins if origin is not None)]
    return next((seed for seed in seeds if seed is not None), 0)


def _read_files(request: EvaluationRequest) -> tuple[dict[str, ModelFile], dict[str, Calibration | None]]:
    """The file, and what it is compared with, each with its calibration."""
    files = {CALIBRATED: read_model_file(request.file)}
    if request.against is not None:
        files[PLAIN] = read_model_file(request.against)
    mine, other = files[CALIBRATED], files.get(PLAIN)
    if not mine.ours:
        raise ActExportError(
            f"{mine.path} has no act-export metadata; it wasn't written by act-export. A model that somebody else "
            f"exported can be what a graft of it is measured against: --against {mine.path}"
        )
    if other is not None and other.cache_shape != mine.cache_shape:
        raise ActExportError(
            f"{other.path} isn't the model of {mine.path}: layers, heads or head sizes of the cache differ; compare "
            f"exports of the same model"
        )
    if other is not None and mine.identity is not None and other.identity is not None:
        differences = mine.identity.differences(other.identity)
        if differences:
            what, first, second = differences[0]
            raise ActExportError(
                f"{other.path} isn't the model of {mine.path}: its {what} is {second}, not {first}; compare exports of "
                f"the same model"
            )
    calibrations = {name: file.record.calibration for name, file in files.items()}
    if request.calibration is not None:
        calibrations[CALIBRATED] = _named(mine, request.calibration)
    if other is None and not _is_plain(calibrations[CALIBRATED]):
        files[PLAIN], calibrations[PLAIN] = mine, None
    return files, calibrations


def _named(file: ModelFile, name: str) -> Calibration | None:
    own = file.record.calibrations
    if own is not None and name in own.names:
        return own[name]
    if name.endswith(SUFFIX):
        raise ActExportError(
            f"{name} doesn't say which questions its heads were found on; pass the calibration file that it was made of"
        )
    if name.endswith(".json"):
        return Calibration.load(name)
    raise ActExportError(
        f"{file.path} has no calibration {name!r}; there are {', '.join(own.names) if own is not None else PLAIN_NAME}"
    )


def _choice(file: ModelFile, calibration: Calibration | None) -> Calibration | None:
    """What a session over the file is asked for: a file of somebody else knows only plain."""
    return calibration if file.record.calibrations is not None else None


def _is_plain(calibration: Calibration | None) -> bool:
    return calibration is None or not calibration.num_calibrated_heads


def _questions(
    task: TaskExamples, calibrations: Sequence[Calibration | None], request: EvaluationRequest
) -> TaskExamples:
    """The task with the questions that may be counted, no more than the limit."""
    left = held_out(task.examples, calibrations, split=request.split, seed=request.questions.seed, task=task.name)
    if request.limit is not None and request.limit < len(left):
        left = sorted(left, key=lambda example: place(example, request.questions.drawing_seed))[: request.limit]
    return replace(task, examples=tuple(left))


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
    if controlled and evaluation.same_choices and len(scores) > 1:
        controls[CHOICE_BIAS] = without_choice_bias(evaluation.log_likelihoods)
    return evaluation, {name: Evaluation.of(rows, work.encoded) for name, rows in controls.items()}
