"""Putting the operator in the place of the attention of calibrated layers; every other node stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.strengths import CalibratedHeads
from act_export.errors import ActExportError
from act_export.graft import sink_state
from act_export.graft.graph import Graph, UnsupportedPatternError, describe
from act_export.graft.rewriters import FINDERS
from act_export.graft.sink_state import StateLayout, StateNames
from act_export.graft.site import AttentionSite, Layout
from act_export.onnx_file.names import CALIBRATION, EMBEDDINGS, IDS, MASK
from act_export.onnx_file.node_builder import POSITIONS, PREFIX, NodeBuilder
from act_export.onnx_file.precision import MICROSOFT, MICROSOFT_VERSION
from act_export.ops import functions, schema

_TOKENS = (IDS, EMBEDDINGS)
_OLDEST_OPSET = 15  # the portable functions use Shape with start and end
Templates = tuple[str, str, str, str]
"""Names of a layer's past key, past value, present key and present value, with %d for the layer."""


@dataclass(frozen=True)
class RewrittenLayer:
    """One calibrated layer.

    Attributes:
        site: What was there.
        nodes: What is there now.
        state: Its sink state.
    """

    site: AttentionSite
    nodes: tuple[onnx.NodeProto, ...]
    state: StateNames


@dataclass(frozen=True)
class Rewritten:
    """What a rewriting adds to a graph and takes away.

    Attributes:
        shared: Nodes that all layers use; they read only inputs of the graph.
        calibration: The default's strengths, (1, heads, 3).
        layers: By number.
        functions: That the new nodes call.
        opsets: Domain and version of operators that the model didn't use before.
    """

    shared: tuple[onnx.NodeProto, ...]
    calibration: NDArray[np.float32]
    layers: Mapping[int, RewrittenLayer]
    functions: tuple[onnx.FunctionProto, ...]
    opsets: Mapping[str, int]


def find_sites(graph: Graph) -> dict[int, AttentionSite]:
    """The attention of each layer.

    Raises:
        UnsupportedPatternError: If the graph has none that act-export knows, or two of one layer.
    """
    sites: dict[int, AttentionSite] = {}
    for find in FINDERS:
        for site in find(graph):
            other = sites.get(site.layer)
            if site.layer < 0:
                raise UnsupportedPatternError(
                    f"{describe(site.nodes[-1])}: {site.problem or 'its cache has no number of a layer in its name'}"
                )
            if other is not None:
                raise UnsupportedPatternError(
                    f"{describe(other.nodes[-1])} and {describe(site.nodes[-1])} are both attention of layer "
                    f"{site.layer}; act-export takes decoders with one attention a layer"
                )
            sites[site.layer] = site
    if not sites:
        raise UnsupportedPatternError(_no_attention(graph))
    return dict(sorted(sites.items()))


def rewrite(
    model: onnx.ModelProto,
    graph: Graph,
    sites: Mapping[int, AttentionSite],
    calibrations: CalibrationSet,
    layout: StateLayout,
    templates: Templates | None = None,
) -> Rewritten:
    """Makes the nodes for the calibrated layers; changes nothing.

    Args:
        model: The model.
        graph: Its graph.
        sites: Of all layers.
        calibrations: Must fit the model.
        layout: Where the sink state goes.
        templates: Names of the cache, for the layout `CACHE_LAYERS`.

    Raises:
        UnsupportedPatternError: If a calibrated layer's attention can't be replaced; it names the node.
        ActExportError: If the model has no mask, or operators older than the portable functions need.
    """
    opset = next((each.version for each in model.opset_import if each.domain == ""), 0)
    if opset < _OLDEST_OPSET:
        raise ActExportError(
            f"the model has opset {opset}; {_OLDEST_OPSET} or newer is needed: export it again, or convert it with "
            f"onnx.version_converter"
        )
    if MASK not in graph.inputs:
        raise UnsupportedPatternError(f"the model has no input {MASK}, which tells padding from tokens")
    heads = calibrations.heads
    chosen = {layer: supported(sites, layer) for layer in heads.heads}
    _check_names(graph)
    shared = NodeBuilder()
    mask = MASK
    if graph.element_type(MASK) != TensorProto.INT64:
        mask = shared.add("Cast", [MASK], MASK, to=TensorProto.INT64)
    tokens = next((name for name in _TOKENS if name in graph.inputs), None)
    if tokens is None:
        raise UnsupportedPatternError(f"the model has neither {' nor '.join(_TOKENS)} among its inputs")
    writer = _LayerWriter(graph, shared, mask, tokens, layout, templates, first_free=max(sites) + 1)
    layers = {}
    parts = _split_calibration(shared, heads)
    for layer, site in chosen.items():
        layers[layer] = writer.write(site, heads.heads[layer], heads.threshold_mode, parts[layer])
    if any(POSITIONS in node.input for layer in layers.values() for node in layer.nodes):
        shared.add_many(_POSITIONS_FUNCTION, [mask, tokens], "positions", [POSITIONS], domain=schema.DOMAIN)
    nodes = [*shared.nodes, *(node for layer in layers.values() for node in layer.nodes)]
    imported = {each.domain for each in model.opset_import}
    versions = {schema.DOMAIN: schema.VERSION, MICROSOFT: MICROSOFT_VERSION}
    return Rewritten(
        tuple(shared.nodes),
        heads.strengths(calibrations.default_calibration),
        layers,
        tuple(_functions(nodes, opset)),
        {node.domain: versions[node.domain] for node in nodes if node.domain and node.domain not in imported},
    )


def apply(model: onnx.ModelProto, graph: Graph, rewritten: Rewritten) -> list[tuple[int, onnx.NodeProto]]:
    """Changes the model accordingly.

    Args:
        model: Changed in place; `graph` is no longer valid afterwards.
        graph: Its graph.
        rewritten: What `rewrite` made.

    Returns:
        The nodes that were taken out and their indices.
    """
    removed: dict[int, onnx.NodeProto] = {}
    at: dict[int, Sequence[onnx.NodeProto]] = {}
    for layer in rewritten.layers.values():
        positions = [graph.position(node) for node in layer.site.nodes]
        for position, node in zip(positions, layer.site.nodes, strict=True):
            removed[position] = onnx.NodeProto.FromString(node.SerializeToString())
        at[max(positions)] = layer.nodes
    nodes = list(rewritten.shared)
    for position, node in enumerate(model.graph.node):
        if position not in removed:
            nodes.append(onnx.NodeProto.FromString(node.SerializeToString()))
        nodes.extend(at.get(position, ()))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    shape = ["calibrations", *rewritten.calibration.shape[1:]]
    model.graph.input.append(helper.make_tensor_value_info(CALIBRATION, TensorProto.FLOAT, shape))
    model.graph.initializer.append(numpy_helper.from_array(rewritten.calibration, CALIBRATION))
    for layer in rewritten.layers.values():
        by_name = {info.name: info for info in layer.state.infos}
        model.graph.input.extend(by_name[name] for name in layer.state.past)
        model.graph.output.extend(by_name[name] for name in layer.state.present)
    known = {(each.domain, each.name) for each in model.functions}
    model.functions.extend(each for each in rewritten.functions if (each.domain, each.name) not in known)
    for domain, version in rewritten.opsets.items():
        model.opset_import.append(helper.make_opsetid(domain, version))
    return sorted(removed.items())


class _LayerWriter:
    """Writes one layer after another; rows are counted once for all layers of the same window."""

    def __init__(
        self,
        graph: Graph,
        shared: NodeBuilder,
        mask: str,
        tokens: str,
        layout: StateLayout,
        templates: Templates | None,
        first_free: int,
    ) -> None:
        self._graph, self._shared, self._mask, self._tokens = graph, shared, mask, tokens
        self._layout, self._templates, self._next = layout, templates, first_free
        self._rows: dict[int, tuple[str, str]] = {}

    def write(self, site: AttentionSite, heads: Sequence[int], mode: str, calibration: str) -> RewrittenLayer:
        """The nodes that stand for a layer's attention; `calibration` is the name of its heads' strengths."""
        terms = site.terms
        assert terms is not None
        build = NodeBuilder(f"{PREFIX}layers.{site.layer}/")
        query, key, value = site.operands(build)
        element_type = self._graph.element_type(site.cache.past_key)
        assert element_type is not None
        dimensions = sink_state.Dimensions.of(self._graph, site.cache)
        if self._layout is StateLayout.SCORES:
            names = sink_state.score_names(site.layer, len(heads), dimensions)
            (past,), (present,) = names.past, names.present
        else:
            assert self._templates is not None
            names = sink_state.cache_layer_names(self._templates, self._next, len(heads), element_type, dimensions)
            self._next += 1
            before, after = self._count_rows(names, terms.sliding_window)
            past = sink_state.load_scores(build, names, before, element_type)
            present = build.prefix + "sink_scores"
        learned = {"sink_logits": list(terms.sink_logits) or [schema.NO_SINK_LOGIT]}  # inliners don't know defaults
        flat = site.output if site.output_layout is Layout.FLAT else build.prefix + "output"
        cache = site.cache
        build.add_many(
            schema.CALIBRATED,
            [query, key, value, cache.past_key, cache.past_value, past, self._mask, calibration],
            schema.CALIBRATED,
            [flat, cache.present_key, cache.present_value, present],
            domain=schema.DOMAIN,
            num_heads=terms.num_heads,
            kv_num_heads=terms.kv_num_heads,
            scale=float(terms.scale),
            softcap=float(terms.softcap),
            sliding_window=terms.sliding_window,
            calibrated_heads=list(heads),
            threshold_mode=mode,
            **learned,
        )
        if flat != site.output:
            build.split_heads(flat, terms.num_heads, "output_heads", output=site.output)
        if self._layout is not StateLayout.SCORES:
            sink_state.store_scores(build, present, names, after, element_type)
        return RewrittenLayer(site, tuple(build.nodes), names)

    def _count_rows(self, names: StateNames, window: int) -> tuple[str, str]:
        if window not in self._rows:
            name = "rows" if window < 0 else f"rows_in_{window}"
            self._rows[window] = sink_state.count_rows(
                self._shared, self._mask, names.past[0], self._tokens, window, name
            )
        return self._rows[window]


def _split_calibration(shared: NodeBuilder, heads: CalibratedHeads) -> dict[int, str]:
    """Names of the layers' parts of the input `calibration`."""
    if len(heads.heads) == 1:
        return dict.fromkeys(heads.heads, CALIBRATION)
    names = {layer: f"{shared.prefix}{CALIBRATION}.{layer}" for layer in heads.heads}
    sizes = shared.constant([len(each) for each in heads.heads.values()], f"{CALIBRATION}_heads")
    shared.add_many("Split", [CALIBRATION, sizes], CALIBRATION, [*names.values()], axis=1)
    return names


def supported(sites: Mapping[int, AttentionSite], layer: int) -> AttentionSite:
    """A layer's attention, if the operator can stand in for it.

    Raises:
        UnsupportedPatternError: If not, or if there is none; it names the node.
    """
    site = sites.get(layer)
    if site is None:
        raise UnsupportedPatternError(
            f"layer {layer} should be calibrated, and has no attention that act-export knows; layers with one: "
            f"{', '.join(map(str, sites))}"
        )
    if site.problem is not None:
        raise UnsupportedPatternError(f"layer {layer} can't be calibrated: {site.problem}")
    return site


def _check_names(graph: Graph) -> None:
    """Our nodes are known by their prefix, so nothing else may have it; and the input is called as it is."""
    if CALIBRATION in graph.inputs or any(each.name == CALIBRATION for each in graph.proto.initializer):
        raise ActExportError(f"the model has an input {CALIBRATION} already, which act-export keeps for itself")
    for node in graph.proto.node:
        if node.name.startswith(PREFIX) or any(name.startswith(PREFIX) for name in node.output):
            raise ActExportError(
                f"{describe(node)} has a name that begins with {PREFIX!r}, which act-export keeps for itself"
            )


def _no_attention(graph: Graph) -> str:
    kinds = Counter(node.op_type for node in graph.proto.node)
    if "If" in kinds:
        return "the model keeps its layers inside an If node, as merged decoders do; export it without merging"
    operators = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
    return f"the model has no attention with a cache that act-export knows; its nodes are {operators}, ..."


_POSITIONS_FUNCTION = "TokenPositions"
_POSITIONS = f"""
{_POSITIONS_FUNCTION} (attention_mask, tokens) => (positions) {{
  i1 = Constant <value_ints: ints = [1]> ()
  far = Constant <value_ints: ints = [{2**31 - 1}]> ()
  one = Constant <value_int: int = 1> ()
  zero = Constant <value_int: int = 0> ()
  total = Shape <start: int = 1, end: int = 2> (attention_mask)
  sequence = Shape <start: int = 1, end: int = 2> (tokens)
  past = Sub (total, sequence)
  count = CumSum (attention_mask, one)
  before = Sub (count, one)
  known = Max (before, zero)
  positions = Slice (known, past, far, i1)
}}
"""


def _functions(nodes: Sequence[onnx.NodeProto], opset: int) -> Iterator[onnx.FunctionProto]:
    if any(node.op_type == schema.CALIBRATED for node in nodes):
        yield functions.function_body(schema.CALIBRATED, opset)
    if any(node.op_type == _POSITIONS_FUNCTION for node in nodes):
        yield onnx.parser.parse_function(f'<opset_import: ["" : {opset}], domain: "{schema.DOMAIN}">\n{_POSITIONS}')
    yield from sink_state.functions_of(nodes, opset)
