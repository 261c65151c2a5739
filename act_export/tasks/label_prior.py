"""How much a model leans to some answers whatever the question, and scores without that.

A prompt with "N/A" for all content asks nothing, so what the model then finds likely is only its prior. Less that
prior, each choice's log-likelihood is what the question adds (contextual calibration: Zhao et al., "Calibrate Before
Use", ICML 2021). It needs no data, no right answer and no change of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from act_export.tasks.examples import Example


def content_free_examples(examples: Sequence[Example]) -> tuple[Example, ...]:
    """Different content-free prompts with their choices; none unless every example has one."""
    if not all(example.content_free for example in examples):
        return ()
    return tuple({_key(example): _content_free(example) for example in examples}.values())


def without_label_prior(
    scores: Sequence[Sequence[float]], examples: Sequence[Example], priors: Sequence[Sequence[float]]
) -> list[tuple[float, ...]]:
    """Log-likelihoods of the choices, less those after the content-free prompt.

    Args:
        scores: By example, one per choice.
        examples: The examples, each with a content-free prompt.
        priors: The same model's, of `content_free_examples(examples)`.
    """
    keys = dict.fromkeys(_key(example) for example in examples)
    prior_of = dict(zip(keys, priors, strict=True))
    return [
        tuple(score - prior for score, prior in zip(row, prior_of[_key(example)], strict=True))
        for row, example in zip(scores, examples, strict=True)
    ]


def _content_free(example: Example) -> Example:
    return replace(example, prompt=example.content_free, key="", answer=0)


def _key(example: Example) -> tuple[str, tuple[str, ...]]:
    return example.content_free, example.choices
