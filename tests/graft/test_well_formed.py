"""Graphs whose nodes aren't as ONNX has them are refused before a graft reads them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from foreign_models import CALIBRATION, Decoder
from onnx import helper

from act_export.errors import ActExportError
from act_export.graft.graph import Graph
from act_export.graft.job import graft
from act_export.graft.well_formed import check_nodes


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("num_heads", [1.5], r"num_heads = \[0\]; it must be of type int, from 1 to 100000"),
        ("num_heads", 0, r"num_heads = \[0\]"),
        ("kv_num_heads", 10**12, r"kv_num_heads = \[1000000000000\]"),
        ("scale", 2, r"scale = \[0.0\]; it must be of type float"),
        ("scale", float("nan"), r"scale = \[nan\]"),
        ("local_window_size", "x", "local_window_size"),
    ],
)
def test_attributes(name: str, value: object, reason: str, tmp_path: Path) -> None:
    path = Decoder().save(tmp_path / "in.onnx")
    model = onnx.load(path)
    node = next(node for node in model.graph.node if node.op_type == "GroupQueryAttention")
    kept = [given for given in node.attribute if given.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
    onnx.save(model, path)
    with pytest.raises(ActExportError, match=f"is damaged: .*GroupQueryAttention.* has {reason}"):
        graft(path, CALIBRATION, tmp_path / "out.onnx")
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (helper.make_node("Cast", ["x"], []), "Cast that makes '' has no outputs"),
        (helper.make_node("Concat", [], ["x"]), "Concat that makes 'x' has 0 inputs of at least 1"),
        (helper.make_node("Reshape", ["a"], ["x"], "y" * 500), r"has 1 inputs of at least 2"),
    ],
)
def test_inputs_and_outputs(node: onnx.NodeProto, reason: str) -> None:
    with pytest.raises(ActExportError, match=reason) as caught:
        check_nodes(helper.make_graph([node], "g", [], []), "a.onnx")
    assert len(str(caught.value)) < 300


def test_constants_that_cant_be_read() -> None:
    tensor = onnx.TensorProto(name="c", data_type=999, dims=[1], raw_data=b"1")
    huge = onnx.TensorProto(name="h", data_type=1, dims=[2**62, 2**62])
    graph = Graph(helper.make_graph([helper.make_node("Constant", [], ["n"])], "g", [], [], [tensor, huge]))
    with pytest.raises(ActExportError, match="the constant 'c' can't be read"):
        graph.constant("c")
    assert graph.constant("h") is None
    assert graph.constant("n") is None
