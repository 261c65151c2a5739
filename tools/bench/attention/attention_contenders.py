"""What bench_attention.py compares: one-node models of attention, bound to the same data, checked
to agree.

| contender | operator | cache |
| --- | --- | --- |
| calibrated | act.CalibratedAttention, every head calibrated, beta 0.4, threshold 0.1 | shared |
| quarter | the same with every fourth head calibrated; on a GPU only | shared |
| gamma | the same node as calibrated, whose heads have beta 1 and gamma 2; on the CPU only | shared |
| idle | the same node, whose heads have beta and gamma 1; on the CPU only | shared |
| plain | act.Attention: the same kernel, no head calibrated | shared |
| gqa | com.microsoft.GroupQueryAttention of ONNX Runtime, without its rotary embedding | shared |
| attention23 | standard Attention, opset 23, of ONNX Runtime | copied |

Prompts start with a cache of length 0 and write one of exactly the prompt's length. Decode finds the past in buffers
that are longer than needed, and where the cache is shared, past and present are the same memory and only the new token
is written. The standard operator can't do that: it gets a past of the exact length and copies it at every call.
GroupQueryAttention is told lengths in place of a mask: seqlens_k is the total of each sequence minus one,
total_sequence_length the largest total.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from attention_workloads import Data, Shape, Workload
from on_device import Array, make_session
from onnx import NodeProto, helper
from onnxruntime import OrtValue

from act_export.ops import schema
from act_export.ops.library import library_path
from act_export.runtime.device import Device

Types = dict[str, np.dtype[Any]]

THRESHOLD = 0.1
CONTENDERS = ("calibrated", "gamma", "idle", "plain", "gqa", "attention23")
QUARTER = "quarter"
STRENGTHS = {"calibrated": (0.4, 1.0, THRESHOLD), QUARTER: (0.4, 1.0, THRESHOLD), "gamma": (1, 2, 0), "idle": (1, 1, 0)}
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}  # by which two outputs of about 1 may differ
LARGEST_REFERENCE = 512  # tokens: the reference computes whole attention maps


class DisagreementError(Exception):
    """Two contenders that compute the same differ by more than rounding."""


class Contender:
    """One session of one node, bound to its own outputs and cache and to the data that all share."""

    def __init__(self, name: str, workload: Workload, data: Data) -> None:
        self.name = name
        self.workload = workload
        shape, batch = workload.shape, workload.batch
        inputs: dict[str, Array] = {name: getattr(data, name) for name in ("query", "key", "value")}
        outputs = {"output": zeros((batch, workload.sequence, shape.num_heads * shape.head_size), workload.dtype)}
        states = {name: getattr(data, name) for name in ("past_key", "past_value")}
        if name in STRENGTHS:
            states["past_sink_scores"] = data.past_sink_scores
            inputs["calibration"] = strengths(name, shape.num_heads)
        for past_name, past in states.items():
            shared = workload.past > 0 and name != "attention23"
            length = workload.capacity if shared else workload.total
            present = zeros((*past.shape[:2], length, past.shape[3]), past.dtype)
            outputs[past_name.replace("past", "present")] = present
            inputs[past_name] = present if shared else past
            if shared:
                present[:, :, : workload.past] = past
        lengths = {
            "gqa": {
                "seqlens_k": np.full(batch, workload.total - 1, np.int32),
                "total_sequence_length": np.array([workload.total], np.int32),
            },
            "attention23": {},
        }
        inputs |= lengths.get(name, {"attention_mask": np.ones((batch, workload.total), np.int64)})

        # An OrtValue borrows numpy's memory: the arrays must live as long as the binding.
        self.arrays = inputs | outputs
        self.past_sink_scores = data.past_sink_scores
        model = make_model(name, workload, inputs, outputs)
        self.session = make_session(model, library_path(), Device(), shared_threads=True)
        self.binding = self.session.io_binding()
        values: dict[int, OrtValue] = {}
        for role, arrays in ((self.binding.bind_ortvalue_input, inputs), (self.binding.bind_ortvalue_output, outputs)):
            for tensor, array in arrays.items():
                role(tensor, values.setdefault(id(array), OrtValue.ortvalue_from_numpy(array)))

    def run(self) -> None:
        self.session.run_with_iobinding(self.binding)

    def restore(self) -> None:
        """Takes back what the calls so far added to the running column sums of a past that they share."""
        if self.workload.past and self.name in STRENGTHS:
            self.arrays["past_sink_scores"][:, :, : self.workload.past] = self.past_sink_scores


def zeros(dimensions: tuple[int, ...], dtype: Any) -> Array:
    """Zeros whose memory is there, not only promised."""
    array = np.empty(dimensions, dtype)
    array.fill(0)
    return array


def make_model(name: str, workload: Workload, inputs: dict[str, Array], outputs: dict[str, Array]) -> bytes:
    """The node of a contender between graph inputs and outputs of these names and types."""
    node = make_node(name, workload.shape, list(outputs))
    types = [{n: array.dtype for n, array in arrays.items()} for arrays in (inputs, outputs)]
    return make_graph([node], *types)


def make_node(name: str, shape: Shape, outputs: list[str], layer: str = "") -> NodeProto:
    """The node of a contender; where there are several, `layer` is what its states' names end with."""
    heads, kv_heads, size = shape
    attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": size**-0.5}
    domain, operator = {
        **dict.fromkeys(STRENGTHS, (schema.DOMAIN, schema.CALIBRATED)),
        "plain": (schema.DOMAIN, schema.PLAIN),
        "gqa": ("com.microsoft", "GroupQueryAttention"),
        "attention23": ("", "Attention"),
    }[name]
    if operator == schema.CALIBRATED:
        attributes["calibrated_heads"] = calibrated_heads(name, heads)
    elif name == "attention23":
        attributes["q_num_heads"] = attributes.pop("num_heads")
        attributes["is_causal"] = 1
    states = "past_key past_value past_sink_scores" if operator == schema.CALIBRATED else "past_key past_value"
    masks = {"gqa": "seqlens_k total_sequence_length", "attention23": ""}.get(name, "attention_mask")
    order = ["query", "key", "value"]
    order += [""] if name == "attention23" else []  # no attn_mask
    order += [state + layer for state in states.split()]
    order += masks.split()
    order += ["calibration"] if operator == schema.CALIBRATED else []
    return helper.make_node(operator, order, outputs, domain=domain, **attributes)


def calibrated_heads(name: str, heads: int) -> list[int]:
    """The calibrated heads of a contender."""
    return list(range(0, heads, 4 if name == QUARTER else 1))


def strengths(name: str, heads: int) -> Array:
    """The calibration of a contender's heads, (1, calibrated heads, 3)."""
    return np.tile(np.array(STRENGTHS[name], np.float32), (1, len(calibrated_heads(name, heads)), 1))


def make_graph(nodes: list[NodeProto], inputs: Types, outputs: Types) -> bytes:
    """Nodes between graph inputs and outputs of these names and types, of any shape."""

    def describe(types: Types) -> list[Any]:
        return [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(kind), None) for n, kind in types.items()
        ]

    graph = helper.make_graph(nodes, "attention", describe(inputs), describe(outputs))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    opsets.append(helper.make_opsetid("com.microsoft", 1))
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return model


def share_threads(threads: int) -> None:
    """One thread pool for all sessions of this process, to be made before any of them."""
    onnxruntime.set_global_thread_pool_sizes(threads, 1)


def count_later_sinks(present_sink_scores: Array, total: int) -> list[int]:
    """Of each calibrated head after one call, sequence by sequence, from column sums (batch, heads, capacity, 1)."""
    import torch

    from act_export.calibration.reference import later_sinks

    sums = torch.from_numpy(present_sink_scores[:, :, :total, 0])
    found = later_sinks(sums, torch.ones(total, dtype=torch.bool), threshold=THRESHOLD)
    counts: list[int] = found.sum(-1).flatten().tolist()
    return counts


def reference_output(workload: Workload, data: Data, name: str = "calibrated") -> Array:
    """The output of a contender in `STRENGTHS` by act_export.calibration.reference."""
    import torch

    from act_export.calibration.reference_operator import calibrated_attention

    heads, kv_heads, size = workload.shape
    query, key, value, past_key, past_value, past_sink_scores = map(torch.from_numpy, data)
    outputs = calibrated_attention(
        query,
        key,
        value,
        past_key,
        past_value,
        past_sink_scores,
        torch.ones(workload.batch, workload.total, dtype=torch.int64),
        torch.from_numpy(strengths(name, heads)),
        num_heads=heads,
        kv_num_heads=kv_heads,
        scale=size**-0.5,
        calibrated_heads=calibrated_heads(name, heads),
    )
    output: Array = outputs.output.numpy()
    return output


def check_agreement(workload: Workload, data: Data, outputs: dict[str, Array]) -> dict[str, float]:
    """Largest absolute differences between outputs that should be equal, by the pair's name.

    Plain is compared with ONNX Runtime's operators and with idle; calibrated and gamma with the reference, up to
    `LARGEST_REFERENCE` tokens.

    Raises:
        DisagreementError: A difference is more than rounding.
    """
    pairs = [("plain", name) for name in ("idle", "gqa", "attention23") if {"plain", name} <= outputs.keys()]
    if workload.length <= LARGEST_REFERENCE:
        known = [name for name in ("calibrated", "gamma") if name in outputs]
        pairs += [(name, f"reference of {name}") for name in known]
        outputs = outputs | {f"reference of {name}": reference_output(workload, data, name) for name in known}
    differences = {}
    tolerance = TOLERANCES[workload.dtype]
    for one, other in pairs:
        difference = float(np.abs(outputs[one].astype(np.float32) - outputs[other].astype(np.float32)).max())
        differences[f"{one} - {other}"] = difference
        if not difference <= tolerance:
            raise DisagreementError(
                f"{workload}: outputs of {one} and {other} differ by {difference:.2g}, more than {tolerance:g}"
            )
    return differences
