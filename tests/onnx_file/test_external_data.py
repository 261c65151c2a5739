"""Whoever reads a model looks at all of its tensors, and at none that lies elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper

from act_export.calibration.file import ModelIdentity
from act_export.errors import ActExportError, SessionError
from act_export.export.triton import read_signature
from act_export.graft.source import read_source
from act_export.onnx_file.external_data import _BITS, data_files, external_tensors
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.load import load_graph
from act_export.onnx_file.record import FileRecord
from act_export.onnx_file.wire import message
from act_export.runtime import Session
from act_export.verify.parity.quantized_file import quantized_weights

READERS: dict[str, Callable[[Path], object]] = {
    "graft": read_source,
    "triton": read_signature,
    "quantized": quantized_weights,
    "session": Session.open,
}


def outside(location: str = "../secret", *, dtype: int = TensorProto.FLOAT, **place: str) -> TensorProto:
    tensor = TensorProto(name="weight", data_type=dtype, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **place}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def sparse(tensor: TensorProto, *, indices: bool = False) -> onnx.SparseTensorProto:
    values = helper.make_tensor("values", TensorProto.FLOAT, [4], [0.0] * 4)
    places = helper.make_tensor("places", TensorProto.INT64, [4], [0, 1, 2, 3])
    return helper.make_sparse_tensor(*((values, tensor) if indices else (tensor, places)), [9])


def with_attribute(graph: GraphProto, **attribute: object) -> None:
    node = graph.node.add(op_type="Any", output=["unused"])
    node.attribute.add(name="value", **attribute)


def within(tensor: TensorProto) -> GraphProto:
    inner = GraphProto(name="inner")
    with_attribute(inner, g=GraphProto(name="innermost", initializer=[tensor]), type=AttributeProto.GRAPH)
    return inner


PLACES: dict[str, Callable[[ModelProto, TensorProto], object]] = {
    "initializer": lambda model, tensor: model.graph.initializer.append(tensor),
    "sparse values": lambda model, tensor: model.graph.sparse_initializer.append(sparse(tensor)),
    "sparse indices": lambda model, tensor: model.graph.sparse_initializer.append(sparse(tensor, indices=True)),
    "constant": lambda model, tensor: with_attribute(model.graph, t=tensor, type=AttributeProto.TENSOR),
    "constant of no type": lambda model, tensor: with_attribute(model.graph, t=tensor),
    "constants": lambda model, tensor: with_attribute(model.graph, tensors=[tensor], type=AttributeProto.TENSORS),
    "sparse constant": lambda model, tensor: with_attribute(model.graph, sparse_tensor=sparse(tensor)),
    "sparse constants": lambda model, tensor: with_attribute(model.graph, sparse_tensors=[sparse(tensor)]),
    "nested graph": lambda model, tensor: with_attribute(model.graph, g=within(tensor), type=AttributeProto.GRAPH),
    "nested graphs": lambda model, tensor: with_attribute(model.graph, graphs=[within(tensor)]),
    "function": lambda model, tensor: with_attribute(model.functions.add(name="F", domain="d"), t=tensor),
    "default of a function": lambda model, tensor: model.functions.add(name="F", domain="d").attribute_proto.add(
        name="value", t=tensor
    ),
    "training": lambda model, tensor: model.training_info.add().algorithm.initializer.append(tensor),
    "start of training": lambda model, tensor: model.training_info.add().initialization.initializer.append(tensor),
}


def model() -> ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])],
        "any",
        [value("x", TensorProto.FLOAT, [4])],
        [value("y", TensorProto.FLOAT, [4])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def saved(folder: Path, made: ModelProto) -> Path:
    (folder / "in").mkdir()
    (folder / "secret").write_bytes(np.zeros(100, np.float32).tobytes())
    (folder / "in" / "model.onnx").write_bytes(made.SerializeToString())
    return folder / "in" / "model.onnx"


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_anywhere_is_seen(place: str, tmp_path: Path) -> None:
    made = model()
    PLACES[place](made, outside())
    file = saved(tmp_path, made)
    assert [tensor.name for tensor in external_tensors(file)] == ["weight"]
    for name, read in READERS.items():
        with pytest.raises(ActExportError, match=r"'\.\./secret' leads out of"):
            print(name, read(file))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (outside("/etc/hostname"), "leads out of"),
        (outside("link"), "is a link to .*secret"),
        (outside("chain"), "is a link to .*secret"),
        (outside("folder/secret"), "is a link to .*secret"),
        (outside("a" * 100_000), "no name of a file"),
        (outside(""), "no name of a file"),
        (outside("gone"), "which isn't there"),
        (outside("pipe"), "which isn't there"),
        (outside("*/_ORT_MEM_ADDR_/*", offset="4096", length="16"), "has an address of memory for a place"),
        (outside("data", offset="x"), "the offset 'x', which is no number"),
        (outside("data", offset="-4"), "no number of bytes"),
        (outside("data", offset="9" * 30), "no number of bytes"),
        (outside("data", length="1e3"), "no number of bytes"),
        (outside("data", offset="390"), "ends at byte 406; the file isn't whole"),
        (outside("data", length="8"), "has 8 bytes; its type and shape make 16"),
        (outside("data", dtype=999), "is of type 999"),
        (outside("data", dtype=TensorProto.STRING), "which no tensor in another file can be"),
    ],
    ids=lambda value: None if isinstance(value, TensorProto) else value[:30],
)
def test_places_that_no_weights_can_have(tensor: TensorProto, reason: str, reader: str, tmp_path: Path) -> None:
    made = model()
    made.graph.initializer.append(tensor)
    file = saved(tmp_path, made)
    (file.parent / "link").symlink_to("../secret")
    (file.parent / "chain").symlink_to("link")
    (file.parent / "folder").symlink_to("..")
    (file.parent / "data").write_bytes(bytes(400))
    os.mkfifo(file.parent / "pipe")
    with pytest.raises(ActExportError, match=reason):
        READERS[reader](file)


def test_inspect_looks_at_no_other_file(tmp_path: Path) -> None:
    made = model()
    helper.set_model_props(made, FileRecord(version="1", model=ModelIdentity("llama", 2, 4)).write())
    made.graph.initializer.append(outside())
    with pytest.raises(ActExportError, match="leads out of"):
        inspect_file(saved(tmp_path, made))


def test_weights_beside_a_model_are_found(tmp_path: Path) -> None:
    made = model()
    made.graph.initializer.extend([outside("data", offset="16", length="16"), outside("below/more")])
    file = saved(tmp_path, made)
    (file.parent / "data").write_bytes(bytes(32))
    (file.parent / "below").mkdir()
    (file.parent / "below" / "more").write_bytes(bytes(16))
    assert data_files(file) == {"data": 32, "below/more": 16}
    assert load_graph(file).graph.name == "any"
    (file.parent / "data").unlink()
    assert data_files(file, missing=True) == {"data": 0, "below/more": 16}


def number(value: int) -> bytes:
    return message((0, value))[1:]


def written(*parts: bytes, tensor: TensorProto | None = None) -> bytes:
    """A model whose only tensor is written as protobuf's rules allow, though no library writes it so."""
    return message((7, message((5, b"".join(parts) + (tensor or outside()).SerializeToString()))))


END_OF_GROUP, GROUP, FIXED_4, FIXED_8 = (number(99 << 3 | kind) for kind in (4, 3, 5, 1))
ODD_FILES: dict[str, bytes] = {
    "unknown groups": written(GROUP, GROUP, message((5, "x")), END_OF_GROUP, END_OF_GROUP),
    "unknown numbers of fixed size": written(FIXED_4, bytes(4), FIXED_8, bytes(8)),
    "a longer number than needed": written(message((1, 4))[:-1], b"\x84\x80\x00"),
    "a location of data that isn't known, after": message(
        (7, message((5, outside().SerializeToString() + b"\x70\x07")))
    ),
    "a location of data of too many bits": message(
        (7, message((5, outside().SerializeToString() + message((14, 1 << 32 | 1)))))
    ),
    "the graph in two parts": message((7, b""), (7, message((5, outside().SerializeToString())))),
    "a constant in two parts": message(
        (7, message((1, message((5, message((5, message((14, 1))), (5, outside().SerializeToString()[:-2])))))))
    ),
    "two locations": written(message((13, message((1, "location"), (2, "inside"))))),
}


@pytest.mark.parametrize("content", ODD_FILES.values(), ids=ODD_FILES)
def test_what_no_library_writes_is_read_as_protobuf_does(content: bytes, tmp_path: Path) -> None:
    assert onnx.load_model_from_string(content).HasField("graph")
    (tmp_path / "a.onnx").write_bytes(content)
    with pytest.raises(SessionError, match=r"'\.\./secret' leads out of"):
        Session.open(tmp_path / "a.onnx")


def test_sizes_of_elements_are_onnxs(tmp_path: Path) -> None:
    for name, kind in TensorProto.DataType.items():
        if name in ("UNDEFINED", "STRING"):
            assert kind not in _BITS
            continue
        per_byte = {"UINT4": 2, "INT4": 2, "FLOAT4E2M1": 2, "UINT2": 4, "INT2": 4}.get(name, 1)
        assert _BITS[kind] * per_byte == 8 * helper.tensor_dtype_to_np_dtype(kind).itemsize, name


@pytest.mark.parametrize("content", [b"", b"location", b"no model", b"\x3a\xff\xff\xff\xff\x0f", 99 * b"\x3a\x7f"])
def test_what_is_no_model_is_for_others_to_refuse(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.onnx").write_bytes(content)
    assert data_files(tmp_path / "a.onnx", SessionError) == {}


def test_messages_without_end_within_each_other(tmp_path: Path) -> None:
    content = message((7, b""))
    for _ in range(3000):
        content = message((1, message((5, message((6, content))))))
    (tmp_path / "a.onnx").write_bytes(message((7, content)))
    assert data_files(tmp_path / "a.onnx", SessionError) == {}


def test_weights_in_the_file_are_skipped(tmp_path: Path) -> None:
    """A gigabyte, of a file with holes, takes no time and no memory."""
    size = 1 << 30
    with (tmp_path / "a.onnx").open("wb") as file:
        tensor = b"\x4a" + number(size)  # raw_data
        graph = b"\x2a" + number(len(tensor) + size) + tensor
        file.write(b"\x3a" + number(len(graph) + size) + graph)
        file.truncate(file.tell() + size)
    begin = time.process_time()
    assert data_files(tmp_path / "a.onnx") == {}
    assert time.process_time() - begin < 0.1
