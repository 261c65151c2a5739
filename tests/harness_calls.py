"""Calls of the CUDA operator's launches without ONNX Runtime: what `ops/csrc/cuda/cuda_harness.cc` takes.

For the stand-in for a driver, whose device memory is the host's, and for a GPU: `place` puts a tensor there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from attention_cases import CACHE_ROOM, Case, Inputs, Result
from torch import Tensor

ELEMENT_TYPES = {"float32": 1, "float16": 10, "bfloat16": 16}
ERROR_SIZE = 1024


class AttentionCall(ctypes.Structure):
    """Arguments of one call, as in csrc/cuda/cuda_harness.cc: tensors are addresses of device memory."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("batch", "sequence", "total", "past_capacity", "present_capacity")),
        *((name, ctypes.c_int64) for name in ("num_heads", "kv_num_heads", "head_size", "value_head_size")),
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "past_key", "past_value", "past_sink_scores")),
        *((name, ctypes.c_void_p) for name in ("attention_mask", "calibration", "output")),
        *((name, ctypes.c_void_p) for name in ("present_key", "present_value", "present_sink_scores")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("sliding_window", "calibrations", "calibrated_count")),
        ("calibrated_heads", ctypes.c_void_p),
        ("sink_logits", ctypes.c_void_p),
        ("relative_threshold", ctypes.c_int32),
    )


class Placed(Protocol):
    """A tensor in device memory."""

    address: int

    def read(self) -> Tensor:
        """What is there now."""


Place = Callable[[Tensor], Placed]


class Harness:
    """The functions of csrc/cuda/cuda_harness.cc."""

    def __init__(self, library: Path) -> None:
        """Loads it; the driver is looked for when the first kernel is."""
        self._library = ctypes.CDLL(str(library))

    def call(self, function: str, *arguments: Any) -> None:
        """Calls a function.

        Raises:
            RuntimeError: It throws; with its message.
        """
        error = ctypes.create_string_buffer(ERROR_SIZE)
        if getattr(self._library, function)(*arguments, error):
            raise RuntimeError(error.value.decode())

    def attention(self, storage: str, call: AttentionCall, device: int = 0, stream: int | None = None) -> None:
        """One call of the operator's kernels; `storage` is "float32", "float16" or "bfloat16"."""
        self.call("ActCudaAttention", device, ELEMENT_TYPES[storage], ctypes.c_void_p(stream), ctypes.byref(call))

    def find(self, kernel: str, device: int = 0) -> str:
        """Loads a kernel, and tells the target of its image.

        Raises:
            RuntimeError: There is none that the device takes.
        """
        target = ctypes.create_string_buffer(16)
        self.call("ActCudaFind", device, kernel.encode(), target)
        return target.value.decode()

    def loaded(self) -> list[str]:
        """Names of the kernels that were loaded so far."""
        names = ctypes.create_string_buffer(ERROR_SIZE)
        self._library.ActCudaLoaded(names)
        return names.value.decode().split()

    def refused(self) -> str:
        """Why the driver took no better image of some kernel; empty where it took the best of each."""
        reason = ctypes.create_string_buffer(ERROR_SIZE)
        self._library.ActCudaRefused(reason)
        return reason.value.decode()

    def create(self, storage: str, call: AttentionCall, device: int = 0) -> ctypes.c_void_p:
        """A node of a call's heads and sink logits, for `run`."""
        node = ctypes.c_void_p()
        self.call("ActCudaCreate", device, ELEMENT_TYPES[storage], ctypes.byref(call), ctypes.byref(node))
        return node

    def run(self, node: ctypes.c_void_p, call: AttentionCall, stream: int | None, scratch: int, size: int) -> None:
        """A call of a node with `size` bytes of memory at `scratch`; nothing is allocated, and nothing waited for.

        Raises:
            RuntimeError: They are too few, or a launch fails.
        """
        where = (ctypes.c_void_p(stream), ctypes.c_void_p(scratch), ctypes.c_int64(size))
        self.call("ActCudaRun", node, ctypes.byref(call), *where)

    def destroy(self, node: ctypes.c_void_p) -> None:
        """Frees a node."""
        self._library.ActCudaDestroy(node)


class PlacedCall:
    """A case's call with all its tensors in device memory; outputs begin as NaN."""

    def __init__(self, case: Case, inputs: Inputs, place: Place) -> None:
        """Places them."""
        self.total = case.past + case.sequence
        past = [inputs.past_key, inputs.past_value, inputs.past_sink_scores]
        if case.in_place:
            room = self.total + CACHE_ROOM - case.past
            past = [torch.cat([x, x.new_full((*x.shape[:2], room, x.shape[3]), torch.nan)], 2) for x in past]
        self._past = [place(x) for x in past]
        self._present = self._past
        if not case.in_place:
            self._present = [place(x.new_full((*x.shape[:2], self.total, x.shape[3]), torch.nan)) for x in past]
        width = case.num_heads * case.value_size
        self._output = place(inputs.query.new_full((case.batch, case.sequence, width), torch.nan))
        self._others = [
            place(x) for x in (inputs.query, inputs.key, inputs.value, inputs.attention_mask, inputs.calibration)
        ]
        self._heads = (ctypes.c_int32 * len(case.calibrated_heads))(*case.calibrated_heads)
        self._sinks = (ctypes.c_float * len(case.sink_logits))(*case.sink_logits)
        query, key, value, mask, calibration = (placed.address for placed in self._others)
        past_key, past_value, past_sums = (placed.address for placed in self._past)
        present_key, present_value, present_sums = (placed.address for placed in self._present)
        capacity = self.total + (CACHE_ROOM if case.in_place else 0)
        self.arguments = AttentionCall(
            batch=case.batch,
            sequence=case.sequence,
            total=self.total,
            past_capacity=capacity if case.in_place else case.past,
            present_capacity=capacity,
            num_heads=case.num_heads,
            kv_num_heads=case.kv_num_heads,
            head_size=case.head_size,
            value_head_size=case.value_size,
            query=query,
            key=key,
            value=value,
            past_key=past_key,
            past_value=past_value,
            past_sink_scores=past_sums,
            attention_mask=mask,
            calibration=calibration,
            output=self._output.address,
            present_key=present_key,
            present_value=present_value,
            present_sink_scores=present_sums,
            scale=case.attributes["scale"],
            softcap=case.softcap,
            sliding_window=case.sliding_window,
            calibrations=len(inputs.calibration),
            calibrated_count=len(case.calibrated_heads),
            calibrated_heads=ctypes.addressof(self._heads),
            sink_logits=ctypes.addressof(self._sinks) if case.sink_logits else None,
            relative_threshold=case.threshold_mode == "relative",
        )

    def result(self) -> Result:
        """What the call wrote; nothing may be beyond its tokens."""
        present = [placed.read() for placed in self._present]
        assert all(x[:, :, self.total :].isnan().all() for x in present), "written to beyond the call's tokens"
        return Result(self._output.read(), *(x[:, :, : self.total] for x in present))
