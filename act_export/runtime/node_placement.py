"""Which execution provider runs each node of a session, as ONNX Runtime's own profile of one run tells it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from act_export.ops.library import loaded_kernels
from act_export.runtime.device import CPU_PROVIDER, CUDA_PROVIDER, import_onnxruntime
from act_export.staging import scratch_folder

ATTENTION_OPERATORS = ("Attention", "CalibratedAttention", "GroupQueryAttention", "MultiHeadAttention")
_COPIES = ("MemcpyFromHost", "MemcpyToHost")
_END_OF_NAME = "_kernel_time"


@dataclass(frozen=True)
class NodePlacement:
    """Where the nodes of a graph run, after ONNX Runtime has optimized it.

    Attributes:
        device: "cpu" or "cuda:N", that the session was asked to run on.
        attention: Provider of each attention node, by the node's name; empty where attention is standard operators.
        operators: By provider, number of nodes of each operator; copies between host and device not among them.
        copies: Number of Memcpy nodes, each of which moves a tensor between host and device in every run.
        kernels: Of the native library on a GPU: how many run as which machine code, or as PTX and why.
    """

    device: str
    attention: Mapping[str, str]
    operators: Mapping[str, Mapping[str, int]]
    copies: int
    kernels: str = ""

    @property
    def on_cpu(self) -> Mapping[str, int]:
        """The operators that run on the CPU, with their numbers."""
        return self.operators.get(CPU_PROVIDER, {})

    @property
    def attention_on_device(self) -> bool:
        """Whether every attention node runs where it was asked to."""
        wanted = CPU_PROVIDER if self.device == "cpu" else CUDA_PROVIDER
        return all(provider == wanted for provider in self.attention.values())

    def describe(self) -> str:
        """In one line."""
        nodes = {provider: sum(counts.values()) for provider, counts in self.operators.items()}
        by_provider = Counter(self.attention.values())
        attention = ", ".join(f"{count} of {len(self.attention)} on {_short(p)}" for p, count in by_provider.items())
        parts = [f"attention nodes: {attention}" if attention else "attention by standard operators"]
        parts.append("nodes: " + ", ".join(f"{count} on {_short(provider)}" for provider, count in nodes.items()))
        if self.device != "cpu":
            names = ", ".join(f"{count} {name}" for name, count in sorted(self.on_cpu.items()))
            parts.append(f"on the CPU: {names or 'none'}")
            parts.append(f"Memcpy nodes: {self.copies}")
        if self.kernels:
            parts.append(f"attention kernels: {self.kernels}")
        return "; ".join(parts)


def profile_run(
    load: Callable[[Any], Any], run: Callable[[Any], None], device: str, *, shared_threads: bool = False
) -> NodePlacement:
    """Loads and runs a model once under ONNX Runtime's profiler.

    Args:
        load: Makes an `onnxruntime.InferenceSession` with the session options that it is given.
        run: Runs it.
        device: "cpu" or "cuda:N".
        shared_threads: As of `act_export.runtime.Session.open`.
    """
    with scratch_folder() as folder:
        options = import_onnxruntime().SessionOptions()
        options.enable_profiling = True
        options.use_per_session_threads = not shared_threads
        options.profile_file_prefix = str(folder / "profile")
        inner = load(options)
        try:
            run(inner)
        finally:
            profile = Path(inner.end_profiling())
        placement = read_profile(profile.read_text(encoding="utf-8"), device)
    return placement if device == "cpu" else replace(placement, kernels=loaded_kernels().describe())


def read_profile(text: str, device: str) -> NodePlacement:
    """Reads the JSON that ONNX Runtime's profiler writes."""
    nodes: dict[str, tuple[str, str]] = {}
    for event in json.loads(text):  # which ONNX Runtime just wrote
        arguments = event.get("args", {})
        if event.get("cat") == "Node" and event["name"].endswith(_END_OF_NAME) and "provider" in arguments:
            nodes[event["name"].removesuffix(_END_OF_NAME)] = (arguments["op_name"], arguments["provider"])
    operators: dict[str, Counter[str]] = {}
    for operator, provider in nodes.values():
        if operator not in _COPIES:
            operators.setdefault(provider, Counter())[operator] += 1
    return NodePlacement(
        device=device,
        attention={name: provider for name, (operator, provider) in nodes.items() if operator in ATTENTION_OPERATORS},
        operators={provider: dict(counts) for provider, counts in operators.items()},
        copies=sum(operator in _COPIES for operator, _ in nodes.values()),
    )


def _short(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider")
