"""Times of the kernels without ONNX Runtime: each alone, and calls in CUDA graphs, beside PyTorch's fused attention.

With an argument only of the work that it names, "prompt" or "decode".
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from attention_cases import Case, Inputs
from attention_workloads import Data, Shape, Workload, make_data
from harness_calls import Harness, PlacedCall
from harness_steps import HARNESS
from plan import write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

SHAPE = Shape(32, 8, 128)
WORKLOADS = (
    *(Workload(SHAPE, "prompt", length, 1, "bfloat16") for length in (2048, 4096, 8192, 16384)),
    *(Workload(SHAPE, "decode", length, batch, "bfloat16") for length in (4096, 32768) for batch in (1, 32)),
)
HEADS = {"plain": (), "quarter": tuple(range(0, 32, 4)), "all": tuple(range(32))}
FOREIGN = {"Flash-2": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
SCRATCH_BYTES = 4 << 30
ROUNDS, SHORTEST_TURN_S = 7, 0.02

Found = dict[str, Any]


class OnDevice:
    """A tensor in the memory that PyTorch has of the GPU."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.cuda()
        self.address = self.tensor.data_ptr()

    def read(self) -> Tensor:
        """What is there now."""
        return self.tensor.cpu()


class Node:
    """Calls of one node, in memory of their own."""

    def __init__(self, harness: Harness, workload: Workload, data: Data, heads: tuple[int, ...]) -> None:
        case = Case(
            batch=workload.batch,
            sequence=workload.sequence,
            past=workload.past,
            num_heads=workload.shape.num_heads,
            kv_num_heads=workload.shape.kv_num_heads,
            head_size=workload.shape.head_size,
            storage="bfloat16",
            calibrated_heads=heads,
            threshold=0.1,
            in_place=workload.past > 0,
        )
        *tensors, sums = (
            torch.from_numpy(array.astype("float32")).expand(workload.batch, *array.shape[1:]) for array in data
        )
        mask = torch.ones(workload.batch, workload.total, dtype=torch.int64)
        new = (tensor.bfloat16() for tensor in tensors)
        placed: list[OnDevice] = []

        def place(tensor: Tensor) -> OnDevice:
            placed.append(OnDevice(tensor))
            return placed[-1]

        self._call = PlacedCall(case, Inputs(*new, sums[:, list(heads)], mask, case.calibration), place)
        self._sums = placed[2].tensor  # after keys and values of the past
        self._sums_before = self._sums.clone()
        self._harness = harness
        self._node = harness.create("bfloat16", self._call.arguments)

    def restore(self) -> None:
        """Takes back what the calls so far added to the column sums, which would make more and more sinks."""
        self._sums.copy_(self._sums_before)

    def run(self, scratch: Tensor) -> None:
        """One call in PyTorch's current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        self._harness.run(self._node, self._call.arguments, stream, scratch.data_ptr(), scratch.numel())


def in_graph(run: Callable[[], object]) -> Callable[[], object]:
    """The same as a replay of a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def turn(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a call, the mean of so many."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / repeats


def kernels_of(run: Callable[[], object]) -> dict[str, float]:
    """Microseconds of each kernel of a call, by its name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    return {event.key: event.device_time for event in profiler.key_averages() if event.device_time}


def foreign(workload: Workload, data: Data, backend: SDPBackend) -> Callable[[], object]:
    """PyTorch's attention on the same numbers, without a cache to extend."""
    shape, batch = workload.shape, workload.batch

    def heads(tensor: Tensor, count: int) -> Tensor:
        return tensor.view(tensor.shape[0], -1, count, shape.head_size).transpose(1, 2)

    tensors = [torch.from_numpy(array.astype("float32")) for array in data[:5]]
    query = heads(tensors[0], shape.num_heads)
    key, value = (
        torch.cat([past, heads(new, shape.kv_num_heads)], 2)
        for past, new in zip(tensors[3:], tensors[1:3], strict=True)
    )
    query, key, value = (x.expand(batch, *x.shape[1:]).bfloat16().cuda() for x in (query, key, value))

    def run() -> object:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=workload.past == 0, enable_gqa=True)

    return run


def measure(harness: Harness, workload: Workload, scratch: Tensor) -> Found:
    """Medians of rounds that all take turns in, in seconds; each kernel's time; and why a foreign one can't."""
    one = make_data(Workload(workload.shape, workload.work, workload.length, 1, workload.dtype))
    nodes = {name: Node(harness, workload, one, heads) for name, heads in HEADS.items()}
    runs: dict[str, Callable[[], object]] = {}
    found: Found = {"kernels, us": {}, "failures": {}}
    for name, node in nodes.items():
        found["kernels, us"][name] = kernels_of(lambda node=node: node.run(scratch))  # type: ignore[misc]
        runs[name] = in_graph(lambda node=node: node.run(scratch))  # type: ignore[misc]
    for name, backend in FOREIGN.items():
        try:
            runs[name] = in_graph(foreign(workload, one, backend))
        except RuntimeError as error:
            found["failures"][name] = str(error)[:300]
    repeats = {name: max(1, int(SHORTEST_TURN_S / turn(run, 2))) for name, run in runs.items()}
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        for node in nodes.values():
            node.restore()
        rounds.append({name: turn(run, repeats[name]) for name, run in runs.items()})
    found["seconds"] = {name: median(one[name] for one in rounds) for name in runs}
    return found


def main(works: Sequence[str]) -> int:
    """Writes what is found after each workload."""
    harness = Harness(Path(os.environ[HARNESS]))
    scratch = torch.empty(SCRATCH_BYTES, dtype=torch.uint8, device="cuda")
    found: Found = {}
    for workload in WORKLOADS:
        if works and workload.work not in works:
            continue
        found[f"{workload}, batch {workload.batch}"] = measure(harness, workload, scratch)
        write_result(found)
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
