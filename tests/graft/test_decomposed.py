"""Attention of single operators, in graphs written as exporters write them, against the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from close import assert_logits_close
from decomposed_attention import STYLES, VOCABULARY, Exporter, Style
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper

from act_export.calibration.file import Calibration
from act_export.calibration.reference_operator import calibrated_attention
from act_export.graft import StateLayout, UnsupportedPatternError, remove_graft
from act_export.graft.graph import Graph
from act_export.graft.job import graft
from act_export.graft.rewrite import find_sites
from act_export.graft.site import Layout
from act_export.onnx_file.inspect import inspect_file
from act_export.runtime import Session


def reference(
    exporter: Exporter, ids: NDArray[np.int64], mask: NDArray[np.int64], calls: list[int], calibration: Calibration
) -> NDArray[np.float32]:
    """Layer 0 by the reference, in calls of so many tokens."""
    style = exporter.style
    layer = calibration.layer(0)
    assert layer is not None
    embedded = torch.from_numpy(exporter.embeddings[ids])
    key = value = torch.zeros(len(ids), style.kv_heads, 0, style.size)
    scores = torch.zeros(len(ids), len(layer.heads), 0, 1)
    outputs, start = [], 0
    for count in calls:
        rows = embedded[:, start : start + count]
        start += count
        found = calibrated_attention(
            *(rows @ torch.from_numpy(exporter.weights[f"0.{name}"]) for name in "qkv"),
            key,
            value,
            scores,
            torch.from_numpy(mask[:, :start]),
            torch.tensor([layer.strengths]),
            num_heads=style.heads,
            kv_num_heads=style.kv_heads,
            scale=style.scale,
            softcap=style.softcap,
            sliding_window=style.window,
            calibrated_heads=layer.heads,
            threshold_mode=layer.threshold_mode,
        )
        outputs.append(found.output)
        key, value, scores = found.present_key, found.present_value, found.present_sink_scores
    return torch.cat(outputs, 1).numpy()


def run(
    path: Path, ids: NDArray[np.int64], mask: NDArray[np.int64], calls: list[int], native: bool
) -> NDArray[np.float32]:
    state, outputs, start = None, [], 0
    with Session.open(path, native=native) as session:
        for count in calls:
            span = slice(start, start + count)
            start += count
            logits, state = session.run(ids[:, span], mask[:, :start], state)
            outputs.append(logits)
    return np.concatenate(outputs, 1)


def written(exporter: Exporter, folder: Path) -> Path:
    onnx.save(exporter.model(), folder / "in.onnx")
    return folder / "in.onnx"


def ragged(calls: list[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens and a mask of three sequences: whole, padded before, padded after the first call."""
    random = np.random.default_rng(5)
    ids = random.integers(0, VOCABULARY, (3, sum(calls)))
    mask = np.ones_like(ids)
    mask[1, : calls[0] // 2] = 0
    mask[2, calls[0] - calls[0] // 3 : calls[0]] = 0
    return ids, mask


@pytest.mark.parametrize("name", STYLES)
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_graft_computes_the_reference(name: str, mode: str, tmp_path: Path) -> None:
    exporter = Exporter(STYLES[name])
    threshold = 0.1 if mode == "absolute" else 1.2
    calibration = Calibration({0: (0, 2)}, beta=0.3, threshold=threshold, threshold_mode=mode)
    grafted = graft(written(exporter, tmp_path), calibration, tmp_path / "out.onnx")
    assert grafted.difference is not None
    assert grafted.difference < 1e-5
    calls = [9, 1, 4, 1]
    ids, mask = ragged(calls)
    expected = reference(exporter, ids, mask, calls, calibration)
    plain = run(tmp_path / "in.onnx", ids, mask, calls, native=False)
    real = mask.astype(bool)
    assert np.abs(plain - expected)[real].max() > 1e-2, "the calibration should do something"
    for native in (True, False):
        found = run(grafted.path, ids, mask, calls, native)
        assert_logits_close(found[real], expected[real], 2e-5)


@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 3),
    size=st.sampled_from([1, 3, 8]),
    window=st.sampled_from([-1, 1, 2, 7]),
    softcap=st.sampled_from([0.0, 0.7, 30.0]),
    scaled=st.sampled_from(["both", "query", "logits", "shape"]),
    mask=st.sampled_from(["where", "added", "chosen"]),
    guarded=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_terms_are_read_off_the_graph(
    heads: int, group: int, size: int, window: int, softcap: float, scaled: str, mask: str, guarded: bool
) -> None:
    style = Style(heads * group, heads, size, scaled, mask, softcap, window, guarded)
    model = Exporter(style, layers=2).model()
    sites = find_sites(Graph(model.graph, model.opset_import))
    assert list(sites) == [0, 1]
    for site in sites.values():
        assert site.problem is None
        terms = site.terms
        assert terms is not None
        assert (terms.num_heads, terms.kv_num_heads, terms.head_size) == (heads * group, heads, size)
        assert terms.sliding_window == window
        assert terms.scale == pytest.approx(style.scale, rel=1e-5)
        assert terms.softcap == pytest.approx(softcap, rel=1e-4)


def test_half_precision(tmp_path: Path) -> None:
    exporter = Exporter(Style(), dtype=np.float16)
    grafted = graft(written(exporter, tmp_path), Calibration({0: (1,)}), tmp_path / "out.onnx")
    assert grafted.difference is not None
    assert grafted.difference < 1e-2


def test_only_calibrated_layers_change(tmp_path: Path) -> None:
    exporter = Exporter(Style(), layers=3)
    path = written(exporter, tmp_path)
    grafted = graft(path, Calibration({1: (0,)}), tmp_path / "out.onnx")
    before, after = onnx.load(path).graph, onnx.load(grafted.path).graph
    kept = {node.name for node in before.node} & {node.name for node in after.node}
    gone = [node.name for node in before.node if node.name not in kept]
    assert gone
    assert all(name.startswith("/model/1/") for name in gone)
    assert not {"/model/1/q", "/model/1/k", "/model/1/v"} & set(gone)
    assert sum(node.op_type == "Softmax" for node in after.node) == 2
    onnx.checker.check_model(onnx.load(grafted.path))


def test_removing_gives_the_graph_back(tmp_path: Path) -> None:
    path = written(Exporter(Style(), layers=2), tmp_path)
    graft(path, Calibration({0: (0,), 1: (3,)}), tmp_path / "out.onnx")
    remove_graft(tmp_path / "out.onnx", tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_state_in_the_cache(tmp_path: Path) -> None:
    """A host that knows nothing but a cache gets what one gets that gives the sink state back by its name."""
    path = written(Exporter(Style(), layers=2), tmp_path)
    calibration = Calibration({0: (0, 2), 1: (3,)}, beta=0.3)
    apart = graft(path, calibration, tmp_path / "apart.onnx")
    packed = graft(path, calibration, tmp_path / "packed.onnx", layout=StateLayout.PACKED)
    calls = [9, 1, 4, 1]
    ids, mask = ragged(calls)
    for native in (True, False):
        np.testing.assert_array_equal(*(run(each.path, ids, mask, calls, native) for each in (apart, packed)))
    assert inspect_file(packed.path).sink_state == ("past_key_values.2.key",)
    remove_graft(packed.path, tmp_path / "back.onnx")
    assert (tmp_path / "back.onnx").read_bytes() == path.read_bytes()


def test_output_layout_follows_the_graph() -> None:
    for name, layout in (("optimum's llama", Layout.FLAT), ("heads not joined", Layout.HEADS)):
        model = Exporter(STYLES[name]).model()
        assert find_sites(Graph(model.graph, model.opset_import))[0].output_layout is layout


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("bidirectional", "mask isn't that of causal attention"),
        ("padding is seen", "mask isn't that of causal attention"),
        ("scaled values", "values are scaled"),
        ("changed probabilities", "probabilities are changed"),
        ("other order of heads", "isn't what it was made from"),
        ("bias", "something else is done to them"),
    ],
)
def test_refuses_what_the_operator_cannot_do(fault: str, message: str, tmp_path: Path) -> None:
    path = written(Exporter(replace(Style(), fault=fault)), tmp_path)
    with pytest.raises(UnsupportedPatternError, match=message) as raised:
        graft(path, Calibration({0: (0,)}), tmp_path / "out.onnx")
    assert "/model/0/softmax" in str(raised.value)
    assert not (tmp_path / "out.onnx").exists()


def test_a_layer_that_is_not_calibrated_may_be_anything(tmp_path: Path) -> None:
    exporter = Exporter(Style(), layers=2)
    model = exporter.model()
    soft = next(node for node in model.graph.node if node.name == "/model/1/softmax")
    soft.attribute[0].i = 2
    onnx.save(model, tmp_path / "in.onnx")
    grafted = graft(tmp_path / "in.onnx", Calibration({0: (0,)}), tmp_path / "out.onnx")
    assert grafted.layers == (0,)
    with pytest.raises(UnsupportedPatternError, match="axis"):
        graft(tmp_path / "in.onnx", Calibration({1: (0,)}), tmp_path / "other.onnx")


def test_softmax_without_a_cache_is_no_attention() -> None:
    nodes = [helper.make_node("Softmax", ["x"], ["y"])]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    graph = helper.make_graph(nodes, "main", info[:1], info[1:])
    with pytest.raises(UnsupportedPatternError, match="no attention"):
        find_sites(Graph(graph))
