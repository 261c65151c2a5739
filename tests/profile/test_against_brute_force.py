"""The streamed statistics equal those from whole attention maps, for windows, padding, grouped heads and soft caps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from brute_force import THRESHOLDS, differences
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import VOCABULARY, tiny_checkpoint

from act_export.checkpoint.load import Checkpoint
from act_export.profile import ProfileOptions, PromptSource, SinkStatistics, attention_statistics, profile_sinks
from act_export.tasks import encode_examples, load_examples


def assert_equal(found: SinkStatistics, checkpoint: Checkpoint, prompts: list[tuple[int, ...]]) -> None:
    for name, difference in differences(found, checkpoint.model, prompts).items():
        assert difference < 1e-5, name
    for mode, threshold in THRESHOLDS.items():
        assert found.by[mode].threshold == threshold
        assert (np.diff(found.by[mode].tokens.mass) <= 0).all()


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
    block_rows=st.sampled_from([1, 10, 512]),
    batch_tokens=st.sampled_from([1, 100, 2048]),
    seed=st.integers(0, 99),
    alike=st.integers(0, 5),
)
def test_every_statistic_of_tiny_models(architecture, lengths, block_elements, block_rows, batch_tokens, seed, alike):
    checkpoint = double(tiny_checkpoint(architecture, seed=seed))
    beginning = random_prompts([alike], seed + 1)[0]
    prompts = [beginning + prompt for prompt in random_prompts(lengths, seed)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_statistics, "_BLOCK_ELEMENTS", {"cpu": block_elements})
        patch.setattr(attention_statistics, "_BLOCK_ROWS", {"cpu": block_rows})
        found = profile_sinks(
            checkpoint, [PromptSource("random", tuple(prompts))], ProfileOptions(batch_tokens=batch_tokens)
        )
    assert_equal(found["random"], checkpoint, prompts)
    assert found["random"].shared >= (alike if len(prompts) > 1 else 0)
    assert_equal(found.overall, checkpoint, prompts)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "cohere2"])
def test_windows_and_soft_caps(architecture):
    checkpoint = tiny_checkpoint(architecture)
    prompts = random_prompts([40, 12, 33], seed=1)
    found = profile_sinks(checkpoint, [PromptSource("random", tuple(prompts))])
    assert_equal(found.overall, checkpoint, prompts)


def test_learned_sinks():
    checkpoint = tiny_checkpoint("gpt_oss", num_local_experts=2, num_experts_per_tok=2, sliding_window=7)
    for layer in checkpoint.model.model.layers:
        layer.self_attn.sinks.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
    prompts = random_prompts([40, 12, 33], seed=1)
    found = profile_sinks(checkpoint, [PromptSource("random", tuple(prompts))])
    assert_equal(found.overall, checkpoint, prompts)


def test_two_sources_together_are_one():
    checkpoint = double(tiny_checkpoint())
    prompts = random_prompts([30, 12, 50, 7], seed=2)
    one = profile_sinks(checkpoint, [PromptSource("one", tuple(prompts))])
    two = profile_sinks(checkpoint, [PromptSource("a", tuple(prompts[:1])), PromptSource("b", tuple(prompts[1:]))])
    assert min(later.mass.max() for later in one.overall.by.values()) > 0.1  # there is something to see
    assert_equal(one.overall, checkpoint, prompts)
    assert_equal(two.overall, checkpoint, prompts)
    assert_equal(two["b"], checkpoint, prompts[1:])
    assert (two.overall.prompts, two.overall.tokens, two.overall.shortest, two.overall.longest) == (4, 99, 7, 50)


@pytest.mark.in_turn(2)
@pytest.mark.real
def test_every_statistic_of_smollm2(smollm2):
    examples = load_examples("sst2").examples[:8]
    prompts = [example.prompt for example in encode_examples(smollm2.tokenizer, examples)]
    found = profile_sinks(smollm2, [PromptSource("sst2", tuple(prompts))])
    assert_equal(found["sst2"], smollm2, prompts)
