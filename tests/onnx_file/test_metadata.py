"""Metadata read off a file's bytes is what onnx reads of it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from act_export.onnx_file.metadata import metadata_of

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def model(properties: dict[str, str]) -> onnx.ModelProto:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [value])
    made = helper.make_model(graph, producer_name="somebody", doc_string="a text")
    helper.set_model_props(made, properties)
    return made


@given(properties=st.dictionaries(TEXTS, TEXTS, max_size=5))
def test_it_is_what_onnx_reads(tmp_path_factory, properties):
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    onnx.save(model(properties), path)
    assert metadata_of(path) == properties
    assert {entry.key: entry.value for entry in onnx.load(path).metadata_props} == properties


def test_of_an_export(tiny_file):
    found = metadata_of(tiny_file)
    assert found == {entry.key: entry.value for entry in onnx.load(tiny_file).metadata_props}
    assert "act_export.calibrations" in found


@pytest.mark.parametrize("content", [b"", b"text", b"\x72\x04\x0a\x02\xff\xfe", b"\x72\xff"])
def test_what_is_no_model_has_none(tmp_path: Path, content: bytes):
    (tmp_path / "m.onnx").write_bytes(content)
    assert metadata_of(tmp_path / "m.onnx") is None
    assert metadata_of(tmp_path / "none.onnx") is None
