"""What bench_attention.py prints: tables of ratios beside their times, and the machine they were measured on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from attention_contenders import TOLERANCES
from rich import box
from rich.console import Console
from rich.table import Table

PACKAGES = ("act-export", "onnxruntime", "onnx", "numpy", "torch")
INSTRUCTION_SETS = ("avx512_bf16", "avx512f", "avx2", "asimd", "sse4_2")
RATES = {"prompt": ("GFLOP/s", "flops"), "decode": ("GB/s", "cache_bytes")}
WIDTH = 160  # a terminal that is narrower breaks the lines; numbers are never cut

Result = dict[str, Any]


def make_console() -> Console:
    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    return console


def make_table(title: str, *columns: str) -> Table:
    """The first column is a name, the others are numbers."""
    table = Table(title=title, box=box.SIMPLE, title_justify="left")
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    return table


def print_times(console: Console, report: Result) -> None:
    """One table for each kind of work; rates of the calibrated operator and, where it ran, GroupQueryAttention."""
    for work, summary in report["summary"].items():
        rate, done = RATES[work]
        results = [result for result in report["workloads"] if result["work"] == work]
        rated = [name for name in ("calibrated", "gqa") if name in results[0]["ms"]]
        table = make_table(
            f"{work}, {report['dtype']}, batch {report['batch']}",
            *("shape", "tokens", "sinks"),
            *(f"calibrated\n/ {name}" for name in summary),
            *(f"{name}\nms" for name in results[0]["ms"]),
            *(f"{name}\n{rate}" for name in rated),
        )
        for result in results:
            table.add_row(
                *(result["shape"], str(result["length"]), f"{result['later_sinks_per_head']['mean']:.1f}"),
                *map(describe_ratio, result["ratios"].values()),
                *(f"{milliseconds:.3g}" for milliseconds in result["ms"].values()),
                *(f"{result[done] / result['ms'][name] / 1e6:.3g}" for name in rated),
            )
        console.print(table)
        for name, found in summary.items():
            console.print(
                f"  calibrated / {name:12} geometric mean {found['geometric_mean']:.3f}, "
                f"worst {found['worst']:.3f} ({found['worst_at']}); geometric mean of each one's fastest round "
                f"{found['geometric_mean_of_fastest']:.3f}"
            )
        console.print()
    console.print(
        "sinks: later sinks of a head, mean. GB/s: of the cache that is read. Ratios are of medians; +- is half the "
        "distance between\nthe quartiles of the rounds' ratios."
    )
    if "attention23" in report["summary"].get("decode", {}):
        console.print(
            "attention23 can't share past and present in decode: its past has the exact length, each call copies it."
        )
    agreement = ", ".join(f"{pair} {value:.1e}" for pair, value in largest_differences(report["workloads"]).items())
    console.print(f"largest differences of outputs: {agreement} (allowed {TOLERANCES[report['dtype']]:g})\n")


def describe_ratio(ratio: Result) -> str:
    lower, upper = ratio["quartiles"]
    return f"{ratio['of_medians']:.2f} +-{(upper - lower) / 2:.2f}"


def largest_differences(results: list[Result]) -> dict[str, float]:
    largest: dict[str, float] = {}
    for result in results:
        for pair, difference in result["differences"].items():
            largest[pair] = max(difference, largest.get(pair, 0.0))
    return largest


def print_roofline(console: Console, report: Result) -> None:
    roofline = report["roofline"]
    table = make_table(
        "roofline",
        *("work", "tokens", "GFLOP", "MB\nat least", "flop\na byte", "read\nGB/s", "bound by", "least\nms"),
        *(f"{name}\nof roof" for name in report["workloads"][0]["ms"]),
    )
    for result in report["workloads"]:
        roof = result["roof"]
        table.add_row(
            f"{result['shape']} {result['work']}",
            str(result["length"]),
            f"{result['flops'] / 1e9:.3g}",
            f"{result['least_bytes'] / 1e6:.3g}",
            f"{result['flops'] / result['least_bytes']:.3g}",
            f"{roof['read_bytes_a_second'] / 1e9:.3g}",
            roof["bound_by"],
            f"{roof['least_ms']:.3g}",
            *(f"{part:.0%}" for part in roof["reached"].values()),
        )
    console.print(table)
    console.print(
        f"roof: {roofline['flops'] / 1e9:.0f} GFLOP/s, a float32 matrix product {roofline['product']}; reading as "
        "many bytes as a call must touch, again and again.\n"
        f"Large arrays: copy {roofline['copy'] / 1e9:.0f}, triad {roofline['triad'] / 1e9:.0f} GB/s."
    )
    if any(part > 1 for result in report["workloads"] for part in result["roof"]["reached"].values()):
        console.print("Above 100%: the roof was measured too low. Other work was running; measure again.")
    console.print()


def print_memory(console: Console, results: list[Result]) -> None:
    names = list(results[0]["extra_bytes"])
    table = make_table(
        "memory of one call beyond inputs and outputs",
        *("work", "tokens", "inputs and\noutputs MB", *(f"{name}\nMB" for name in names), "calibrated\n/ gqa"),
    )
    for result in results:
        table.add_row(
            f"{result['shape']} {result['work']}",
            str(result["length"]),
            f"{result['arrays_bytes']['calibrated'] / 1e6:.1f}",
            *(f"{result['extra_bytes'][name] / 1e6:.2f}" for name in names),
            "-" if result["ratio"] is None else f"{result['ratio']:.2f}",
        )
    console.print(table)


def describe_versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


def describe_machine(threads: int) -> Result:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "processor": fields.get("model name", platform.processor() or platform.machine()),
        "architecture": platform.machine(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "load_before": os.getloadavg(),
    }


def print_machine(console: Console, report: Result) -> None:
    found = report["machine"]
    console.print("versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    console.print(
        f"machine: {found['processor']}, {found['architecture']} with {' '.join(found['instruction_sets']) or '?'}, "
        f"{found['cores']} cores, {found['threads']} threads used"
    )
    console.print(
        f"load: {found['load_before'][0]:.1f} before, {found['load_after'][0]:.1f} after; what exceeds the "
        "threads used is other work"
    )
