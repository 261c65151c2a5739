"""Generation: greedy equals recomputing every prompt, batches equal sequences alone, sampling follows its knobs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CALIBRATION, VOCABULARY, tiny_tokenizer

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.errors import ActExportError
from act_export.runtime import Sampling, generate, generate_steps
from act_export.runtime.sampling import left_pad, next_tokens
from act_export.runtime.text import stream_text

PROMPTS = [[5, 9, 200, 31, 7, 7, 40], [12, 3], [44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55]]


def test_greedy_equals_pytorch(tiny, tiny_session):
    ours = generate(tiny_session, PROMPTS[:1], max_new_tokens=16)[0]
    ids = torch.tensor(PROMPTS[:1])
    theirs = []
    with torch.no_grad(), attention_hook(tiny.model, ReferenceAttention(CALIBRATION)) as hooked:
        state, seen = None, 0
        for _ in range(16):
            seen += ids.shape[1]
            logits, state = hooked(ids, torch.ones(1, seen, dtype=torch.long), state)
            ids = logits[:, -1:].argmax(-1)
            theirs.append(int(ids))
    assert ours == theirs


def test_a_batch_equals_sequences_alone(tiny_session):
    together = generate(tiny_session, PROMPTS, max_new_tokens=12)
    assert together == [generate(tiny_session, [prompt], max_new_tokens=12)[0] for prompt in PROMPTS]


def test_sequences_stop_one_by_one(tiny_session):
    free = generate(tiny_session, PROMPTS, max_new_tokens=12)
    stop = free[1][2]
    stopped = generate(tiny_session, PROMPTS, max_new_tokens=12, stop_tokens=[stop])
    for with_stop, without in zip(stopped, free, strict=True):
        end = without.index(stop) + 1 if stop in without else len(without)
        assert with_stop == without[:end]


def test_steps_end_when_all_sequences_have(tiny_session):
    first = next(generate_steps(tiny_session, PROMPTS[:1], max_new_tokens=12))[0]
    assert len(list(generate_steps(tiny_session, PROMPTS[:1], max_new_tokens=12, stop_tokens=[first]))) == 1


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_empty_prompts_are_refused(tiny_session, prompts):
    with pytest.raises(ActExportError, match="empty"):
        generate(tiny_session, prompts, max_new_tokens=2)


@given(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5))
def test_left_pad(prompts):
    ids, mask = left_pad(prompts, pad_token=100)
    assert [row[keep == 1].tolist() for row, keep in zip(ids, mask, strict=True)] == prompts
    assert (ids[mask == 0] == 100).all()
    assert (np.diff(mask, axis=1) >= 0).all()


def test_sampling_is_seeded(tiny_session):
    def draw(seed):
        return generate(tiny_session, PROMPTS, max_new_tokens=8, sampling=Sampling(temperature=1.5, seed=seed))

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.floats(0.05, 1.0), st.floats(0.1, 3.0))
@settings(max_examples=100, deadline=None)
def test_sampled_tokens_come_from_the_nucleus(seed, top_k, top_p, temperature):
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((4, 20))).astype(np.float32)
    drawn = next_tokens(logits, Sampling(temperature, top_k, top_p), rng)
    for row, token in zip(logits.astype(np.float64), drawn, strict=True):
        probabilities = np.exp((row - row.max()) / temperature)
        kept = np.sort(probabilities)[::-1][:top_k]
        assert probabilities[token] >= kept[-1]
        more_likely = kept[kept > probabilities[token]].sum() / kept.sum()
        assert more_likely < top_p + 1e-9


def test_sampling_frequencies_follow_the_probabilities():
    logits = np.log(np.array([[0.5, 0.3, 0.2]], np.float32)).repeat(20_000, 0)
    drawn = next_tokens(logits, Sampling(temperature=1.0), np.random.default_rng(0))
    np.testing.assert_allclose(np.bincount(drawn) / len(drawn), [0.5, 0.3, 0.2], atol=0.02)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"temperature": -1}, "temperature is -1"), ({"top_k": -2}, "top_k is -2"), ({"top_p": 0}, "top_p is 0")],
)
def test_bad_sampling(knobs, message):
    with pytest.raises(ActExportError, match=message):
        Sampling(**knobs)


def test_streamed_pieces_join_to_the_text(tiny_session):
    tokenizer = tiny_tokenizer()
    prompt = "One light: two ships."
    pieces = list(stream_text(tiny_session, tokenizer, prompt, max_new_tokens=20))
    tokens = generate(tiny_session, [tokenizer(prompt).input_ids], max_new_tokens=20, stop_tokens=[2])[0]
    assert "".join(pieces) == tokenizer.decode([t for t in tokens if t != 2], skip_special_tokens=True)
    assert len(pieces) > 1
    assert max(tokens) < VOCABULARY


def test_chat_needs_a_template(tiny_session):
    with pytest.raises(ActExportError, match="no chat template"):
        next(stream_text(tiny_session, tiny_tokenizer(), "hello", chat=True))


def test_generation_ends_where_the_context_does(tiny_session):
    prompt = [5 + i % 50 for i in range(250)]
    assert len(generate(tiny_session, [prompt, [7, 8]], max_new_tokens=40)[0]) == 7
