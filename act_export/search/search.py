"""Checkpoint and examples -> calibration: which heads answer better when their later sinks are calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers

import act_export
from act_export.calibration import DEFAULT_BETA, DEFAULT_THRESHOLD, Calibration, Provenance
from act_export.checkpoint import Checkpoint
from act_export.hooks import attention_hook
from act_export.search.choice_bias import same_choices, without_choice_bias
from act_export.search.choose import HEAD_COUNTS, Choice, Heads, Scores, candidate_heads, choose_heads, right_answers
from act_export.search.fast_attention import FastAttention
from act_export.search.gates import gate_gradients
from act_export.tasks import (
    EncodedExample,
    Splits,
    TorchLanguageModel,
    encode_examples,
    predicted_choice,
    prompt_digest,
    score_choices,
)
from act_export.tasks.scoring import BATCH_SIZE
from act_export.tasks.statistics import gain_interval, mcnemar_p

METHOD = "gates"
_GRADIENT_COST = 3  # of a prompt, in forward passes

Progress = Callable[[str, float], None]
"""Called with what is being done and how much of the whole search is done, from 0 to 1."""


def search_heads(
    checkpoint: Checkpoint,
    splits: Splits,
    *,
    tasks: Sequence[str] = (),
    beta: float = DEFAULT_BETA,
    threshold: float | None = None,
    threshold_mode: str = "absolute",
    seed: int = 0,
    head_counts: Sequence[int] = HEAD_COUNTS,
    batch_size: int = BATCH_SIZE,
    length_normalized: bool = False,
    progress: Progress | None = None,
) -> Calibration:
    """Ranks all heads with one backward pass, chooses how many, and measures what that gains.

    The three splits keep the three steps honest: heads are ranked on one, their number (or none) is decided on the
    second, and the accuracies in the result's provenance come from the third, which takes no part in either. The
    provenance's note "used" has the digests of the first two's prompts, so that no later evaluation counts them.

    Args:
        checkpoint: The model; its parameters stay as they are and receive no gradient.
        splits: Examples, see `act_export.tasks.split_examples`.
        tasks: What to call the examples in the provenance.
        beta: In [0, 2], for every calibrated head.
        threshold: tau, or alpha where the mode is "relative"; None for the mode's default.
        threshold_mode: "absolute" or "relative".
        seed: What the splits were drawn with; also seeds the statistics.
        head_counts: Numbers of heads to try.
        batch_size: Prompts that run together.
        length_normalized: Compare choices by log-likelihood per token.
        progress: Called after every batch.

    Returns:
        The calibration, fit for this checkpoint only; without any heads where calibration doesn't help.

    Raises:
        CalibrationError: If beta, the threshold or its mode is out of range.
        TaskError: If the checkpoint has no tokenizer or an example can't be scored.
        ScoringError: If the model's scores aren't finite, naming the prompt.
        UnsupportedModelError: If the model's attention can't be replaced.
    """
    if threshold is None:
        threshold = DEFAULT_THRESHOLD.get(threshold_mode, 0.0)
    none = Calibration({}, beta, threshold, threshold_mode, checkpoint.identity)
    longest = getattr(checkpoint.model.config, "max_position_embeddings", None)
    rank, choose, report = (
        encode_examples(checkpoint.tokenizer, part, max_length=longest)
        for part in (splits.rank, splits.choose, splits.report)
    )
    work = _Work(_GRADIENT_COST * len(rank) + (1 + len(head_counts)) * len(choose) + 2 * len(report), progress)

    def score(heads: Heads, examples: Sequence[EncodedExample]) -> Scores:
        hook = FastAttention(Calibration(heads, beta, threshold, threshold_mode) if heads else None)
        with attention_hook(checkpoint.model, hook) as hooked:
            return score_choices(
                TorchLanguageModel(hooked),
                examples,
                batch_size=batch_size,
                length_normalized=length_normalized,
                on_batch=work.done,
            )

    work.begin("ranking heads")
    gradients = gate_gradients(
        checkpoint.model,
        rank,
        num_layers=checkpoint.identity.num_layers,
        num_heads=checkpoint.identity.num_heads,
        beta=beta,
        threshold=threshold,
        threshold_mode=threshold_mode,
        batch_size=batch_size,
        length_normalized=length_normalized,
        on_batch=lambda count: work.done(_GRADIENT_COST * count),
    )
    work.begin("choosing how many")
    choice = choose_heads(
        candidate_heads(gradients, head_counts), choose, lambda heads: score(heads, choose), seed=seed
    )
    work.begin("measuring the gain")
    plain = score({}, report)
    calibrated = score(choice.heads, report) if choice.heads else plain
    work.finish()
    return Calibration(
        choice.heads,
        none.beta,
        none.threshold,
        none.threshold_mode,
        none.model,
        _provenance(choice, splits, choose, report, plain, calibrated, tasks=tasks, seed=seed),
    )


class _Work:
    """Counts forward passes of single prompts."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self.total = total
        self.passes = 0
        self.progress = progress
        self.step = ""

    def begin(self, step: str) -> None:
        self.step = step
        self.done(0)

    def done(self, passes: int) -> None:
        self.passes += passes
        if self.progress is not None:
            self.progress(self.step, min(self.passes / self.total, 1.0))

    def finish(self) -> None:
        self.passes = self.total
        self.done(0)


def _provenance(
    choice: Choice,
    splits: Splits,
    choose: Sequence[EncodedExample],
    report: Sequence[EncodedExample],
    plain: Scores,
    calibrated: Scores,
    *,
    tasks: Sequence[str],
    seed: int,
) -> Provenance:
    plain_right, calibrated_right = right_answers(report, plain), right_answers(report, calibrated)
    notes: dict[str, Any] = {
        "choose_accuracy": {str(candidate.num_heads): round(candidate.accuracy, 4) for candidate in choice.candidates},
        "choose_p": round(choice.p, 4),
    }
    if choice.heads:
        low, high = gain_interval(plain_right, calibrated_right, seed=seed)
        notes["gain_interval_95"] = [round(low, 4), round(high, 4)]
        notes["mcnemar_p"] = float(f"{mcnemar_p(plain_right, calibrated_right):.2g}")
        notes["predicted_shares"] = {"plain": _predicted_shares(plain), "calibrated": _predicted_shares(calibrated)}
        if same_choices([*choose, *report]):
            notes["accuracy_without_choice_bias"] = {
                "plain": _accuracy(report, without_choice_bias(plain, choice.candidates[0].scores)),
                "calibrated": _accuracy(report, without_choice_bias(calibrated, choice.chosen.scores)),
            }
    else:
        notes["result"] = "no head is calibrated: nothing tried gained more on the choose split than luck explains"
    return Provenance(
        method=METHOD,
        tasks=tuple(tasks),
        samples={"rank": len(splits.rank), "choose": len(splits.choose), "report": len(splits.report)},
        seed=seed,
        plain_accuracy=_accuracy(report, plain),
        calibrated_accuracy=_accuracy(report, calibrated),
        versions={
            "act-export": act_export.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        notes={**notes, "used": sorted(prompt_digest(example.prompt) for example in (*splits.rank, *splits.choose))},
    )


def _accuracy(examples: Sequence[EncodedExample], scores: Scores) -> float:
    return round(float(np.mean(right_answers(examples, scores))), 4)


def _predicted_shares(scores: Scores) -> list[float]:
    """How often each choice, by its index, is the model's answer."""
    counts = np.bincount([predicted_choice(row) for row in scores], minlength=max(map(len, scores)))
    return [round(float(count) / len(scores), 4) for count in counts]
