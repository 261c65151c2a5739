"""Answers of the model, plain or calibrated in some way, to one split of a task's questions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.calibration.file import Calibration
from act_export.checkpoint.load import Checkpoint
from act_export.checkpoint.stop_tokens import stop_tokens
from act_export.journal import are_numbers
from act_export.search.processes import Unit, Workers
from act_export.search.request import SearchOptions, SearchTask
from act_export.tasks import EncodedExample, Example, encode_examples
from act_export.tasks.batching import Batching, batches, positions_of
from act_export.tasks.generation import generate_answers
from act_export.tasks.label_prior import content_free_examples
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.metrics import exact_match, token_f1
from act_export.tasks.scoring import predicted_choice, score_choices, scores_of_choices

RANK, CHOOSE, REPORT, CONTENT_FREE = "rank", "choose", "report", "content-free"
METRICS = {"exact": exact_match, "f1": token_f1}


@dataclass(frozen=True)
class EncodedTask:
    """A task's questions as tokens.

    Attributes:
        task: The task.
        splits: Examples by split; "content-free" has those of the report split, or none.
        stop_tokens: That end an answer, where answers are generated.
    """

    task: SearchTask
    splits: Mapping[str, tuple[EncodedExample, ...]]
    stop_tokens: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """The task's."""
        return self.task.name

    @property
    def digest(self) -> str:
        """Different for different questions, choices, answers or splits."""
        content = {
            name: [[e.prompt, e.choices, e.answer, e.references, e.first_token] for e in examples]
            for name, examples in self.splits.items()
        }
        settings = [self.task.length_normalized, repr(self.task.generation)]
        return hashlib.sha256(json.dumps([content, settings]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Answers:
    """How well questions were answered.

    Attributes:
        scores: By example, log-likelihoods of its choices; empty rows where the answer is generated.
        credits: By example, 1 for a right answer and 0 for a wrong one; between where the metric is F1.
        log_likelihood: Mean log-likelihood of the right answer among the choices, or where first tokens are compared
            among all tokens; 0 where the answer is generated.
        valid: By example, whether the likeliest first token is a choice's; None where first tokens aren't compared.
    """

    scores: tuple[tuple[float, ...], ...]
    credits: tuple[float, ...]
    log_likelihood: float
    valid: tuple[bool, ...] | None = None

    @property
    def accuracy(self) -> float:
        """Mean credit."""
        return sum(self.credits) / len(self.credits)

    @property
    def invalid(self) -> float | None:
        """Share of answers that are none of the choices; None where first tokens aren't compared."""
        return None if self.valid is None else 1 - sum(self.valid) / len(self.valid)

    @property
    def valid_accuracy(self) -> float | None:
        """Mean credit of valid answers; None where there is none, or first tokens aren't compared."""
        return sum(self.credits) / sum(self.valid) if self.valid and any(self.valid) else None


def encode_task(checkpoint: Checkpoint, task: SearchTask) -> EncodedTask:
    """Encodes a task's splits.

    Raises:
        TaskError: If the checkpoint has no tokenizer, or an example can't be scored.
    """
    longest = getattr(checkpoint.model.config, "max_position_embeddings", None)
    if longest is not None and task.generation is not None:
        longest -= task.generation.max_new_tokens

    def encode(examples: Sequence[Example]) -> tuple[EncodedExample, ...]:
        asked = task.questions
        return tuple(
            encode_examples(
                checkpoint.tokenizer, examples, max_length=longest, chat=asked.chat, truncate=asked.truncate
            )
        )

    splits = {RANK: task.splits.rank, CHOOSE: task.splits.choose, REPORT: task.splits.report}
    encoded = {name: encode(examples) for name, examples in splits.items()}
    neutral = content_free_examples(task.splits.report) if task.generation is None else ()
    ends = tuple(stop_tokens(checkpoint)) if task.generation is not None else ()
    return EncodedTask(task, {**encoded, CONTENT_FREE: encode(neutral) if neutral else ()}, ends)


def answer(
    checkpoint: Checkpoint,
    requests: Sequence[tuple[EncodedTask, str, Calibration | None]],
    options: SearchOptions,
    workers: Workers,
    *,
    step: str,
) -> list[Answers]:
    """Answers to splits of tasks.

    Args:
        checkpoint: The model.
        requests: Task, name of the split, and how the model is calibrated; None for not at all.
        options: For `batch_tokens`.
        workers: Who computes them.
        step: What to call it when reporting progress.

    Returns:
        One for each request.

    Raises:
        ActExportError: If a score isn't finite, naming the prompt.
    """
    units: list[Unit] = []
    parts: list[list[list[int]]] = []
    for task, split, calibration in requests:
        examples = task.splits[split]
        parts.append(list(batches(examples, Batching(None, options.batch_tokens))))
        for number, indices in enumerate(parts[-1]):
            batch = [examples[index] for index in indices]
            counts = [1 if task.task.generation is not None else example.num_scores for example in batch]
            units.append(
                Unit(
                    f"answer {task.name} {split} {number} {_digest(calibration)}",
                    cost_of(batch),
                    lambda batch=batch, task=task, calibration=calibration: _answer_batch(  # type: ignore[misc]
                        checkpoint, task, batch, calibration
                    ),
                    lambda value, counts=counts: _are_answers(value, counts),  # type: ignore[misc]
                )
            )
    results = iter(workers.run(step, units))
    answers = []
    for (task, split, _), batches_of in zip(requests, parts, strict=True):
        examples = task.splits[split]
        rows: list[tuple[float, ...]] = [()] * len(examples)
        for indices in batches_of:
            for index, row in zip(indices, next(results), strict=True):
                rows[index] = tuple(row)
        answers.append(_judge(task, examples, rows))
    return answers


def _are_answers(value: Any, counts: Sequence[int]) -> bool:
    """Whether a journal's value has a row of so many numbers for each example."""
    return isinstance(value, list) and len(value) == len(counts) and all(map(are_numbers, value, counts))


def cost_of(batch: Sequence[EncodedExample]) -> float:
    """About what one forward pass of a batch costs."""
    return float(positions_of(batch))


def _answer_batch(
    checkpoint: Checkpoint, task: EncodedTask, batch: Sequence[EncodedExample], calibration: Calibration | None
) -> list[list[float]]:
    """By example, its row of scores, or where the answer is generated its credit."""
    with attention_hook(checkpoint.model, FastAttention(calibration)) as hooked:
        model = TorchLanguageModel(hooked)
        generation = task.task.generation
        if generation is None:
            scores = score_choices(model, batch, Batching(None), length_normalized=task.task.length_normalized)
            return [list(row) for row in scores]
        assert checkpoint.tokenizer is not None  # or nothing could have been encoded
        texts = generate_answers(
            model,
            batch,
            tokenizer=checkpoint.tokenizer,
            max_new_tokens=generation.max_new_tokens,
            stop=generation.stop,
            stop_tokens=task.stop_tokens,
        )
    return [[METRICS[generation.metric](text, e.references)] for text, e in zip(texts, batch, strict=True)]


def _judge(task: EncodedTask, examples: Sequence[EncodedExample], rows: Sequence[tuple[float, ...]]) -> Answers:
    if task.task.generation is not None:
        return Answers(((),) * len(rows), tuple(row[0] for row in rows), 0.0)
    said = [predicted_choice(row) for row in rows]
    correct = tuple(float(choice == e.answer) for choice, e in zip(said, examples, strict=True))
    right = [
        row[e.answer] - (0.0 if e.first_token else float(np.logaddexp.reduce(row)))
        for row, e in zip(rows, examples, strict=True)
    ]
    valid = tuple(choice < len(e.choices) for choice, e in zip(said, examples, strict=True))
    return Answers(
        tuple(scores_of_choices(rows, examples)),
        correct,
        float(np.mean(right)) if right else 0.0,
        valid if examples and examples[0].first_token else None,
    )


def _digest(calibration: Calibration | None) -> str:
    if calibration is None or not calibration.heads:
        return "plain"
    said = [sorted(calibration.heads.items()), calibration.threshold, calibration.threshold_mode]
    for strength in (calibration.beta, calibration.gamma):
        said.append([strength] if not isinstance(strength, Mapping) else sorted(strength.items()))
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]
