"""The sink state inside tensors that look like more layers of the cache, for hosts that carry nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from act_export.errors import ActExportError
from act_export.onnx_file.names import PAST, PAST_SINKS, PRESENT, PRESENT_SINKS
from act_export.onnx_file.node_builder import PREFIX, NodeBuilder
from act_export.onnx_file.packed_state import PROPERTY, SCALE, PackedState
from act_export.onnx_file.save import check_model

_RANK = 4
_KEY, _PRESENT_KEY = f"{PAST}0.key", f"{PRESENT}0.key"
_LAYER = re.compile(r"past_key_values\.(\d+)\.key")
_PARTS = {TensorProto.FLOAT: 1, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 3}
"""Numbers of a type that add up to a float32 number."""


def pack_file(path: Path) -> PackedState | None:
    """`pack_sink_state` of a file; its weights stay where they are.

    Raises:
        onnx.checker.ValidationError: If the result isn't a valid model.
    """
    model = onnx.load(path, load_external_data=False)
    packed = pack_sink_state(model)
    if packed is not None:
        onnx.save(model, path)
        check_model(path)
    return packed


def pack_sink_state(model: onnx.ModelProto) -> PackedState | None:
    """Moves the column sums of all calibrated layers into as few tensors of the cache's shape and type as hold them.

    A host such as optimum makes every input that is named like a cache, (batch, key-value heads, past, head size), and
    gives it back what the call before put out. For each token such a tensor has room for key-value heads * head size
    numbers; sums in float32 take one each, in float16 two and in bfloat16 three, which add up.

    The inputs `past_sink_scores.N` become `past_key_values.L.key` and, if one tensor isn't enough, `.value`, and so on
    with L + 1; L is the model's number of layers. The outputs go likewise. What is computed stays the same.

    Args:
        model: With inputs as act-export names them; changed in place. Weights may lie in other files.

    Returns:
        Where the sums are; None if the model has no sink state, and is as it was.

    Raises:
        ActExportError: If the cache isn't named as act-export names it, or its shape doesn't say heads and size.
    """
    graph = model.graph
    infos = {info.name: info for info in graph.input}
    sums = [name for name in infos if name.startswith(PAST_SINKS)]
    if not sums:
        return None
    heads = {int(name.removeprefix(PAST_SINKS)): infos[name].type.tensor_type.shape.dim[1].dim_value for name in sums}
    kv_heads, size = _cache_shape(infos, {info.name for info in graph.output})
    kind = infos[_KEY].type.tensor_type.elem_type
    needed = _PARTS[kind] * sum(heads.values())
    count = -(-needed // (kv_heads * size))
    numbers = [_LAYER.fullmatch(name) for name in infos]
    layers = 1 + max(int(found.group(1)) for found in numbers if found)
    names = [f"{layers + i // 2}.{('key', 'value')[i % 2]}" for i in range(count)]
    packed = PackedState(tuple(PAST + name for name in names), heads, _PARTS[kind])
    _rewire(graph, packed, _unpack(packed, kv_heads * size, kind), _pack(packed, kv_heads, size, kind))
    model.metadata_props.add(key=f"act_export.{PROPERTY}", value=json.dumps(packed.to_fields()))
    return packed


def _cache_shape(infos: Mapping[str, onnx.ValueInfoProto], outputs: Collection[str]) -> tuple[int, int]:
    """Key-value heads and head size."""
    dims = infos[_KEY].type.tensor_type.shape.dim if _KEY in infos else []
    sizes = [dim.dim_value for dim in dims]
    if _PRESENT_KEY not in outputs:
        raise ActExportError(
            f"the sink state can't be part of the cache: the model has no output {_PRESENT_KEY}; give the state inputs "
            f"of its own"
        )
    if len(sizes) != _RANK or not sizes[1] or not sizes[3]:
        raise ActExportError(
            f"the sink state can't be part of the cache: the model has no input {_KEY} whose shape says its heads and "
            f"their size; give the state inputs of its own"
        )
    return sizes[1], sizes[3]


def _unpack(packed: PackedState, width: int, kind: int) -> Sequence[onnx.NodeProto]:
    """Nodes that make `past_sink_scores.N`, (batch, calibrated heads, past, 1), of the packed inputs."""
    build = NodeBuilder(f"{PREFIX}sinks/past/")
    flat_shape = build.constant([0, 0, width], "flat_shape")
    flat = []
    for name in packed.inputs:
        rows = build.add("Transpose", [name], f"{name}_rows", perm=[0, 2, 1, 3])
        flat.append(build.add("Reshape", [rows, flat_shape], f"{name}_flat"))
    numbers = build.add("Concat", flat, "numbers", axis=2)
    total = packed.num_heads
    parts = []
    for i in range(packed.parts):
        bounds = [
            build.constant([value], f"{name}_{i}") for name, value in (("from", i * total), ("to", i * total + total))
        ]
        part = build.add("Slice", [numbers, *bounds, build.constant([2], f"axis_{i}")], f"part_{i}")
        parts.append(
            part if kind == TensorProto.FLOAT else build.add("Cast", [part], f"part_{i}_f", to=TensorProto.FLOAT)
        )
    sums = parts[0]
    if packed.parts > 1:
        scale = build.constant(np.array(SCALE, np.float32), "scale")
        sums = build.add("Mul", [build.add("Sum", parts, "scaled"), scale], "sums")
    by_head = build.add("Transpose", [sums], "by_head", perm=[0, 2, 1])
    columns = build.add("Unsqueeze", [by_head, build.constant([3], "last_axis")], "columns")
    sizes = build.constant(list(packed.heads.values()), "sizes")
    build.add_many("Split", [columns, sizes], "split", [f"{PAST_SINKS}{layer}" for layer in packed.heads], axis=1)
    return build.nodes


def _pack(packed: PackedState, kv_heads: int, size: int, kind: int) -> Sequence[onnx.NodeProto]:
    """Nodes that make the packed outputs of `present_sink_scores.N`."""
    build = NodeBuilder(f"{PREFIX}sinks/present/")
    columns = build.add("Concat", [f"{PRESENT_SINKS}{layer}" for layer in packed.heads], "columns", axis=1)
    by_head = build.add("Squeeze", [columns, build.constant([3], "last_axis")], "by_head")
    rest = build.add("Transpose", [by_head], "sums", perm=[0, 2, 1])
    parts = [rest]
    if packed.parts > 1:
        rest = build.add("Div", [rest, build.constant(np.array(SCALE, np.float32), "scale")], "scaled")
        parts = []
        for i in range(packed.parts):
            rounded = build.add("Cast", [rest], f"part_{i}", to=kind)
            parts.append(build.add("Cast", [rounded], f"part_{i}_f", to=TensorProto.FLOAT))
            rest = build.add("Sub", [rest, parts[-1]], f"rest_{i}")
        del build.nodes[-1]  # nothing keeps what the last part leaves
    numbers = build.add("Concat", parts, "numbers", axis=2)
    room = len(packed.outputs) * kv_heads * size - packed.parts * packed.num_heads
    whole = build.add("Pad", [numbers, build.constant([0, 0, 0, 0, 0, room], "room")], "whole")
    if kind != TensorProto.FLOAT:
        whole = build.add("Cast", [whole], "stored", to=kind)
    sizes = build.constant([kv_heads * size] * len(packed.outputs), "sizes")
    flat = [f"{build.prefix}{name}_flat" for name in packed.outputs]
    shape = build.constant([0, 0, kv_heads, size], "rows_shape")
    build.add_many("Split", [whole, sizes], "split", flat, axis=2)
    for name, part in zip(packed.outputs, flat, strict=True):
        rows = build.add("Reshape", [part, shape], f"{name}_rows")
        build.add("Transpose", [rows], f"{name}_heads", output=name, perm=[0, 2, 1, 3])
    return build.nodes


def _rewire(
    graph: onnx.GraphProto,
    packed: PackedState,
    before: Sequence[onnx.NodeProto],
    after: Sequence[onnx.NodeProto],
) -> None:
    """Puts the nodes around the graph's own, and the packed tensors in the places of the sums."""
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in graph.node]
    del graph.node[:]
    graph.node.extend([*before, *nodes, *after])
    for field, old, new, like in (
        (graph.input, PAST_SINKS, packed.inputs, _KEY),
        (graph.output, PRESENT_SINKS, packed.outputs, _PRESENT_KEY),
    ):
        first = next(i for i, info in enumerate(field) if info.name.startswith(old))
        kept = [onnx.ValueInfoProto.FromString(info.SerializeToString()) for info in field]
        shape = next(info for info in kept if info.name == like)
        added = [onnx.ValueInfoProto(name=name, type=shape.type) for name in new]
        before_it = [info for info in kept[:first] if not info.name.startswith(old)]
        after_it = [info for info in kept[first:] if not info.name.startswith(old)]
        del field[:]
        field.extend([*before_it, *added, *after_it])
