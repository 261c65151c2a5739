"""A profile whose prompts are an initial token and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from profiles import random_profile

from act_export.profile.sink_profile import SinkProfile
from act_export.profile.sink_statistics import SinkStatistics


def one_token_profile(layers: int = 3, heads: int = 2, source: str = "text.jsonl") -> SinkProfile:
    """No token of it can be a later sink.

    Args:
        layers: Of the model.
        heads: Of each layer.
        source: Name of its source.
    """
    profile = random_profile(layers, heads, (source,), effects=False, no_later_sinks=True, longest=2)
    examples = tuple(
        replace(each, ids=each.ids[:1], texts=each.texts[:1], scores=np.ones_like(each.scores[..., :1]))
        for each in profile.examples
    )
    sources = {name: _first_tokens(each) for name, each in profile.sources.items()}
    return replace(profile, overall=_first_tokens(profile.overall), sources=sources, examples=examples)


def _first_tokens(statistics: SinkStatistics) -> SinkStatistics:
    return replace(
        statistics,
        tokens=statistics.prompts,
        shortest=1,
        longest=1,
        absolute_exposure=np.zeros_like(statistics.absolute_exposure),
        relative_exposure=np.zeros_like(statistics.relative_exposure),
    )
