"""A model's answers to a task's questions, as an evaluation of a file takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from act_export.tasks import Example, encode_examples
from act_export.tasks.batching import USUAL, Batching
from act_export.tasks.language_model import LanguageModel
from act_export.tasks.scoring import score_choices
from act_export.verify.evaluate.answers import Evaluation


def evaluate(
    model: LanguageModel,
    tokenizer: Any,
    examples: Sequence[Example],
    batching: Batching = USUAL,
    *,
    length_normalized: bool = False,
) -> Evaluation:
    encoded = encode_examples(tokenizer, examples)
    scores = score_choices(model, encoded, batching, length_normalized=length_normalized)
    return Evaluation.of(scores, encoded)
