#!/usr/bin/env python3
"""Time and peak memory of an export, against torch's own export of the same unmodified model.

    tools/bench/measure_export.py [--model MODEL] [--repeats N] [--json FILE]

Each export runs in a process of its own, the two in turn. Loading the checkpoint is not timed; the peak is the largest
resident set of the whole process, the loaded checkpoint included. torch's export is the model's plain forward: logits
of token ids, mask and positions, batch and length dynamic, no cache; optimized and saved with external data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from act_export.checkpoint.fetch import check_source
from act_export.commands.console import run_program

if TYPE_CHECKING:
    from act_export.checkpoint.load import Checkpoint

EXPORTERS = ("act-export", "torch.onnx.export")
PACKAGES = ("act-export", "torch", "transformers", "onnx", "onnxscript")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="as for act-export (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="exports of each kind (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    parser.add_argument("--export", choices=EXPORTERS, help=argparse.SUPPRESS)  # the measured process itself
    arguments = parser.parse_args()
    if arguments.export:
        print(json.dumps(measure(arguments.export, arguments.model)))
        return 0
    check_source(arguments.model)
    load_before = os.getloadavg()
    measured: dict[str, list[dict[str, Any]]] = {exporter: [] for exporter in EXPORTERS}
    for number in range(1, arguments.repeats + 1):
        for exporter in EXPORTERS:
            print(f"{exporter}, {number} of {arguments.repeats} ...", file=sys.stderr, flush=True)
            measured[exporter].append(run_child(exporter, arguments.model))
    print_report(arguments.model, measured, load_before)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    return 0


def run_child(exporter: str, model: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--export", exporter, "--model", model]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{exporter} failed:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(exporter: str, model: str) -> dict[str, Any]:
    """One export in this process."""
    from act_export.checkpoint.load import load_checkpoint

    checkpoint = load_checkpoint(model)
    with tempfile.TemporaryDirectory(prefix="measure-export-") as folder:
        path = Path(folder) / "model.onnx"
        began, cpu_began = time.perf_counter(), time.process_time()
        if exporter == "act-export":
            export_calibrated(checkpoint, path)
        else:
            export_with_torch(checkpoint, path)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_bytes": peak_bytes,
            "checkpoint_bytes": sum(parameter.nbytes for parameter in checkpoint.model.parameters()),
            "layers": checkpoint.identity.num_layers,
            **count_nodes(path),
        }


def export_calibrated(checkpoint: Checkpoint, path: Path) -> None:
    """With the shipped recipe; else with the first head of every third layer: how many hardly changes the cost."""
    from act_export.calibration.file import Calibration
    from act_export.calibration.recipes import find_recipes
    from act_export.export import build_model

    recipes = find_recipes(checkpoint.identity, checkpoint.names)
    layers = range(0, checkpoint.identity.num_layers, 3)
    calibration = recipes[0].calibration if recipes else Calibration(dict.fromkeys(layers, (0,)))
    build_model(checkpoint, calibration, path)


def export_with_torch(checkpoint: Checkpoint, path: Path) -> None:
    import torch

    from act_export.ops import functions

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = checkpoint.model

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
        ) -> torch.Tensor:
            outputs = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
            )
            logits: torch.Tensor = outputs.logits
            return logits

    names = ("input_ids", "attention_mask", "position_ids")
    ids = torch.zeros(2, 5, dtype=torch.long)
    with torch.no_grad():
        program = torch.onnx.export(
            Plain().eval(),
            kwargs=dict(zip(names, (ids, torch.ones_like(ids), torch.arange(5).repeat(2, 1)), strict=True)),
            dynamo=True,
            optimize=True,
            opset_version=functions.OPSET,
            dynamic_shapes={name: {0: "batch_size", 1: "sequence_length"} for name in names},
            input_names=names,
            output_names=("logits",),
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def count_nodes(path: Path) -> dict[str, int]:
    """All nodes of the graph, and those of one layer: from one operator of ours to the next."""
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    places = [place for place, node in enumerate(nodes) if node.domain == "act"]
    steps = [later - earlier for earlier, later in pairwise(places)]
    return {"nodes": len(nodes), **({"nodes_per_layer": int(median(steps))} if steps else {})}


def print_report(model: str, measured: dict[str, list[dict[str, Any]]], load_before: tuple[float, ...]) -> None:
    print(f"model      {model}, {measured[EXPORTERS[0]][0]['checkpoint_bytes'] / 1e6:.0f} MB of weights in float32")
    print(
        f"versions   Python {platform.python_version()}, " + ", ".join(f"{p} {metadata.version(p)}" for p in PACKAGES)
    )
    load_after = os.getloadavg()
    print(
        f"machine    {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}; load "
        f"{load_before[0]:.1f} before, {load_after[0]:.1f} after"
    )
    for exporter, runs in measured.items():
        first = runs[0]
        peak = median(run["peak_bytes"] for run in runs)
        print(
            f"\n{exporter}, median of {len(runs)}\n"
            f"  time     {median(run['seconds'] for run in runs):.1f} s "
            f"({', '.join(format(run['seconds'], '.1f') for run in runs)}), "
            f"processor time {median(run['cpu_seconds'] for run in runs):.1f} s\n"
            f"  peak     {peak / 1e6:.0f} MB, {peak / first['checkpoint_bytes']:.2f} times the weights\n"
            f"  nodes    {first['nodes']}, {first['nodes'] / first['layers']:.1f} for each of {first['layers']} layers"
            + (f"; {first['nodes_per_layer']} from one attention to the next" if "nodes_per_layer" in first else "")
        )
    ours, theirs = (measured[exporter] for exporter in EXPORTERS)
    print(f"\nratio, act-export to torch.onnx.export, medians ({len(ours)} pairs)")
    for title, key in (("time", "seconds"), ("processor time", "cpu_seconds"), ("peak", "peak_bytes")):
        print(f"  {title:15}{median(run[key] for run in ours) / median(run[key] for run in theirs):.2f}")


def processor() -> str:
    """The processor's name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    run_program(main)
