"""The streamed statistics equal those from whole attention maps, for windows, padding, grouped heads and soft caps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute_force import THRESHOLDS, brute_force
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, tiny_checkpoint

from act_export.checkpoint import Checkpoint
from act_export.profile import ProfileOptions, PromptSource, SinkStatistics, attention_statistics, profile_sinks

_FIELDS = (
    "initial_score",
    "initial_score_std",
    "mass_std",
    "entropy",
    "mean_map",
    "absolute_exposure",
    "relative_exposure",
)
_BY_MODE = ("initial_rate", "rate", "count", "mass", "absolute_positions", "relative_positions")


def assert_equal(found: SinkStatistics, wanted: dict[str, object], tolerance: float = 1e-5) -> None:
    for field in _FIELDS:
        np.testing.assert_allclose(getattr(found, field), wanted[field], atol=tolerance, rtol=0, err_msg=field)
    for mode, threshold in THRESHOLDS.items():
        later = found.by[mode]
        assert later.threshold == threshold
        for field in _BY_MODE:
            np.testing.assert_allclose(
                getattr(later, field), wanted[f"{mode}/{field}"], atol=tolerance, rtol=0, err_msg=f"{mode}/{field}"
            )
        tokens = later.tokens
        ids = tokens.ids.tolist()
        assert dict(zip(ids, tokens.occurrences.tolist(), strict=True)) == wanted[f"{mode}/tokens/occurrences"]
        sinks = {
            (token, layer): int(count)
            for token, row in zip(ids, tokens.sinks, strict=True)
            for layer, count in enumerate(row)
            if count
        }
        assert sinks == wanted[f"{mode}/tokens/sinks"]
        mass = wanted[f"{mode}/tokens/mass"]
        assert isinstance(mass, dict)
        np.testing.assert_allclose(tokens.mass, [mass[token] for token in ids], atol=tolerance, rtol=0)
        assert (np.diff(tokens.mass) <= 0).all()


def random_prompts(lengths: list[int], seed: int) -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]


def double(checkpoint: Checkpoint) -> Checkpoint:
    checkpoint.model.double()
    return checkpoint


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(["llama", "mistral", "gpt2", "qwen3", "phi3"]),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    block_elements=st.sampled_from([1, 300, 2000, 2**20]),
    batch_tokens=st.sampled_from([1, 100, 2048]),
    seed=st.integers(0, 99),
)
def test_every_statistic_of_tiny_models(architecture, lengths, block_elements, batch_tokens, seed):
    checkpoint = double(tiny_checkpoint(architecture, seed=seed))
    prompts = random_prompts(lengths, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_statistics, "_BLOCK_ELEMENTS", {"cpu": block_elements})
        found = profile_sinks(
            checkpoint, [PromptSource("random", tuple(prompts))], ProfileOptions(batch_tokens=batch_tokens)
        )
    wanted = brute_force(checkpoint.model, prompts)
    assert wanted["absolute/count"].sum() > 0 or max(lengths) < 5
    assert_equal(found["random"], wanted)
    assert_equal(found.overall, wanted)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "cohere2"])
def test_windows_and_soft_caps(architecture):
    checkpoint = tiny_checkpoint(architecture)
    prompts = random_prompts([40, 12, 33], seed=1)
    found = profile_sinks(checkpoint, [PromptSource("random", tuple(prompts))])
    assert_equal(found.overall, brute_force(checkpoint.model, prompts))


def test_two_sources_together_are_one():
    checkpoint = double(tiny_checkpoint())
    prompts = random_prompts([30, 12, 50, 7], seed=2)
    one = profile_sinks(checkpoint, [PromptSource("one", tuple(prompts))])
    two = profile_sinks(checkpoint, [PromptSource("a", tuple(prompts[:1])), PromptSource("b", tuple(prompts[1:]))])
    wanted = brute_force(checkpoint.model, prompts)
    assert_equal(one.overall, wanted)
    assert_equal(two.overall, wanted)
    assert_equal(two["b"], brute_force(checkpoint.model, prompts[1:]))
    assert (two.overall.prompts, two.overall.tokens, two.overall.shortest, two.overall.longest) == (4, 99, 7, 50)
