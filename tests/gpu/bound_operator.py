"""The attention operator in ONNX Runtime, with tensors bound by address: caches in place, and CUDA graphs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import torch
from attention_cases import CACHE_ROOM, Case, Inputs, Result
from on_device import Array, DeviceTensor, make_session
from onnx import helper
from torch import Tensor

from act_export.ops import schema
from act_export.ops.library import library_path
from act_export.runtime.device import Device

COPIED, SHARED, REBUFFERED = LAYOUTS = ("copied", "shared", "rebuffered")
STATE = ("past_key", "past_value", "past_sink_scores")


class BoundOperator:
    """A session of one node and the memory that it works on."""

    def __init__(
        self, case: Case, inputs: Inputs, device: Device, layout: str | None = None, *, graph: bool = False
    ) -> None:
        """Copies a call's inputs to the device.

        Args:
            case: The node's attributes and type.
            inputs: Of the first call.
            device: Where it runs.
            layout: "copied": the past has its exact length, and the present other memory; "shared": past and present
                are one buffer, longer than needed; "rebuffered": two buffers, both longer. None: as the case says.
            graph: The first run is captured into a CUDA graph, after others that add to a state in place, too.
        """
        self._layout = layout or (SHARED if case.in_place else COPIED)
        self._total = case.past + case.sequence
        self._session = make_session(make_model(case), library_path(), device, cuda_graph=graph)
        arrays = self._arrays(inputs)
        self._tensors = {name: DeviceTensor(array, device) for name, array in arrays.items()}
        width = case.num_heads * case.value_size
        output = np.full((case.batch, case.sequence, width), 7, arrays["query"].dtype)
        self._outputs = {"output": DeviceTensor(output, device)}
        self._binding = self._session.io_binding()
        for node_input in self._session.get_inputs():
            name = node_input.name
            self._tensors[name].bind_input(self._binding, name)
            if name in STATE:
                past = self._tensors[name]
                length = self._total if self._layout == COPIED else past.shape[2]
                other = np.full((*past.shape[:2], length, past.shape[3]), 7, past.dtype)
                present = past if self._layout == SHARED else DeviceTensor(other, device)
                self._outputs[name.replace("past", "present")] = present
        for name, tensor in self._outputs.items():
            tensor.bind_output(self._binding, name)

    def write(self, inputs: Inputs) -> None:
        """Other numbers of the same shapes, into the same memory."""
        for name, array in self._arrays(inputs).items():
            self._tensors[name].write(array)

    def run(self) -> Result:
        """One call; what the caches hold beyond its tokens has to be what the past held there."""
        self._session.run_with_iobinding(self._binding)
        found = {name: tensor_of(tensor.read()) for name, tensor in self._outputs.items()}
        for name in ("present_key", "present_value"):
            assert found[name][:, :, self._total :].isnan().all(), f"{name} is written to beyond the call's tokens"
        sums = found.get("present_sink_scores", torch.zeros(0, 0, 0, 1))
        keys, values, sums = (x[:, :, : self._total] for x in (found["present_key"], found["present_value"], sums))
        return Result(found["output"], keys, values, sums)

    def _arrays(self, inputs: Inputs) -> dict[str, Array]:
        arrays = {name: array_of(tensor) for name, tensor in vars(inputs).items()}
        if self._layout != COPIED:
            for name in STATE:
                past = arrays[name]
                buffer = np.full((*past.shape[:2], self._total + CACHE_ROOM, past.shape[3]), np.nan, past.dtype)
                buffer[:, :, : past.shape[2]] = past
                arrays[name] = buffer
        return arrays


def array_of(tensor: Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.contiguous().numpy()


def tensor_of(array: Array) -> Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def make_model(case: Case) -> bytes:
    """The one node; shapes are those of what is bound."""
    operator = schema.CALIBRATED if case.calibrated_heads else schema.PLAIN
    described = schema.schema(operator)
    kinds = {"T": case.storage, "F": "float32", "M": "int64"}
    names = schema.attribute_names(operator)
    attributes = {name: value for name, value in case.attributes.items() if name in names and value != ()}

    def values(parameters: Any) -> list[Any]:
        types = {p.name: np.dtype(kinds[p.type_str]) for p in parameters}
        return [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), None)
            for name, dtype in types.items()
        ]

    inputs, outputs = values(described.inputs), values(described.outputs)
    node = helper.make_node(
        operator, [x.name for x in inputs], [x.name for x in outputs], domain=schema.DOMAIN, **attributes
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    graph = helper.make_graph([node], "case", inputs, outputs)
    return helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
