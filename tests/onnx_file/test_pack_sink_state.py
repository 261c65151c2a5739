"""The sink state inside tensors of the cache: the same results, in every type and number of tensors."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from tiny import CALIBRATION, tiny_checkpoint

from act_export.export.job import export_model
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.pack_sink_state import pack_file, pack_sink_state
from act_export.onnx_file.record import PACKED, FileRecord
from act_export.runtime import Session, generate
from act_export.verify.parity.job import verify_file

_TYPES = {TensorProto.FLOAT: (1, 0.0), TensorProto.FLOAT16: (2, 2.0**-20)}
"""Parts of a sum, and how far one may be from what it was, as a ratio."""


def packed_copy(file: Path, folder: Path) -> Path:
    for path in file.parent.iterdir():
        shutil.copy(path, folder)
    pack_file(folder / file.name)
    return folder / file.name


def ragged() -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(3, 259, (3, 24))
    mask = np.ones_like(ids)
    mask[1, :7] = 0
    return ids, mask


def test_every_call_gives_what_it_gave(tiny_file, tmp_path):
    ids, mask = ragged()
    for native in (True, False):
        with (
            Session.open(tiny_file, native=native) as whole,
            Session.open(packed_copy(tiny_file, tmp_path), native=native) as packed,
        ):
            states = [None, None]
            for start, end in ((0, 15), (15, 23), (23, 24)):
                (logits, states[0]), (same, states[1]) = (
                    session.run(ids[:, start:end], mask[:, :end], state)
                    for session, state in zip((whole, packed), states, strict=True)
                )
                np.testing.assert_array_equal(logits, same)
            sinks = packed.packed_sinks.unpack(states[1])
            assert list(sinks) == list(CALIBRATION.heads)
            for layer, sums in sinks.items():
                np.testing.assert_array_equal(sums, states[0][f"past_sink_scores.{layer}"])


def test_it_looks_like_a_cache(tiny_file, tmp_path):
    graph = onnx.load(packed_copy(tiny_file, tmp_path), load_external_data=False).graph
    for field, name, like in (
        (graph.input, "past_key_values.2.key", "past_key_values.0.key"),
        (graph.output, "present.2.key", "present.0.key"),
    ):
        infos = {info.name: info for info in field}
        assert not any("sink" in each for each in infos)
        assert infos[name].type == infos[like].type


def test_generation_in_a_preallocated_cache(tiny_file, tmp_path):
    prompts = [[5, 9, 250, 7, 7, 30], [12, 13, 14]]
    with Session.open(tiny_file) as whole, Session.open(packed_copy(tiny_file, tmp_path)) as packed:
        assert generate(packed, prompts, max_new_tokens=24) == generate(whole, prompts, max_new_tokens=24)


@given(
    kind=st.sampled_from(list(_TYPES)),
    heads=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    size=st.integers(1, 4),
    batch=st.integers(1, 3),
    tokens=st.integers(0, 6),
)
@settings(max_examples=25)
def test_sums_come_back(kind, heads, kv_heads, size, batch, tokens):
    """Packed by one call and unpacked by the next, in a graph that does nothing to the sums."""
    model = _passing_on(heads, kind, kv_heads, size)
    packed = pack_sink_state(model)
    parts, ratio = _TYPES[kind]
    assert packed.parts == parts
    assert len(packed.inputs) == -(-parts * sum(heads) // (kv_heads * size))
    from onnxruntime import InferenceSession

    session = InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    random = np.random.default_rng(0)
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    new = {f"new.{i}": random.uniform(0, 500, (batch, n, tokens, 1)).astype(np.float32) for i, n in enumerate(heads)}
    cache = np.zeros((batch, kv_heads, 0, size), dtype)
    names = [output.name for output in session.get_outputs()]
    first = dict(
        zip(names, session.run(names, {**dict.fromkeys(packed.inputs, cache), _CACHE: cache, **new}), strict=True)
    )
    state = {name: first[name.replace("past_key_values", "present")] for name in packed.inputs}
    assert all(array.dtype == dtype and array.shape == (batch, kv_heads, tokens, size) for array in state.values())
    for i, sums in packed.unpack(state).items():
        np.testing.assert_allclose(sums, new[f"new.{i}"], rtol=ratio, atol=ratio)
    none = {name: array[:, :, :0] for name, array in new.items()}
    again = dict(zip(names, session.run(names, {**state, _CACHE: cache, **none}), strict=True))
    for name, array in state.items():
        np.testing.assert_array_equal(again[name.replace("past_key_values", "present")], array)


_CACHE = "past_key_values.0.key"


def _passing_on(heads: list[int], kind: int, kv_heads: int, size: int) -> onnx.ModelProto:
    """Appends new sums to those that there were."""
    info = helper.make_tensor_value_info
    cache = ["batch", kv_heads, "past", size]
    inputs = [info(_CACHE, kind, cache)]
    outputs = [info("present.0.key", kind, cache)]
    nodes = [helper.make_node("Identity", [_CACHE], ["present.0.key"])]
    for i, count in enumerate(heads):
        inputs.append(info(f"past_sink_scores.{i}", TensorProto.FLOAT, ["batch", count, "past", 1]))
        inputs.append(info(f"new.{i}", TensorProto.FLOAT, ["batch", count, "new", 1]))
        outputs.append(info(f"present_sink_scores.{i}", TensorProto.FLOAT, ["batch", count, "total", 1]))
        names = [f"past_sink_scores.{i}", f"new.{i}"]
        nodes.append(helper.make_node("Concat", names, [f"present_sink_scores.{i}"], axis=2))
    graph = helper.make_graph(nodes, "main", inputs, outputs)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_a_plain_export_stays_as_it_is(tiny_plain_file, tmp_path):
    path = tmp_path / tiny_plain_file.name
    for file in tiny_plain_file.parent.iterdir():
        shutil.copy(file, tmp_path)
    assert pack_file(path) is None
    assert path.read_bytes() == tiny_plain_file.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_export_verifies_and_inspect_tells(dtype, tmp_path):
    tiny = tiny_checkpoint()
    written = export_model(tiny, CALIBRATION, tmp_path / "packed.onnx", dtype=dtype, state_in_cache=True)
    assert written.parity.passed
    found = inspect_file(tmp_path / "packed.onnx")
    assert found.sink_state == ("past_key_values.2.key",)
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "packed.onnx").metadata_props}
    assert FileRecord.read(properties, "the file").packed.heads == {0: 1, 1: 2}


def test_verify_compares_the_sums(tiny, tiny_file, tmp_path):
    path = packed_copy(tiny_file, tmp_path)
    assert verify_file(path, tiny, CALIBRATION).passed
    model = onnx.load(path, load_external_data=False)
    entry = next(entry for entry in model.metadata_props if entry.key == PACKED)
    right, mixed_up = '{"0": 1, "1": 2}', '{"1": 2, "0": 1}'
    assert right in entry.value
    entry.value = entry.value.replace(right, mixed_up)
    onnx.save(model, path)
    assert not verify_file(path, tiny, CALIBRATION).passed
