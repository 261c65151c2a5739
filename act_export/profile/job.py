"""The profile command's job: prompts by name, which calibration to show, and where unfinished work is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from act_export.calibration.file import DEFAULT_BETA, Calibration
from act_export.errors import ActExportError
from act_export.files import cache_folder
from act_export.profile.prompts import rows_without_answers, text_prompts
from act_export.profile.request import EffectsOf, ProfileOptions, PromptSource, check_names
from act_export.progress import Progress
from act_export.tasks import (
    EncodedExample,
    Example,
    Questions,
    TaskError,
    TaskExamples,
    encode_examples,
    split_examples,
)
from act_export.tasks.splits import RANK, drawn

if TYPE_CHECKING:
    from torch import Tensor

    from act_export.checkpoint.load import Checkpoint
    from act_export.profile.answers import AskedSource
    from act_export.profile.sink_profile import SinkProfile

LENGTH = 1024
_TEXT_TOKENS = 128  # of a text's beginning that is continued
_ANSWERS_SHARE = 0.1  # of the time, about


@dataclass(frozen=True)
class ProfileJob:
    """What to profile, and how.

    Attributes:
        questions: What to ask, and how; its data files may also be of prompts alone. Of each source they are those
            that a search with the same seed ranks heads with, at most 96 and fewer of a small set, so none that it
            reports accuracies on. The scoring matters for effects.
        texts: Text files.
        prompts: Of each source at the most.
        length: Tokens of a sequence that texts are cut into; None for 1024, or what the model takes where that is less.
        effects: Measure what calibrating each head would change, where questions have answers.
        answers: With a calibration, also answer some of the prompts before and after, to show them.
        options: Thresholds and batches.
    """

    questions: Questions = field(default_factory=Questions)
    texts: tuple[Path, ...] = ()
    prompts: int = RANK
    length: int | None = None
    effects: bool = True
    answers: bool = True
    options: ProfileOptions = field(default_factory=ProfileOptions)

    def __post_init__(self) -> None:
        """Raises ActExportError for a number out of range."""
        for name in ("prompts", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ActExportError(f"--{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class SourceQuestions:
    """The questions of one source, before they are tokens.

    Attributes:
        name: A task's, or a file's.
        examples: Those to profile.
        task: How answers are scored; None where there are none.
    """

    name: str
    examples: tuple[Example, ...]
    task: TaskExamples | None


def load_prompts(job: ProfileJob) -> list[SourceQuestions]:
    """The questions of tasks and data files, before any model is loaded.

    Raises:
        ActExportError: If there is no such task or file, or it can't be used, see `act_export.tasks.Questions.load`.
    """
    unanswered = {path: rows_without_answers(path) for path in job.questions.data}
    with_answers = tuple(path for path, rows in unanswered.items() if rows is None)
    answered = replace(job.questions, data=with_answers).load()
    found = [SourceQuestions(task.name, tuple(_ranking(task.examples, job)), task) for task in answered]
    found += [
        SourceQuestions(path.name, tuple(drawn(rows, job.questions.drawing_seed)[: job.prompts]), None)
        for path, rows in unanswered.items()
        if rows is not None
    ]
    for path in job.texts:
        if not path.is_file():
            raise ActExportError(f"there is no text file {path}")
    check_names([*(source.name for source in found), *(path.name for path in dict.fromkeys(job.texts))])
    return found


def encode_prompts(checkpoint: Checkpoint, job: ProfileJob, questions: Sequence[SourceQuestions]) -> list[PromptSource]:
    """The sources as tokens.

    Raises:
        TaskError: If the checkpoint has no tokenizer, or a prompt is too long, naming it.
        ActExportError: If a text can't be used.
    """
    longest = getattr(checkpoint.model.config, "max_position_embeddings", None)
    chat, truncate = job.questions.chat, job.questions.truncate
    sources = []
    for asked in questions:
        encoded = tuple(
            encode_examples(checkpoint.tokenizer, asked.examples, max_length=longest, chat=chat, truncate=truncate)
        )
        measured = job.effects and asked.task is not None
        sources.append(
            PromptSource(
                asked.name,
                tuple(example.prompt for example in encoded),
                encoded if measured else (),
                _effects(checkpoint, asked.task, job) if asked.task is not None and measured else None,
                f"beta {DEFAULT_BETA}, per token {asked.task.length_normalized}" if asked.task is not None else "",
            )
        )
    length = job.length if job.length is not None else min(LENGTH, longest or LENGTH)
    if longest is not None and job.texts and length > longest:
        raise ActExportError(f"--length is {length}; the model takes {longest} tokens")
    sources += [
        PromptSource(path.name, text_prompts(checkpoint.tokenizer, path, length=length, most=job.prompts))
        for path in dict.fromkeys(job.texts)
    ]
    return sources


def run_profile(
    checkpoint: Checkpoint,
    job: ProfileJob,
    questions: Sequence[SourceQuestions],
    *,
    calibration: Calibration | None = None,
    out: Path | None = None,
    progress: Progress | None = None,
) -> SinkProfile:
    """Does the job; one that was interrupted goes on where it stopped.

    Args:
        checkpoint: The model.
        job: What to do.
        questions: What `load_prompts` gave.
        calibration: To show what it changes on one prompt of each source.
        out: Where to write the profile.
        progress: Called before every batch.

    Raises:
        ActExportError: As `encode_prompts` and `act_export.profile.profile_sinks`.
    """
    from act_export.profile.run import profile_sinks

    sources = encode_prompts(checkpoint, job, questions)
    answers = None
    if job.answers and calibration is not None and calibration.heads:
        from act_export.profile.answers import answer_pairs

        answers = answer_pairs(
            checkpoint,
            _asked(checkpoint, job, questions, sources),
            calibration,
            batch_tokens=job.options.batch_tokens,
            progress=_part(progress, 0.0, _ANSWERS_SHARE),
        )
        progress = _part(progress, _ANSWERS_SHARE, 1.0)
    asked = job.questions
    notes: dict[str, object] = {"seed": asked.drawing_seed, "shots": asked.shots, "chat": asked.chat}
    if any(source.effects is not None for source in sources):
        notes |= {"effects_beta": DEFAULT_BETA, "effects_threshold": job.options.absolute_threshold}
    return profile_sinks(
        checkpoint,
        sources,
        job.options,
        calibration=calibration,
        partial=cache_folder() / "profiles",
        out=out,
        progress=progress,
        notes=notes,
        answers=answers,
    )


def _asked(
    checkpoint: Checkpoint, job: ProfileJob, questions: Sequence[SourceQuestions], sources: Sequence[PromptSource]
) -> list[AskedSource]:
    """A few prompts of each source, with room for answers; of a text its beginning."""
    from act_export.profile.answers import NEW_TOKENS, TRIED, AskedSource

    longest = getattr(checkpoint.model.config, "max_position_embeddings", None)
    room = longest - NEW_TOKENS if longest is not None else LENGTH
    if room < 1:
        return []
    count = -(-TRIED // len(sources))
    asked = []
    for source, of in zip_longest(sources, questions):
        if of is None:
            prompts = [prompt[: min(room, _TEXT_TOKENS)] for prompt in source.prompts[:count]]
            asked.append(AskedSource(source.name, [EncodedExample(prompt, (), 0) for prompt in prompts]))
            continue
        fitting = [e for e, p in zip(of.examples, source.prompts, strict=True) if len(p) <= room][:count]
        if fitting:
            chat, truncate = job.questions.chat, job.questions.truncate
            encoded = encode_examples(checkpoint.tokenizer, fitting, max_length=longest, chat=chat, truncate=truncate)
            asked.append(AskedSource(source.name, encoded, fitting, of.task))
    return asked


def _part(progress: Progress | None, begin: float, end: float) -> Progress | None:
    """Progress of a part of all."""
    if progress is None:
        return None
    return lambda step, done: progress(step, begin + (end - begin) * done)


def _ranking(examples: Sequence[Example], job: ProfileJob) -> Sequence[Example]:
    """The questions that a search would rank heads with; of a set that can't be searched on, the first drawn."""
    try:
        return split_examples(examples, seed=job.questions.drawing_seed).rank[: job.prompts]
    except TaskError:  # too few, or too few with one of the answers: no matter here
        return drawn(examples, job.questions.drawing_seed)[: job.prompts]


def _effects(checkpoint: Checkpoint, task: TaskExamples, job: ProfileJob) -> EffectsOf:
    from act_export.search.gates import gate_gradients

    def measure(batch: Sequence[EncodedExample]) -> Tensor:
        gradients = gate_gradients(
            checkpoint.model,
            batch,
            num_layers=checkpoint.identity.num_layers,
            num_heads=checkpoint.identity.num_heads,
            beta=DEFAULT_BETA,
            threshold=job.options.absolute_threshold,
            length_normalized=task.length_normalized,
        )
        return gradients[0]  # by the gate of later sinks

    return measure
