"""Caches: what they give equals runs by value token for token, growing or not, and a half-done step isn't built on."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
from close import assert_close, assert_logits_close
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CALIBRATION, VOCABULARY, tiny_checkpoint

from act_export.errors import SessionError
from act_export.export import build_model
from act_export.runtime import Sampling, Session, generate
from act_export.runtime.memory import HostMemory
from act_export.runtime.sampling import left_pad, next_tokens

PROMPTS = [[5, 9, 200, 31, 7, 7, 40], [12, 3], [44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55]]


@pytest.fixture(scope="module")
def windowed_file(tmp_path_factory):
    """A model with a sliding window of 7, calibrated."""
    path = tmp_path_factory.mktemp("windowed") / "model.onnx"
    build_model(tiny_checkpoint("mistral"), CALIBRATION, path)
    return path


@pytest.fixture(params=["tiny_file", "tiny_plain_file", "windowed_file"])
def file(request):
    return request.getfixturevalue(request.param)


@pytest.fixture
def session(tiny_file):
    with Session.open(tiny_file) as opened:
        yield opened


def by_value(session, prompts, *, max_new_tokens, stop_tokens=(), sampling=None):
    """Generation as plainly as it can be: states by value, all logits, the last of them taken."""
    sampling = sampling or Sampling()
    random = np.random.default_rng(sampling.seed)
    ids, mask = left_pad(prompts)
    running, state, generated = np.ones(len(prompts), bool), None, [[] for _ in prompts]
    for _ in range(max_new_tokens):
        logits, state = session.run(ids, mask, state)
        tokens = next_tokens(logits[:, -1], sampling, random)
        for row in np.flatnonzero(running):
            generated[row].append(int(tokens[row]))
        running &= ~np.isin(tokens, list(stop_tokens))
        ids = np.where(running, tokens, 0)[:, None]
        mask = np.concatenate([mask, running[:, None].astype(np.int64)], 1)
    return generated


def some_tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("capacity", [1, 13, 256])
def test_generated_tokens_are_those_by_value(file, capacity, monkeypatch):
    """Ragged, rows that end early, greedy and sampled, with room from the start and without."""
    allocate = Session.allocate
    monkeypatch.setattr(Session, "allocate", lambda session, batch, _, **__: allocate(session, batch, capacity))
    with Session.open(file) as session:
        stop = by_value(session, PROMPTS, max_new_tokens=24)[1][5]
        for options in ({}, {"stop_tokens": [stop]}, {"sampling": Sampling(temperature=1.5, seed=3)}):
            ours = generate(session, PROMPTS, max_new_tokens=24, **options)
            assert ours == by_value(session, PROMPTS, max_new_tokens=24, **options)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=30)
def test_any_steps_equal_runs_by_value(tiny_file, chunks, batch, capacity, seed):
    """Chunks of any length with padding anywhere: logits and states."""
    random = np.random.default_rng(seed)
    ids = some_tokens(batch, sum(chunks), seed)
    mask = (random.random(ids.shape) < 0.8).astype(np.int64)
    with Session.open(tiny_file, threads=1) as session:
        cache, state, start = session.allocate(batch, capacity), None, 0
        for length in chunks:
            end = start + length
            keep = int(random.integers(0, length + 2))
            logits = cache.step(ids[:, start:end], mask[:, start:end], logits_to_keep=keep)
            everything, state = session.run(ids[:, start:end], mask[:, :end], state)
            assert_logits_close(logits, everything[:, -keep:] if keep else everything, 1e-5)
            for name, array in cache.state().items():
                assert_close(array, state[name], 1e-6, what=name)
            start = end
        assert cache.tokens.tolist() == mask.sum(-1).tolist()
        assert cache.length == mask.shape[1]


def test_the_library_writes_in_place_and_portable_functions_copy(tiny_file, tiny_session):
    cache = tiny_session.allocate(2)
    assert cache.in_place == tiny_session.native
    cache.step(some_tokens(2, 9))
    places = {name: buffer.address for name, buffer in cache._buffers.items()}
    cache.step(some_tokens(2, 1))
    assert (places == {name: buffer.address for name, buffer in cache._buffers.items()}) == cache.in_place


def test_a_prompts_logits_are_of_its_last_position(tiny_session):
    ids = some_tokens(1, 30)
    assert tiny_session.allocate(1).step(ids).shape == (1, 1, VOCABULARY)
    for keep, shape in ((1, 1), (4, 4), (30, 30), (99, 30), (0, 30)):
        assert tiny_session.run(ids, np.ones_like(ids), logits_to_keep=keep).logits.shape == (1, shape, VOCABULARY)


def test_a_negative_number_of_logits(tiny_session):
    ids = some_tokens(1, 3)
    with pytest.raises(SessionError, match="logits_to_keep is -1"):
        tiny_session.run(ids, np.ones_like(ids), logits_to_keep=-1)
    with pytest.raises(SessionError, match="logits_to_keep is -1"):
        tiny_session.allocate(1).step(ids, logits_to_keep=-1)


def test_size(session):
    cache = session.allocate(3, capacity=100)
    keys_and_values = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, head size, bytes
    column_sums = (1 + 2) * 4  # calibrated heads
    assert cache.nbytes == 3 * 100 * (keys_and_values + column_sums)


def test_capacity_doubles_up_to_the_context(session):
    cache = session.allocate(1, capacity=10)
    seen = [cache.capacity]
    for _ in range(25):
        cache.step(some_tokens(1, 10))
        seen.append(cache.capacity)
    assert sorted(set(seen)) == [10, 20, 40, 80, 160, 256]
    assert session.allocate(1, capacity=10_000).capacity == 256
    with pytest.raises(SessionError, match="a sequence has 260 tokens; the model's context holds 256"):
        cache.step(some_tokens(1, 10))
    assert cache.step(some_tokens(1, 6)).shape[1] == 1


def test_padding_may_go_beyond_the_context(session):
    cache = session.allocate(2, capacity=256)
    mask = np.ones((2, 250), np.int64)
    mask[1, :240] = 0
    cache.step(some_tokens(2, 250), mask)
    ended = np.array([[0], [1]])
    for _ in range(20):
        cache.step(some_tokens(2, 1), ended)
    assert (cache.length, cache.capacity, cache.tokens.tolist()) == (270, 512, [250, 30])


def test_a_batch_of_another_size(session):
    cache = session.allocate(2)
    with pytest.raises(SessionError, match=r"input_ids has shape \(3, 4\).*is for 2 sequences, so both need \(2, 4\)"):
        cache.step(some_tokens(3, 4))
    with pytest.raises(SessionError, match=r"token_mask \(2, 3\).*so both need \(2, 4\)"):
        cache.step(some_tokens(2, 4), np.ones((2, 3), np.int64))
    assert cache.step(some_tokens(2, 4)).shape == (2, 1, VOCABULARY)


@pytest.mark.parametrize(("batch", "capacity"), [(0, 10), (2, 0), (-1, 5)])
def test_an_empty_cache(session, batch, capacity):
    with pytest.raises(SessionError, match=f"{batch} sequences of {capacity} positions"):
        session.allocate(batch, capacity)


def test_caches_of_a_session_do_not_meet(session):
    ids = some_tokens(2, 20)
    caches = [session.allocate(1), session.allocate(1)]
    for start in range(0, 20, 5):
        together = [cache.step(ids[row : row + 1, start : start + 5]) for row, cache in enumerate(caches)]
    again = session.allocate(1)
    for start in range(0, 20, 5):
        alone = again.step(ids[:1, start : start + 5])
    np.testing.assert_array_equal(together[0], alone)
    assert not np.array_equal(together[1], alone)


def test_logits_of_a_step_outlive_the_next(session):
    cache = session.allocate(1)
    first = cache.step(some_tokens(1, 5))
    kept = first.copy()
    cache.step(some_tokens(1, 5, seed=1))
    np.testing.assert_array_equal(first, kept)


def interrupt(error):
    def interrupted(session, binding):
        session.onnxruntime_session.run_with_iobinding(binding)
        raise error

    return interrupted


@pytest.mark.parametrize("error", [KeyboardInterrupt, SessionError("the runtime failed")])
def test_an_interrupted_step_is_not_built_on(session, monkeypatch, error):
    ids = some_tokens(1, 20)
    expected = session.allocate(1).step(ids)
    cache = session.allocate(1)
    cache.step(some_tokens(1, 30, seed=1))
    with monkeypatch.context() as patch:
        patch.setattr(Session, "run_bound", interrupt(error))
        with pytest.raises(error if isinstance(error, type) else type(error)):
            cache.step(ids)
    for attempt in (cache.state, lambda: cache.step(ids)):
        with pytest.raises(SessionError, match="the step before failed or was interrupted: reset the cache"):
            attempt()
    cache.reset()
    np.testing.assert_array_equal(cache.step(ids), expected)


def test_growing_that_is_interrupted(session, monkeypatch):
    ids = some_tokens(1, 20)
    expected = session.allocate(1).step(ids)
    cache = session.allocate(1, capacity=8)
    cache.step(ids[:, :5])
    widen, widened = HostMemory.widened, []

    def full_memory(memory, buffer, row_bytes):
        if len(widened) == 3:
            raise MemoryError
        widened.append(buffer)
        return widen(memory, buffer, row_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "widened", full_memory)
        with pytest.raises(MemoryError):
            cache.step(ids[:, 5:])
    with pytest.raises(SessionError, match="reset the cache"):
        cache.step(ids[:, 5:])
    cache.reset()
    assert (cache.capacity, cache.length) == (8, 0)
    np.testing.assert_array_equal(cache.step(ids), expected)


def test_a_refused_step_changes_nothing(tiny_session):
    cache, undisturbed = tiny_session.allocate(1), tiny_session.allocate(1)
    for each in (cache, undisturbed):
        each.step(some_tokens(1, 9))
    with pytest.raises(SessionError, match="not in the vocabulary"):
        cache.step(np.array([[VOCABULARY]]))
    with pytest.raises(SessionError, match="at least one token"):
        cache.step(np.zeros((1, 0), np.int64))
    np.testing.assert_array_equal(cache.step(some_tokens(1, 1)), undisturbed.step(some_tokens(1, 1)))


def test_a_reset_cache_is_as_new(tiny_session):
    cache = tiny_session.allocate(2, capacity=4)
    first = cache.step(some_tokens(2, 15))
    cache.step(some_tokens(2, 1))
    cache.reset()
    assert (cache.length, cache.tokens.tolist()) == (0, [0, 0])
    np.testing.assert_array_equal(cache.step(some_tokens(2, 15)), first)


def test_a_cached_prompt_continues_by_value(tiny_session):
    ids = some_tokens(2, 12)
    cache = tiny_session.allocate(2)
    cache.step(ids[:, :11])
    state = cache.state()
    ours = cache.step(ids[:, 11:])
    theirs = tiny_session.run(ids[:, 11:], np.ones_like(ids), state).logits
    assert_logits_close(ours, theirs, 1e-6)


def test_a_closed_session(tiny_session):
    cache = tiny_session.allocate(1, capacity=4)
    cache.step(some_tokens(1, 3))
    before = cache.state()
    tiny_session.close()
    with pytest.raises(SessionError, match="was closed"):
        cache.step(some_tokens(1, 3))
    for name, array in cache.state().items():  # and refused before anything was done
        np.testing.assert_array_equal(array, before[name])


def changed_copy(source, folder, change):
    shutil.copytree(source.parent, folder, dirs_exist_ok=True)
    model = onnx.load(folder / source.name, load_external_data=False)
    change(model)
    onnx.save(model, folder / source.name)
    return folder / source.name


@pytest.mark.parametrize("native", [True, False], ids=["native", "portable"])
def test_a_file_that_computes_all_logits(tiny_file, tmp_path, native):
    """As act-export wrote them before: the same answers, all logits computed and the last returned."""

    def always_all(model):
        (given,) = [value for value in model.graph.input if value.name == "logits_to_keep"]
        model.graph.input.remove(given)

    ids = some_tokens(2, 9)
    mask = np.ones_like(ids)
    with (
        Session.open(changed_copy(tiny_file, tmp_path, always_all), native=native) as old,
        Session.open(tiny_file, native=native) as new,
    ):
        assert (old.keeps_logits, new.keeps_logits) == (False, True)
        for keep in (0, 1, 3, 20):
            ours, theirs = (s.run(ids, mask, logits_to_keep=keep).logits for s in (old, new))
            assert_logits_close(ours, theirs, 1e-5)
            ours, theirs = (s.allocate(2).step(ids, logits_to_keep=keep) for s in (old, new))
            assert_logits_close(ours, theirs, 1e-5)
        assert generate(old, PROMPTS, max_new_tokens=8) == generate(new, PROMPTS, max_new_tokens=8)


def test_a_file_of_others_is_not_written_in_place(tiny_file, tmp_path):
    """It may join past and new keys by operators of its own, which know nothing of spare room."""
    path = changed_copy(tiny_file, tmp_path, lambda model: model.ClearField("metadata_props"))
    with Session.open(path) as session:
        assert not session.allocate(1).in_place
