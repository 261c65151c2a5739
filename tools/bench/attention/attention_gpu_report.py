"""What bench_attention.py prints of a GPU: Markdown, so that it can be pasted, and needs no package to print."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnxruntime
from attention_contenders import TOLERANCES
from attention_on_gpu import LAUNCHING_SHARE

from act_export.runtime.cuda import cuda_version
from act_export.runtime.cuda_driver import CudaDriver
from act_export.runtime.device import Device

RATES = {"prompt": ("TFLOP/s", "flops", 1e12), "decode": ("GB/s", "cache_bytes", 1e9)}

Result = dict[str, Any]


def describe_gpu(device: Device) -> dict[str, str]:
    """GPU, driver, CUDA and ONNX Runtime.

    Raises:
        CudaDriverError: The driver can't describe it.
    """
    gpu = CudaDriver().describe(device.index)
    return {
        "GPU": f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_bytes / 2**30:.0f} GiB",
        "driver": f"{gpu.driver or 'unknown version'}, CUDA {gpu.cuda}",
        "ONNX Runtime": f"{onnxruntime.__version__}, CUDA {cuda_version(onnxruntime) or 'unknown'}",
    }


def report_on_gpu(report: Result) -> str:
    """The whole report in Markdown."""
    graph = ", launches replayed as a CUDA graph" if report["cuda_graph"] else ""
    parts = [
        f"Attention operator, {report['dtype']}{graph}",
        table(("what", "which"), report["machine"].items()),
    ]
    for work in dict.fromkeys(result["work"] for result in report["workloads"]):
        parts += of_work(work, [r for r in report["workloads"] if r["work"] == work], report["cuda_graph"])
    measured = [result for result in report["workloads"] if "ms" in result]
    if measured:
        parts.append(agreement(measured, report["dtype"]))
    return "\n\n".join(parts) + "\n"


def of_work(work: str, results: list[Result], cuda_graph: bool) -> list[str]:
    """One kind of work: ratios and times, what was skipped, and the summary."""
    rate, done, unit = RATES[work]
    measured = [result for result in results if "ms" in result]
    parts = []
    if measured:
        most = max(measured, key=lambda result: len(result["ms"]))  # where none fails
        names, pairs = list(most["ms"]), list(most["ratios"])
        header = ("shape", "batch", "tokens", "later sinks", "nodes", *pairs)
        header += (*(f"{name}, ms" for name in names), *(f"{name}, {rate}" for name in names))
        rows = [
            (
                *(result[key] for key in ("shape", "batch", "length")),
                f"{result['later_sinks_per_head']:.1f}",
                result["nodes"],
                *(f"{result['ratios'][pair]:.2f}" if pair in result["ratios"] else "-" for pair in pairs),
                *(milliseconds(result, name, cuda_graph) if name in result["ms"] else "-" for name in names),
                *(
                    f"{result[done] / result['ms'][name] * 1e3 / unit:.3g}" if name in result["ms"] else "-"
                    for name in names
                ),
            )
            for result in measured
        ]
        parts = [f"**{work}**", table(header, rows)]
    parts += [
        f"{work}, {result['shape']}, batch {result['batch']}, {result['length']} tokens: skipped, {result['skipped']}"
        for result in results
        if "skipped" in result
    ]
    parts += [
        f"{work}, {result['shape']}, batch {result['batch']}, {result['length']} tokens: {name} fails: {message}"
        for result in measured
        for name, message in result["failures"].items()
    ]
    return parts


def milliseconds(result: Result, name: str, cuda_graph: bool) -> str:
    """Of one node; marked where the host was busy all the time."""
    mark = "*" if not cuda_graph and result["launching_share"][name] > LAUNCHING_SHARE else ""
    return f"{result['ms'][name]:.3g}{mark}"


def agreement(results: list[Result], dtype: str) -> str:
    """What the columns mean, and by how much the contenders disagree."""
    largest: dict[str, float] = {}
    for result in results:
        for pair, difference in result["differences"].items():
            largest[pair] = max(difference, largest.get(pair, 0.0))
    differences = ", ".join(f"{pair} {value:.1e}" for pair, value in largest.items())
    return (
        "Times are of one node, medians; ratios are of medians. Rates count visible columns of a prompt, and the keys "
        f"and values that a decoded token reads. *: the host was launching for more than {LAUNCHING_SHARE:.0%} of the "
        "time, so the GPU may have waited for it. Largest differences of outputs: "
        f"{differences} (allowed {TOLERANCES[dtype]:g})."
    )


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
