"""The GPU half of bench_attention.py: everything is in the GPU's memory, and past and present are
the same.

Contenders: calibrated (every head), quarter (every fourth), plain, and gqa in half types: GroupQueryAttention has no
float32 kernel for GPUs. They share queries, keys, values and caches, into which all write the same token, and have
column sums and outputs of their own. A prompt is one node. Decode is as many nodes with a cache each as it takes for
the caches to exceed `LEAST_CACHE_BYTES`, as in the layers of a model: a smaller cache would stay in the GPU's own cache
and be read faster than a model can.

They take turns as on the CPU. A turn is many runs one after the other, between two synchronizations: ONNX Runtime is
told not to wait for the GPU after each run. Where the host takes nearly all that time to launch, the GPU may be faster:
such times are marked. With a CUDA graph the launches are replayed; ONNX Runtime then waits after each run.

All sequences of a batch have the same content, each in its own memory.
"""

from __future__ import annotations

import gc
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
import onnxruntime
from attention_contenders import (
    QUARTER,
    TOLERANCES,
    DisagreementError,
    calibrated_heads,
    count_later_sinks,
    make_graph,
    make_node,
    strengths,
)
from attention_workloads import Data, Workload, make_data
from on_device import Array, DeviceTensor, make_session

from act_export.runtime.device import Device

CONTENDERS = ("calibrated", QUARTER, "plain", "gqa")
SUBJECTS, OTHERS = ("calibrated", QUARTER), ("plain", "gqa")  # each of the former is compared with each of the latter
FOREIGN = ("gqa",)  # where one of these fails, the others are measured
LENGTHS = {"prompt": (2048, 4096, 8192, 16384), "decode": (4096, 32768)}
BATCHES = {"prompt": (1,), "decode": (1, 32)}
SHAPE = "32x8x128"
LEAST_CACHE_BYTES = 2**28  # of all nodes: several times what a GPU's own cache holds
MOST_NODES = 32
SHORTEST_TURN_S = 0.05
LAUNCHING_SHARE = 0.9  # of a turn, in which the host launches: the GPU may have waited for it
OUT_OF_MEMORY = re.compile(r"(failed to allocate|out of memory|available memory).*", re.IGNORECASE)

Result = dict[str, Any]


class Inputs:
    """What the contenders share, on the GPU.

    Attributes:
        workload: Of which it is the data.
        nodes: Number of caches, one for each node of a contender.
        tensors: By the names of the nodes' inputs.
        sink_scores: Column sums of all heads, (batch, heads, capacity, 1).
        on_host: Names of what ONNX Runtime wants in the host's memory.
    """

    on_host = ("total_sequence_length",)

    def __init__(self, workload: Workload, device: Device) -> None:
        """Copies the data to the GPU."""
        self.workload = workload
        self.nodes = count_nodes(workload)
        one = Workload(workload.shape, workload.work, workload.length, 1, workload.dtype)
        data = make_data(one)
        batch = workload.batch

        def repeat(array: Array) -> Array:
            return np.broadcast_to(array, (batch, *array.shape[1:]))

        arrays = {name: repeat(getattr(data, name)) for name in ("query", "key", "value")}
        arrays["attention_mask"] = np.ones((batch, workload.total), np.int64)
        arrays["seqlens_k"] = np.full(batch, workload.total - 1, np.int32)
        self.tensors = {name: DeviceTensor(array, device) for name, array in arrays.items()}
        length = DeviceTensor(np.array([workload.total], np.int32), Device())
        self.tensors["total_sequence_length"] = length
        for name in ("past_key", "past_value"):
            cache = repeat(preallocated(getattr(data, name), workload.capacity))
            self.tensors |= {f"{name}.{node}": DeviceTensor(cache, device) for node in range(self.nodes)}
        self.sink_scores = self._sink_scores(data)

    def _sink_scores(self, data: Data) -> Array:
        return preallocated(data.past_sink_scores, self.workload.capacity)


def count_nodes(workload: Workload) -> int:
    """Nodes of a contender, each with a cache of its own."""
    if workload.work == "prompt":
        return 1
    return min(max(math.ceil(LEAST_CACHE_BYTES / workload.cache_bytes), 1), MOST_NODES)


def preallocated(past: Array, capacity: int) -> Array:
    """A state (batch, heads, past, size) with room for `capacity` positions."""
    buffer = np.zeros((*past.shape[:2], capacity, past.shape[3]), past.dtype)
    buffer[:, :, : past.shape[2]] = past
    return buffer


class GpuContender:
    """One session of as many equal nodes as there are caches, bound to what all share and to what is its own."""

    def __init__(self, name: str, inputs: Inputs, library: Path, device: Device, *, cuda_graph: bool) -> None:
        """Makes the session and its own outputs."""
        self.name = name
        self.nodes = inputs.nodes
        workload = inputs.workload
        shape = workload.shape
        width = shape.num_heads * shape.head_size
        self.output = DeviceTensor(np.zeros((workload.batch, workload.sequence, width), self._dtype(inputs)), device)
        self._sink_scores: list[DeviceTensor] = []
        self._calibration: dict[str, DeviceTensor] = {}
        self._first_sink_scores: Array | None = None
        if name in SUBJECTS:
            own = inputs.sink_scores[:, calibrated_heads(name, shape.num_heads)]
            self._first_sink_scores = np.ascontiguousarray(np.broadcast_to(own, (workload.batch, *own.shape[1:])))
            self._sink_scores = [DeviceTensor(self._first_sink_scores, device) for _ in range(self.nodes)]
            self._calibration = {"calibration": DeviceTensor(strengths(name, shape.num_heads), device)}
        bound_inputs, bound_outputs, nodes = self._nodes(inputs)
        types = [{n: t.dtype for n, t in tensors.items()} for tensors in (bound_inputs, bound_outputs)]
        self._session = make_session(make_graph(nodes, *types), library, device, cuda_graph=cuda_graph)
        self._binding = self._session.io_binding()
        for tensor_name, tensor in bound_inputs.items():
            tensor.bind_input(self._binding, tensor_name)
        for tensor_name, tensor in bound_outputs.items():
            tensor.bind_output(self._binding, tensor_name)
        self._options = onnxruntime.RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    @staticmethod
    def _dtype(inputs: Inputs) -> Any:
        return inputs.tensors["query"].dtype

    def _nodes(self, inputs: Inputs) -> tuple[dict[str, DeviceTensor], dict[str, DeviceTensor], list[Any]]:
        """Inputs and outputs of the graph by name, and its nodes; all nodes write their output to the same memory."""
        bound_inputs: dict[str, DeviceTensor] = {}
        bound_outputs: dict[str, DeviceTensor] = {}
        nodes = []
        for number in range(self.nodes):
            layer = f".{number}"
            states = {f"past_{kind}": inputs.tensors[f"past_{kind}{layer}"] for kind in ("key", "value")}
            if self._sink_scores:
                states["past_sink_scores"] = self._sink_scores[number]
            outputs = {f"output{layer}": self.output}
            outputs |= {state.replace("past", "present") + layer: tensor for state, tensor in states.items()}
            node = make_node(self.name, inputs.workload.shape, list(outputs), layer)
            own = {state + layer: tensor for state, tensor in states.items()} | self._calibration
            bound_inputs |= {name: own[name] if name in own else inputs.tensors[name] for name in node.input}
            bound_outputs |= outputs
            nodes.append(node)
        return bound_inputs, bound_outputs, nodes

    def run(self) -> None:
        """Starts one run of all nodes; the GPU may still be at it afterwards."""
        self._session.run_with_iobinding(self._binding, self._options)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        self._binding.synchronize_outputs()

    def restore(self) -> None:
        """Takes back what the runs so far added to the column sums; the work of a few thousand runs is the same."""
        if self._first_sink_scores is not None:
            for tensor in self._sink_scores:
                tensor.write(self._first_sink_scores)

    def sink_scores(self) -> Array:
        """Column sums of the first node."""
        return self._sink_scores[0].read()


def bench_on_gpu(workload: Workload, library: Path, device: Device, rounds: int, *, cuda_graph: bool) -> Result:
    """Checks and times one workload; `{"skipped": reason}` beside its name where the GPU's memory doesn't hold it.

    Raises:
        DisagreementError: Two contenders that compute the same differ by more than rounding.
    """
    described = {
        "shape": str(workload.shape),
        "work": workload.work,
        "length": workload.length,
        "batch": workload.batch,
    }
    try:
        return described | _bench(workload, library, device, rounds, cuda_graph=cuda_graph)
    except DisagreementError:
        raise
    except Exception as error:  # ONNX Runtime's errors have no common base
        found = OUT_OF_MEMORY.search(str(error))
        if found is None:
            raise
        reason = f"the GPU's memory doesn't hold it: {found[0]}"
    gc.collect()
    print(f"{workload}, batch {workload.batch}: skipped, {reason}", file=sys.stderr, flush=True)
    return described | {"skipped": reason}


def _bench(workload: Workload, library: Path, device: Device, rounds: int, *, cuda_graph: bool) -> Result:
    inputs = Inputs(workload, device)
    names = [name for name in CONTENDERS if name != "gqa" or workload.dtype != "float32"]
    contenders, failures = [], {}
    for name in names:
        try:
            contender = GpuContender(name, inputs, library, device, cuda_graph=cuda_graph)
            contender.run()
            contender.synchronize()
        except Exception as error:  # ONNX Runtime's errors have no common base
            if name not in FOREIGN or OUT_OF_MEMORY.search(str(error)):
                raise
            failures[name] = str(error).splitlines()[0]
            print(f"{workload}: {name} fails and is left out: {failures[name]}", file=sys.stderr, flush=True)
        else:
            contenders.append(contender)
    later_sinks = count_later_sinks(contenders[0].sink_scores(), workload.total)
    differences = check_outputs(workload, {c.name: c.output.read() for c in contenders})
    turns = take_turns(contenders, rounds)
    medians = {name: median(turn["seconds"] for turn in of_one) for name, of_one in turns.items()}
    others = [name for name in OTHERS if name in medians]
    return {
        "nodes": inputs.nodes,
        "failures": failures,
        "later_sinks_per_head": sum(later_sinks) / len(later_sinks),
        "differences": differences,
        "flops": workload.flops,
        "cache_bytes": workload.cache_bytes,
        "ms": {name: seconds * 1e3 for name, seconds in medians.items()},
        "launching_share": {name: median(t["launching_share"] for t in of_one) for name, of_one in turns.items()},
        "runs_of_a_turn": {name: of_one[0]["runs"] for name, of_one in turns.items()},
        "rounds_ms": {name: [turn["seconds"] * 1e3 for turn in of_one] for name, of_one in turns.items()},
        "ratios": {f"{one} / {other}": medians[one] / medians[other] for one in SUBJECTS for other in others},
    }


def take_turns(contenders: list[GpuContender], rounds: int) -> dict[str, list[Result]]:
    """The turns of each contender; finding how many runs one takes has warmed the GPU up."""
    runs = {contender.name: find_runs(contender) for contender in contenders}
    turns: dict[str, list[Result]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            turns[contender.name].append(time_turn(contender, runs[contender.name]))
    return turns


def find_runs(contender: GpuContender) -> int:
    """As many runs as a turn takes."""
    runs = 1
    while (turn_s := time_turn(contender, runs)["turn_s"]) < SHORTEST_TURN_S:
        runs = max(runs + 1, math.ceil(runs * min(SHORTEST_TURN_S / turn_s, 16)))
    return runs


def time_turn(contender: GpuContender, runs: int, clock: Callable[[], float] = time.perf_counter) -> Result:
    """Seconds of one node, the mean of so many runs, and the share of the time in which the host launched them."""
    contender.restore()
    contender.run()
    contender.synchronize()
    began = clock()
    for _ in range(runs):
        contender.run()
    launched = clock()
    contender.synchronize()
    turn_s = clock() - began
    return {
        "runs": runs,
        "turn_s": turn_s,
        "seconds": turn_s / runs / contender.nodes,
        "launching_share": (launched - began) / turn_s,
    }


def check_outputs(workload: Workload, outputs: dict[str, Array]) -> dict[str, float]:
    """Largest differences between heads that should be equal, by the pair's name.

    Calibrated heads of `quarter` are those of `calibrated`; its other heads, and all of gqa, are those of `plain`.

    Raises:
        DisagreementError: A difference is more than rounding.
    """
    shape = workload.shape
    heads = {
        name: output.astype(np.float32).reshape(-1, shape.num_heads, shape.head_size)
        for name, output in outputs.items()
    }
    quarter = calibrated_heads(QUARTER, shape.num_heads)
    rest = [head for head in range(shape.num_heads) if head not in quarter]
    pairs = [(QUARTER, "calibrated", quarter), (QUARTER, "plain", rest)]
    if "gqa" in outputs:
        pairs.append(("plain", "gqa", list(range(shape.num_heads))))
    differences = {}
    tolerance = TOLERANCES[workload.dtype]
    for one, other, compared in pairs:
        if not compared:
            continue
        difference = float(np.abs(heads[one][:, compared] - heads[other][:, compared]).max())
        differences[f"{one} - {other}"] = difference
        if not difference <= tolerance:
            raise DisagreementError(
                f"{workload}: outputs of {one} and {other} differ by {difference:.2g}, more than {tolerance:g}"
            )
    return differences


def summarize(results: list[Result]) -> Result:
    """Geometric mean and worst of each pair's ratios, for each kind of work."""
    summary: Result = {}
    for result in results:
        for pair, ratio in result.get("ratios", {}).items():
            summary.setdefault(result["work"], {}).setdefault(pair, []).append(ratio)
    return {
        work: {pair: {"geometric_mean": geometric_mean(r), "worst": max(r)} for pair, r in pairs.items()}
        for work, pairs in summary.items()
    }
