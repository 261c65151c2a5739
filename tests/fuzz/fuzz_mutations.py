"""Seeded damage to files: JSON of any kind, JSON Lines, ONNX models, safetensors, and any other bytes.

Each function takes the content and random numbers, and gives a content that somebody hostile, or a broken disk, might
have written. The same seed gives the same damage.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from typing import Any

import onnx
from onnx import AttributeProto, TensorProto, helper

_RAW = "@@raw:"
NUMBERS = ("-1", "0", "1e999", "NaN", "-Infinity", "0.5", "1" + "0" * 12, "9" * 5000, "-" + "9" * 25, "1e-400", "true")
_VALUES: tuple[Any, ...] = (
    *(_RAW + number for number in NUMBERS),
    *(None, "", "\x00", "..", "/etc/passwd", "../../x", "a" * 100_000, "\ud800", "{", "{{ 1 }}", "(a+)+$", "ünï"),
    *([], {}, [None], [[]], {"": {}}, list(range(3000)), {str(i): i for i in range(40_000)}),
    _RAW + "[" * 2000 + "]" * 2000,
    _RAW + '{"a":' * 500 + "1" + "}" * 500,
    _RAW + '{"a": 1, "a": 2}',
)


def damaged_json(text: str, rng: random.Random) -> bytes:
    """JSON with a member of another kind, range or name, or no JSON at all."""
    kind = rng.random()
    if kind < 0.12:
        return damaged_bytes(text.encode(), rng)
    if kind < 0.2:
        whole = rng.choice(("[]", "3", "null", '"a"', "", "{}", "[" * 100_000, "{" + '"a":{' * 3000, "9" * 6000))
        return rng.choice((b"", b"\xef\xbb\xbf", b"\xff\xfe")) + whole.encode(rng.choice(("utf-8", "utf-16")))
    if kind < 0.24:
        return text.encode(rng.choice(("utf-16", "utf-8-sig", "utf-32")))
    document = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        document = _with_damage(document, rng)
    return _raw(json.dumps(document)).encode()


def _raw(text: str) -> str:
    """Puts texts that are no JSON where they were marked."""
    for value in _VALUES:
        if isinstance(value, str) and value.startswith(_RAW):
            text = text.replace(json.dumps(value), value.removeprefix(_RAW))
    return text


def _with_damage(document: Any, rng: random.Random) -> Any:
    places = list(_places(document))
    if not places:
        return rng.choice(_VALUES)
    holder, key = rng.choice(places)
    damage = rng.random()
    if damage < 0.2:
        del holder[key]
    elif damage < 0.3 and isinstance(holder, dict):
        holder[rng.choice(("", "x", "\ud800", "a" * 5000, "-1", "²", "1e3", key + " "))] = holder.pop(key)
    elif damage < 0.4:
        holder[key] = [holder[key]] * rng.choice((1, 2, 1000))
    elif damage < 0.5:
        holder[key] = {"0": holder[key]}
    elif damage < 0.6:
        holder[key] = str(holder[key])
    else:
        holder[key] = rng.choice(_VALUES)
    return document


def _places(document: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting and len(found) < 5000:
        each = waiting.pop()
        keys = list(each) if isinstance(each, dict) else range(len(each)) if isinstance(each, list) else ()
        for key in keys:
            found.append((each, key))
            waiting.append(each[key])
    return found


def damaged_lines(text: str, rng: random.Random) -> bytes:
    """JSON Lines of which some are damaged."""
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 3))):
        index = rng.randrange(len(lines))
        lines[index] = damaged_json(lines[index], rng).decode("latin-1")
    return "\n".join(lines).encode("latin-1", "replace")


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bytes that are cut off, changed, doubled, or others."""
    kind = rng.randrange(5)
    if kind == 0:
        return content[: rng.randrange(len(content) + 1)]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(rng.choice((1, 3, 30))):
            if changed:
                changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    if kind == 2:
        begin = rng.randrange(len(content) + 1)
        return content[:begin] + rng.randbytes(rng.choice((1, 8, 1000))) + content[begin:]
    return content + content if kind == 3 else rng.randbytes(rng.choice((0, 1, 9, 5000)))


def damaged_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Tensors with another header, or of another length."""
    if rng.random() < 0.3:
        return damaged_bytes(content, rng)
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + size], content[8 + size :]
    if rng.random() < 0.15:
        return struct.pack("<Q", rng.choice((0, size + 1, 10**12, 2**63, 2**64 - 1))) + header + rest
    if rng.random() < 0.2:  # values alone, e.g. NaN
        return content[: 8 + size] + b"\xff" * len(rest)
    header = damaged_json(header.decode(), rng)
    return struct.pack("<Q", len(header)) + header + rest


def damaged_model(content: bytes, rng: random.Random) -> bytes:
    """An ONNX model with other nodes, types, shapes, versions or places of its weights."""
    if rng.random() < 0.1:
        return damaged_bytes(content, rng)
    model = onnx.ModelProto.FromString(content)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        try:
            rng.choice(_MODEL_DAMAGE)(model, rng)
        except (IndexError, ValueError):  # there is nothing to damage so any more
            continue
    return bytes(model.SerializeToString())


def damaged_property(content: bytes, rng: random.Random) -> bytes:
    """An ONNX model that says something else of itself."""
    model = onnx.ModelProto.FromString(content)
    ours = [entry for entry in model.metadata_props if entry.key.startswith("act_export.")]
    entry = rng.choice(ours)
    kind = rng.random()
    if kind < 0.1:
        model.metadata_props.remove(entry)
    elif kind < 0.2:
        entry.key = "act_export." + rng.choice(("graft", "packed_sink_state", "limits", "model", "accuracy_level"))
    else:
        try:
            json.loads(entry.value)
            entry.value = damaged_json(entry.value, rng).decode("latin-1")
        except ValueError:
            entry.value = rng.choice(("", "x" * 100_000, "{}", "9" * 6000, "\x00", "[]"))
    return bytes(model.SerializeToString())


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return rng.choice(model.graph.node)


def _info(model: onnx.ModelProto, rng: random.Random) -> onnx.ValueInfoProto:
    return rng.choice([*model.graph.input, *model.graph.output])


def _drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def _no_outputs(model: onnx.ModelProto, rng: random.Random) -> None:
    del _node(model, rng).output[:]


def _no_inputs(model: onnx.ModelProto, rng: random.Random) -> None:
    del _node(model, rng).input[rng.choice((0, 1)) :]


def _cycle(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.input[rng.randrange(len(node.input))] = rng.choice((node.output[0], model.graph.node[-1].output[0]))


def _same_name(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.node.append(_node(model, rng))
    model.graph.initializer.append(rng.choice(model.graph.initializer))


def _rename(model: onnx.ModelProto, rng: random.Random) -> None:
    _info(model, rng).name = rng.choice(("", "x" * 10_000, "past_sink_scores.x", "past_key_values.²", "logits", "a/b"))


def _type(model: onnx.ModelProto, rng: random.Random) -> None:
    _info(model, rng).type.tensor_type.elem_type = rng.choice((0, 8, 16, 999, -1, 22, 7))


def _no_type(model: onnx.ModelProto, rng: random.Random) -> None:
    _info(model, rng).ClearField("type")


def _shape(model: onnx.ModelProto, rng: random.Random) -> None:
    shape = _info(model, rng).type.tensor_type.shape
    kind = rng.randrange(3)
    if kind == 0:
        del shape.dim[rng.randrange(len(shape.dim)) :]
    elif kind == 1:
        rng.choice(shape.dim).dim_value = rng.choice((0, -1, -(2**62), 10**12, 2**62))
    else:
        rng.choice(shape.dim).ClearField("value")


def _attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    given = rng.choice([each for node in model.graph.node for each in node.attribute])
    kind = rng.randrange(4)
    if kind == 0:
        given.type = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 99 % 15))
    elif kind == 1:
        given.CopyFrom(helper.make_attribute(given.name, rng.choice(([1.5, 2.0], "ü", -1, 10**12, 0, 1e30, [0, -5]))))
    elif kind == 2:
        given.s, given.type = b"\xff\xfe", AttributeProto.STRING
    else:
        given.name = rng.choice(("", "x", "num_heads", "scale"))


def _attribute_of_attention(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if "Attention" in node.op_type]
    given = rng.choice([each for node in nodes for each in node.attribute])
    given.CopyFrom(helper.make_attribute(given.name, rng.choice(([1.5], "x", -1, 0, 10**12, float("nan"), [1] * 999))))


def _operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    node.op_type = rng.choice(("", "Loop", "MatMulNBits", "GroupQueryAttention", "Constant", "x" * 5000))
    node.domain = rng.choice(("", "com.microsoft", "act", "other", "ai.onnx"))


def _opset(model: onnx.ModelProto, rng: random.Random) -> None:
    if rng.random() < 0.3:
        del model.opset_import[:]
    else:
        rng.choice(model.opset_import).version = rng.choice((0, -1, 1, 10**9, 2**62))
        model.ir_version = rng.choice((0, 3, 10, 10**9))


def _weights(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(model.graph.initializer)
    kind = rng.randrange(5)
    if kind == 0:
        tensor.data_type = rng.choice((0, 8, 16, 999, -5))
    elif kind == 1:
        del tensor.dims[:]
        tensor.dims.extend(rng.choice(((0,), (-1,), (10**12, 10**12), (2**62,), (1,) * 3000, ())))
    elif kind == 2:
        tensor.ClearField("raw_data")
    elif kind == 3:
        tensor.raw_data = b"\xff" * rng.choice((0, 1, 1000))
    else:
        tensor.data_location = TensorProto.EXTERNAL


def _external(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = rng.choice(
        [each for each in model.graph.initializer if each.external_data] or list(model.graph.initializer)
    )
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    location = rng.choice(("", "a" * 100_000, "../x", "/etc/passwd", "\x00", ".", "model.onnx", "no.data", "x/" * 999))
    tensor.external_data.add(key="location", value=location)
    tensor.external_data.add(key="offset", value=rng.choice(("0", "-1", "x", "9" * 5000, "1e3", "²")))
    tensor.external_data.add(key=rng.choice(("length", "checksum", "")), value=rng.choice(("0", "-1", "9" * 30, "")))


def _deep(model: onnx.ModelProto, rng: random.Random) -> None:
    inner = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [], [])
    for _ in range(rng.choice((3, 10, 28))):
        inner = helper.make_graph([helper.make_node("If", ["c"], ["y"], then_branch=inner)], "g", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["deep"], then_branch=inner))


def _functions(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.functions[rng.randrange(len(model.functions)) :]


_MODEL_DAMAGE: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    *(_drop_node, _no_outputs, _no_inputs, _cycle, _same_name, _rename, _type, _no_type, _shape, _attribute),
    *(_attribute_of_attention, _operator, _opset, _weights, _external, _deep, _functions),
)
