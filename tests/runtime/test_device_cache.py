"""Caches in a device's memory: the same tokens as the host's. The device is the CPU here, the code that of a GPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper, save_model
from tiny import VOCABULARY

from act_export.errors import SessionError
from act_export.onnx_file.state import BFLOAT16, select
from act_export.runtime import Sampling, Session, generate
from act_export.runtime.cache import Cache
from act_export.runtime.device import Device
from act_export.runtime.device_memory import DeviceMemory, _padding_model

PROMPTS = [[5, 9, 200, 31, 7, 7, 40], [12, 3], [44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 55]]


@pytest.fixture(scope="module")
def memory() -> DeviceMemory:
    return DeviceMemory(Device())


def device_cache(session: Session, memory: DeviceMemory, batch: int, capacity: int) -> Cache:
    return Cache(session, memory, batch, capacity, in_place=session.native)


def some_tokens(batch: int, length: int, seed: int = 0):
    return np.random.default_rng(seed).integers(3, VOCABULARY, (batch, length))


@pytest.mark.parametrize("capacity", [1, 13, 256])
def test_generated_tokens_are_those_of_the_host_caches(tiny_session, memory, capacity, monkeypatch) -> None:
    for options in ({}, {"stop_tokens": [200]}, {"sampling": Sampling(temperature=1.5, seed=3)}):
        expected = generate(tiny_session, PROMPTS, max_new_tokens=24, **options)
        with monkeypatch.context() as patch:
            patch.setattr(
                Session, "allocate", lambda session, batch, _, **__: device_cache(session, memory, batch, capacity)
            )
            assert generate(tiny_session, PROMPTS, max_new_tokens=24, **options) == expected


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 20), st.integers(0, 99))
@settings(max_examples=15)
@pytest.mark.parametrize("native", [True, False])
def test_any_steps_equal_those_of_the_host_caches(tiny_file, memory, native, chunks, batch, capacity, seed) -> None:
    ids = some_tokens(batch, sum(chunks), seed)
    mask = (np.random.default_rng(seed).random(ids.shape) < 0.8).astype(np.int64)
    with Session.open(tiny_file, native=native, threads=1) as session:
        ours, theirs, start = device_cache(session, memory, batch, capacity), session.allocate(batch, capacity), 0
        for length in chunks:
            end = start + length
            logits = [cache.step(ids[:, start:end], mask[:, start:end]) for cache in (ours, theirs)]
            np.testing.assert_array_equal(*logits)
            start = end
        expected = theirs.state()
        for name, array in ours.state().items():
            np.testing.assert_array_equal(array, expected[name])
        assert (ours.length, ours.capacity, ours.tokens.tolist()) == (
            theirs.length,
            theirs.capacity,
            theirs.tokens.tolist(),
        )
        assert ours.nbytes == theirs.nbytes


def test_the_library_writes_in_place(tiny_file, memory) -> None:
    with Session.open(tiny_file) as session:
        cache = device_cache(session, memory, 2, 32)
        cache.step(some_tokens(2, 9))
        places = {name: buffer.address for name, buffer in cache._buffers.items()}
        cache.step(some_tokens(2, 1))
        assert places == {name: buffer.address for name, buffer in cache._buffers.items()}


def test_a_reset_cache_is_as_new(tiny_session, memory) -> None:
    cache = device_cache(tiny_session, memory, 2, 4)
    first = cache.step(some_tokens(2, 15))
    cache.step(some_tokens(2, 1))
    cache.reset()
    assert cache.length == 0
    np.testing.assert_array_equal(cache.step(some_tokens(2, 15)), first)


def test_memory_that_runs_out_while_growing(tiny_session, memory, monkeypatch) -> None:
    ids = some_tokens(1, 20)
    expected = tiny_session.allocate(1).step(ids)
    cache = device_cache(tiny_session, memory, 1, 8)
    cache.step(ids[:, :5])
    allocate, taken = DeviceMemory.allocate, []

    def full(memory, rows, row_bytes):
        if len(taken) == 3:
            raise SessionError("no room")
        taken.append(rows)
        return allocate(memory, rows, row_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceMemory, "allocate", full)
        with pytest.raises(SessionError, match="no room"):
            cache.step(ids[:, 5:])
    with pytest.raises(SessionError, match="reset the cache"):
        cache.step(ids[:, 5:])
    cache.reset()
    np.testing.assert_array_equal(cache.step(ids), expected)


def test_more_memory_than_there_is(memory) -> None:
    with pytest.raises(SessionError, match=f"can't take {2**62} bytes of cpu"):
        memory.allocate(1, 2**62)


def test_rows_that_are_no_whole_words(memory) -> None:
    odd = memory.allocate(3, 6)
    assert memory.read(odd, np.dtype(np.float16), (3, 3)).shape == (3, 3)
    with pytest.raises(SessionError, match="rows of 6 bytes can't be kept on cpu"):
        memory.zeros(3, 6)


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16])
@pytest.mark.parametrize("size", [2, 8])
def test_widening_keeps_every_bit_and_adds_zeros(memory, dtype, size) -> None:
    rows, tokens, more = 6, 5, 12
    bits = np.random.default_rng(0).integers(0, 256, (rows, tokens * size * dtype.itemsize), np.uint8)  # NaNs too
    buffer = memory.zeros(rows, bits.shape[1])
    buffer.owner.numpy().view(np.uint8)[...] = bits.ravel()
    wider = memory.widened(buffer, more * size * dtype.itemsize)
    found = memory.read(wider, dtype, (2, 3, more, size))
    assert found.dtype == dtype
    as_bits = found.view(np.uint8).reshape(rows, -1)
    np.testing.assert_array_equal(as_bits[:, : bits.shape[1]], bits)
    assert not as_bits[:, bits.shape[1] :].any()


def test_the_model_that_pads_is_as_onnx_writes_it() -> None:
    rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["rows", "words"])
    pads = helper.make_tensor_value_info("pads", TensorProto.INT64, [4])
    padded = helper.make_tensor_value_info("padded", TensorProto.FLOAT, ["rows", "more words"])
    graph = helper.make_graph([helper.make_node("Pad", ["rows", "pads"], ["padded"])], "pad", [rows, pads], [padded])
    expected = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    assert _padding_model() == expected.SerializeToString()


@pytest.fixture(scope="module")
def half_file(tmp_path_factory):
    """A model of bfloat16 that every ONNX Runtime has kernels for: it caches embeddings, and sums up the cache."""
    size, vocabulary = 4, 11
    table = np.random.default_rng(1).standard_normal((vocabulary, size)).astype(np.float32)
    state = ["batch", 1, "past", size]
    given = [
        *(helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "n"]) for name in ("input_ids",)),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["batch", "n"]),
        *(
            helper.make_tensor_value_info(f"past_key_values.0.{part}", TensorProto.BFLOAT16, state)
            for part in ("key", "value")
        ),
    ]
    put_out = [
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "n", vocabulary]),
        *(
            helper.make_tensor_value_info(f"present.0.{part}", TensorProto.BFLOAT16, ["batch", 1, "total", size])
            for part in ("key", "value")
        ),
    ]
    make = helper.make_node
    nodes = [
        make("Gather", ["table", "input_ids"], ["embedded"]),
        make("Unsqueeze", ["embedded", "one"], ["heads"]),
        make("Cast", ["heads"], ["new"], to=TensorProto.BFLOAT16),
        make("Concat", ["past_key_values.0.key", "new"], ["present.0.key"], axis=2),
        make("Concat", ["past_key_values.0.value", "new"], ["present.0.value"], axis=2),
        make("Cast", ["present.0.key"], ["wide"], to=TensorProto.FLOAT),
        make("ReduceSum", ["wide", "both"], ["sums"], keepdims=0),
        make("Unsqueeze", ["sums", "one"], ["row"]),
        make("Add", ["embedded", "row"], ["hidden"]),
        make("Transpose", ["table"], ["turned"], perm=[1, 0]),
        make("MatMul", ["hidden", "turned"], ["logits"]),
    ]
    constants = {"table": table, "one": np.array([1]), "both": np.array([1, 2])}
    graph = helper.make_graph(
        nodes, "half", given, put_out, [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    save_model(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def test_bfloat16_by_value_and_in_caches(half_file, memory) -> None:
    ids = np.array([[1, 2, 3, 9], [5, 5, 10, 0]])
    with Session.open(half_file, native=False) as session:
        outputs = session.run(ids, np.ones_like(ids))
        assert {array.dtype for array in outputs.state.values()} == {np.dtype(ml_dtypes.bfloat16)}
        state, seen = None, np.ones((2, 0), np.int64)
        host, device = session.allocate(2), Cache(session, memory, 2, 8, in_place=False)
        for column in range(ids.shape[1]):
            step = ids[:, column : column + 1]
            seen = np.concatenate([seen, np.ones((2, 1), np.int64)], 1)
            logits, state = session.run(step, seen, state)
            for cache in (host, device):
                np.testing.assert_array_equal(cache.step(step), logits)
        for name, array in outputs.state.items():
            for other in (state, host.state(), device.state()):
                np.testing.assert_array_equal(array.view(np.uint16), other[name].view(np.uint16))
        picked = session.run(ids[:1, :1], np.ones((1, 5), np.int64), select(state, [1])).logits
        both = session.run(ids[:, :1], np.ones((2, 5), np.int64), state).logits
        assert not np.array_equal(picked, both[:1])
