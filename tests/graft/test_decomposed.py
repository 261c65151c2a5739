"""Attention of single operators, in graphs written as exporters write them, against the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from close import assert_logits_close
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from act_export.calibration.file import Calibration
from act_export.calibration.reference import calibrated_attention
from act_export.graft import StateLayout, UnsupportedPatternError, remove_graft
from act_export.graft.graph import Graph
from act_export.graft.job import graft
from act_export.graft.rewrite import find_sites
from act_export.graft.site import Layout
from act_export.onnx_file.inspect import inspect_file
from act_export.onnx_file.node_builder import NodeBuilder
from act_export.runtime import Session

VOCABULARY = 13
FAR = np.iinfo(np.int64).max
OPSET = 18


@dataclass(frozen=True)
class Style:
    """How a graph is written.

    Attributes:
        heads: Query heads.
        kv_heads: Key-value heads.
        size: Head size.
        scaled: Where the scale is: "both" (root of it on query and key), "query", "logits" (a division) or "shape" (as
            "both", computed from the query's shape).
        mask: "where" (0 or -inf by a boolean), "added" (the lowest number times 0 or 1), "chosen" (a logit or the
            lowest number).
        softcap: 0 for none.
        window: -1 for none.
        guarded: Rows without keys become 0 after the softmax.
        joined: Heads are put side by side after the product.
        fault: Something that the operator can't do.
    """

    heads: int = 4
    kv_heads: int = 2
    size: int = 8
    scaled: str = "both"
    mask: str = "where"
    softcap: float = 0.0
    window: int = -1
    guarded: bool = True
    joined: bool = True
    fault: str = ""

    @property
    def scale(self) -> float:
        return float(self.size**-0.5)


STYLES = {
    "optimum's llama": Style(),
    "optimum's gpt2": Style(kv_heads=4, scaled="shape"),
    "optimum's mistral": Style(window=5),
    "eager gemma2": Style(scaled="logits", mask="added", softcap=3.0, window=4, guarded=False),
    "scale on the query": Style(scaled="query", mask="added", guarded=False),
    "masked logits": Style(kv_heads=1, scaled="logits", mask="chosen", guarded=False),
    "heads not joined": Style(joined=False),
}


class Exporter:
    """Writes a model of attention layers, each of which reads the token embeddings."""

    def __init__(self, style: Style, layers: int = 1, dtype: type = np.float32) -> None:
        self.style, self.layers, self.dtype = style, layers, dtype
        self.build = NodeBuilder("/model/")
        random = np.random.default_rng(3)
        hidden = style.heads * style.size
        widths = {"q": style.heads, "k": style.kv_heads, "v": style.kv_heads}
        self.embeddings = random.standard_normal((VOCABULARY, hidden)).astype(dtype)
        self.weights = {
            f"{layer}.{name}": (random.standard_normal((hidden, heads * style.size)) / hidden**0.5).astype(dtype)
            for layer in range(layers)
            for name, heads in widths.items()
        }

    def model(self) -> onnx.ModelProto:
        style, build = self.style, self.build
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        embedded = build.add("Gather", ["embed.weight", "input_ids"], "embed")
        seen = self._seen(embedded)
        last = embedded
        for layer in range(self.layers):
            last = self._layer(layer, embedded, seen)
        build.add("Identity", [last], "logits", output="logits")
        cache = ["batch", style.kv_heads, "past", style.size]
        inputs = [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "sequence"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
        ]
        outputs = [helper.make_tensor_value_info("logits", kind, ["batch", "sequence", style.heads * style.size])]
        for layer in range(self.layers):
            for part in ("key", "value"):
                inputs.append(helper.make_tensor_value_info(f"past_key_values.{layer}.{part}", kind, cache))
                outputs.append(
                    helper.make_tensor_value_info(f"present.{layer}.{part}", kind, [*cache[:2], "t", cache[3]])
                )
        tables = {"embed.weight": self.embeddings, **self.weights}
        graph = helper.make_graph(
            build.nodes, "main", inputs, outputs, [numpy_helper.from_array(w, name) for name, w in tables.items()]
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)

    def _length(self, value: str, axis: int, name: str) -> str:
        """A dimension, as a vector of one number."""
        shape = self.build.add("Shape", [value], f"{name}_shape")
        return self.build.add("Gather", [shape, self.build.constant([axis], f"{name}_axis")], name)

    def _scalar(self, vector: str, name: str) -> str:
        return self.build.add("Squeeze", [vector, self.build.constant([0], f"{name}_axis")], name)

    def _seen(self, embedded: str) -> str:
        """Which keys a row sees, (batch, 1, sequence, total)."""
        build, style = self.build, self.style
        sequence = self._scalar(self._length(embedded, 1, "sequence"), "sequence_0")
        past = self._scalar(self._length("past_key_values.0.key", 2, "past"), "past_0")
        total = build.add("Add", [past, sequence], "total_0")
        zero, one = build.constant(np.array(0), "zero"), build.constant(np.array(1), "one")
        rows = build.add("Range", [past, total, one], "rows_1d")
        rows = build.add("Unsqueeze", [rows, build.constant([1], "rows_axis")], "rows")
        columns = build.add("Range", [zero, total, one], "columns")
        seen = build.add("LessOrEqual", [columns, rows], "causal")
        if style.fault == "bidirectional":
            seen = build.add("Or", [seen, build.add("Not", [seen], "later")], "everything")
        if style.window >= 0:
            oldest = build.add("Sub", [rows, build.constant(np.array(style.window), "window")], "oldest")
            seen = build.add("And", [seen, build.add("Greater", [columns, oldest], "in_window")], "causal_in_window")
        real = build.add("Cast", ["attention_mask"], "real", to=TensorProto.BOOL)
        real = build.add("Unsqueeze", [real, build.constant([1, 2], "real_axes")], "real_4d")
        return seen if style.fault == "padding is seen" else build.add("And", [seen, real], "seen")

    def _layer(self, layer: int, embedded: str, seen: str) -> str:
        style, build = self.style, self.build
        heads = {"q": style.heads, "k": style.kv_heads, "v": style.kv_heads}
        new = {}
        for name, count in heads.items():
            flat = build.add("MatMul", [embedded, f"{layer}.{name}"], f"{layer}/{name}_proj")
            new[name] = build.split_heads(flat, count, f"{layer}/{name}")
        present = {
            part: build.add(
                "Concat", [f"past_key_values.{layer}.{part}", new[part[0]]], f"{layer}/{part}",
                output=f"present.{layer}.{part}", axis=-2,
            )
            for part in ("key", "value")
        }  # fmt: skip
        keys, values = (self._repeated(present[part], f"{layer}/{part}_used") for part in ("key", "value"))
        if style.fault == "scaled values":
            values = build.add("Mul", [values, self._number(2.0, f"{layer}/two")], f"{layer}/values_scaled")
        total = self._length(keys, 2, f"{layer}/total")
        logits = self._logits(layer, new["q"], keys)
        masked = self._masked(layer, logits, self._sliced(layer, seen, total))
        soft = build.add("Softmax", [masked], f"{layer}/softmax", axis=-1)
        if style.guarded:
            empty = build.add("IsNaN", [soft], f"{layer}/empty")
            soft = build.add("Where", [empty, self._number(0.0, f"{layer}/nothing"), soft], f"{layer}/guarded")
        if style.fault == "changed probabilities":
            soft = build.add("Mul", [soft, soft], f"{layer}/squared")
        mixed = build.add("MatMul", [soft, values], f"{layer}/mixed")
        rows = build.add("Transpose", [mixed], f"{layer}/mixed_rows", perm=[0, 2, 1, 3])
        if not style.joined:
            rows = build.add("Mul", [rows, self._number(1.0, f"{layer}/gate")], f"{layer}/gated")
        lengths = [self._length(embedded, axis, f"{layer}/length_{axis}") for axis in (0, 1)]
        shape = build.add("Concat", [*lengths, build.constant([-1], f"{layer}/rest")], f"{layer}/joined_shape", axis=0)
        return build.add("Reshape", [rows, shape], f"{layer}/joined")

    def _number(self, value: float, name: str) -> str:
        return self.build.constant(np.array(value, self.dtype), name)

    def _repeated(self, present: str, name: str) -> str:
        style, build = self.style, self.build
        if style.heads == style.kv_heads:
            return present
        lengths = [self._length(present, axis, f"{name}_{axis}") for axis in range(4)]
        group = build.constant([style.heads // style.kv_heads], f"{name}_group")
        apart = build.add("Unsqueeze", [present, build.constant([2], f"{name}_axis")], f"{name}_apart")
        wide = build.add("Concat", [*lengths[:2], group, *lengths[2:]], f"{name}_wide", axis=0)
        expanded = build.add("Expand", [apart, wide], f"{name}_expanded")
        count = build.add("Mul", [lengths[1], group], f"{name}_heads")
        if style.fault == "other order of heads":
            expanded = build.add("Transpose", [expanded], f"{name}_turned", perm=[0, 2, 1, 3, 4])
        shape = build.add("Concat", [lengths[0], count, *lengths[2:]], f"{name}_flat", axis=0)
        return build.add("Reshape", [expanded, shape], name)

    def _logits(self, layer: int, query: str, keys: str) -> str:
        style, build = self.style, self.build
        turned = build.add("Transpose", [keys], f"{layer}/keys_turned", perm=[0, 1, 3, 2])
        root = ""
        if style.scaled == "both":
            root = self._number(style.scale**0.5, f"{layer}/root")
        elif style.scaled == "query":
            query = build.add("Mul", [query, self._number(style.scale, f"{layer}/scale")], f"{layer}/query_scaled")
        elif style.scaled == "shape":
            size = build.add("Cast", [self._length(query, 3, f"{layer}/size")], f"{layer}/size_f", to=TensorProto.FLOAT)
            fourth = build.add("Sqrt", [build.add("Sqrt", [size], f"{layer}/size_root")], f"{layer}/size_fourth")
            root = build.add("Reciprocal", [fourth], f"{layer}/root")
        if root:
            query = build.add("Mul", [query, root], f"{layer}/query_scaled")
            turned = build.add("Mul", [turned, root], f"{layer}/keys_scaled")
        logits = build.add("MatMul", [query, turned], f"{layer}/product")
        if style.scaled == "logits":
            logits = build.add("Div", [logits, self._number(style.size**0.5, f"{layer}/divisor")], f"{layer}/divided")
        if style.softcap:
            cap = self._number(style.softcap, f"{layer}/cap")
            squashed = build.add("Tanh", [build.add("Div", [logits, cap], f"{layer}/ratio")], f"{layer}/tanh")
            logits = build.add("Mul", [squashed, cap], f"{layer}/capped")
        if style.fault == "bias":
            columns = build.add("Cast", ["/model/columns"], f"{layer}/columns_f", to=TensorProto.FLOAT)
            logits = build.add("Add", [logits, columns], f"{layer}/biased")
        return logits

    def _sliced(self, layer: int, seen: str, total: str) -> str:
        bounds = [self.build.constant([0], f"{layer}/from"), total, self.build.constant([-1], f"{layer}/axis")]
        return self.build.add("Slice", [seen, *bounds], f"{layer}/seen")

    def _masked(self, layer: int, logits: str, seen: str) -> str:
        build = self.build
        lowest = self._number(float(np.finfo(self.dtype).min), f"{layer}/lowest")
        if self.style.mask == "chosen":
            return build.add("Where", [seen, logits, lowest], f"{layer}/masked")
        if self.style.mask == "added":
            unseen = build.add("Cast", [build.add("Not", [seen], f"{layer}/unseen")], f"{layer}/unseen_f", to=1)
            return build.add("Add", [logits, build.add("Mul", [unseen, lowest], f"{layer}/bias")], f"{layer}/masked")
        infinite = self._number(-np.inf, f"{layer}/infinite")
        bias = build.add("Where", [seen, self._number(0.0, f"{layer}/none"), infinite], f"{layer}/bias")
        return build.add("Add", [logits, bias], f"{layer}/masked")


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
            num_heads=style.heads,
            kv_num_heads=style.kv_heads,
            scale=style.scale,
            softcap=style.softcap,
            sliding_window=style.window,
            calibrated_heads=layer.heads,
            beta=layer.beta,
            threshold=layer.threshold,
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
