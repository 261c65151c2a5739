#!/usr/bin/env python3
"""The attention operator alone against ONNX Runtime's own, in ratios measured in one run.

    bench_attention.py [--quick] [--work decode] [--lengths 2048] [--shapes 9x3x64] ...
    bench_attention.py --memory
    bench_attention.py --device cuda [--library FILE] [--cuda-graph] [--batch 1 32] ...

What is compared is described in attention_contenders.py. All get the same data, which holds later
sinks, and are checked to agree before they are timed. Then they take turns: A, B, C, A, B, C, one turn a round. A turn
lasts about 20 ms or more: short calls are repeated, after one that isn't timed. A time is the median of its rounds, a
ratio that of two medians; beside it stands the spread of the rounds' own ratios. Each call also pays for ONNX Runtime's
session and Python's binding, some microseconds, the same for all.

All sessions share one thread pool. With a pool each, as is ONNX Runtime's default, the threads of the session that ran
last spin on (45 ms, measured with two threads on two cores) and take the cores from the session that comes next: its
calls of 170 us then took 170 to 900. Without spinning nobody is robbed, but every parallel section waits for its
threads to wake up, 30% of such a call. The shared pool has ONNX Runtime's own settings, spinning included, and its
threads are as awake for one contender as for the next.

In decode the same token is appended again and again. Keys and values are overwritten, but the column sums grow in their
shared buffer; every 16 calls they are put back, untimed, so that the work stays the same.

With --memory nothing is timed; see attention_memory.py. With --device cuda all of this is
otherwise; see attention_on_gpu.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any

from attention_contenders import (
    CONTENDERS,
    TOLERANCES,
    Contender,
    DisagreementError,
    check_agreement,
    count_later_sinks,
    share_threads,
)
from attention_memory import compare_memory
from attention_workloads import Shape, Workload, make_data

from act_export.errors import ActExportError
from act_export.ops.library import library_path
from act_export.runtime.device import Device

LENGTHS = {"prompt": (512, 1024, 2048, 4096), "decode": (512, 2048, 8192)}
QUICK_LENGTHS = {"prompt": (512, 1024), "decode": (512, 2048)}
MEMORY_LENGTH = 8192
SHAPES = ("9x3x64", "32x8x128")
SHORTEST_TURN_S = 0.02
CALLS_BEFORE_RESTORE = 16

Result = dict[str, Any]


def main() -> int:
    arguments = parse_arguments()
    try:
        return bench_cuda(arguments) if arguments.device.is_cuda else bench_cpu(arguments)
    except DisagreementError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ActExportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def bench_cuda(arguments: argparse.Namespace) -> int:
    """On a GPU, whose report needs no other packages."""
    import attention_on_gpu as on_gpu
    from attention_gpu_report import describe_gpu, report_on_gpu

    workloads = [
        Workload(shape, work, length, batch, arguments.dtype)
        for work in arguments.work
        for shape in arguments.shapes or [Shape.parse(on_gpu.SHAPE)]
        for batch in arguments.batch or on_gpu.BATCHES[work]
        for length in arguments.lengths or on_gpu.LENGTHS[work]
    ]
    report: Result = {
        "dtype": arguments.dtype,
        "cuda_graph": arguments.cuda_graph,
        "machine": describe_gpu(arguments.device),
        "workloads": [],
    }
    library = arguments.library or library_path()
    for workload in workloads:
        say(workload)
        found = on_gpu.bench_on_gpu(
            workload, library, arguments.device, arguments.rounds, cuda_graph=arguments.cuda_graph
        )
        report["workloads"].append(found)
        report["summary"] = on_gpu.summarize(report["workloads"])
        write(report, arguments.json)
    print(report_on_gpu(report))
    return 0


def bench_cpu(arguments: argparse.Namespace) -> int:
    """On the CPU."""
    from attention_report import (
        describe_machine,
        describe_versions,
        make_console,
        print_machine,
        print_memory,
        print_roofline,
        print_times,
    )

    console = make_console()
    (batch,) = arguments.batch or (1,)
    arguments.shapes = arguments.shapes or [Shape.parse(text) for text in SHAPES]
    workloads = [
        Workload(shape, work, length, batch, arguments.dtype)
        for work in arguments.work
        for shape in arguments.shapes
        for length in arguments.lengths or default_lengths(arguments, work)
    ]
    report: Result = {
        "dtype": arguments.dtype,
        "batch": batch,
        "versions": describe_versions(),
        "machine": describe_machine(arguments.threads),
    }
    if arguments.memory:
        report["memory"] = []
        for workload in workloads:
            say(workload)
            report["memory"].append(compare_memory(workload, arguments.threads))
        print_memory(console, report["memory"])
    else:
        share_threads(arguments.threads)
        report["workloads"] = [bench(workload, arguments.against, arguments.rounds) for workload in workloads]
        report["summary"] = summarize(report["workloads"])
        print_times(console, report)
        if arguments.roofline:
            report["roofline"] = measure_roofline(workloads, arguments.threads)
            for result in report["workloads"]:
                result["roof"] = find_roof(result, report["roofline"])
            print_roofline(console, report)
    report["machine"]["load_after"] = os.getloadavg()
    print_machine(console, report)
    write(report, arguments.json)
    return 0


def write(report: Result, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    lengths = "; ".join(f"{work} {' '.join(map(str, lengths))}" for work, lengths in LENGTHS.items())
    parser.add_argument(
        "--work",
        nargs="+",
        metavar="KIND",
        choices=LENGTHS,
        default=list(LENGTHS),
        help=f"{', '.join(LENGTHS)} (default: both)",
    )
    parser.add_argument(
        "--lengths",
        nargs="+",
        type=positive,
        metavar="TOKENS",
        help="of the prompt, or in the cache before the decoded token "
        f"(default: {lengths}; with --memory {MEMORY_LENGTH})",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=parse_shape,
        metavar="SHAPE",
        help=f"heads x key-value heads x head size (default: {' '.join(SHAPES)}; with --device cuda 32x8x128)",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="CONTENDER",
        choices=CONTENDERS[1:],
        default=CONTENDERS[1:],
        help=f"what the calibrated operator is compared with: {', '.join(CONTENDERS[1:])} (default: all)",
    )
    parser.add_argument("--device", type=parse_device, default=Device(), help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--library", type=Path, metavar="FILE", help="with --device cuda: not the installed library")
    parser.add_argument("--cuda-graph", action="store_true", help="with --device cuda: replay the launches as a graph")
    parser.add_argument("--dtype", choices=TOLERANCES, help="(default: float32; with --device cuda bfloat16)")
    parser.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        metavar="N",
        help="sequences; one number on the CPU (default: 1; with --device cuda also 32 for decode)",
    )
    parser.add_argument("--threads", type=positive, metavar="N", default=2, help="(default: %(default)s)")
    parser.add_argument("--rounds", type=positive, metavar="N", help="turns of each (default: 9; with --quick 3)")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and of the default lengths the short ones")
    parser.add_argument("--memory", action="store_true", help="measure memory instead of time, of calibrated and gqa")
    parser.add_argument("--roofline", action="store_true", help="also measure what the machine can do, and compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement there")
    arguments = parser.parse_args()
    check_device(parser, arguments)
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 9)
    return arguments


def check_device(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuses what the device hasn't, and sets the type."""
    cuda = arguments.device.is_cuda
    arguments.dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    if not cuda and arguments.dtype == "bfloat16":
        parser.error("--dtype bfloat16: GroupQueryAttention has no such kernel for the CPU; add --device cuda")
    if not cuda and len(arguments.batch or ()) > 1:
        parser.error("--batch takes one number on the CPU")
    given = {"--library": arguments.library is not None, "--cuda-graph": arguments.cuda_graph}
    if cuda:
        given = {"--memory": arguments.memory, "--roofline": arguments.roofline}
        given["--against"] = tuple(arguments.against) != CONTENDERS[1:]
    for option, is_given in given.items():
        if is_given:
            parser.error(f"{option} can't be used with --device {arguments.device}")


def parse_device(text: str) -> Device:
    try:
        return Device.parse(text)
    except ActExportError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def parse_shape(text: str) -> Shape:
    try:
        return Shape.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def default_lengths(arguments: argparse.Namespace, work: str) -> tuple[int, ...]:
    if arguments.memory:
        return (MEMORY_LENGTH,)
    return (QUICK_LENGTHS if arguments.quick else LENGTHS)[work]


def say(workload: Workload) -> None:
    print(f"{workload} ...", file=sys.stderr, flush=True)


def bench(workload: Workload, against: list[str], rounds: int) -> Result:
    """Checks and times one workload."""
    say(workload)
    data = make_data(workload)
    contenders = [Contender(name, workload, data) for name in ("calibrated", *against)]
    for contender in contenders:
        contender.run()
    later_sinks = count_later_sinks(contenders[0].arrays["present_sink_scores"], workload.total)
    differences = check_agreement(workload, data, {c.name: c.arrays["output"] for c in contenders})
    seconds = take_turns(contenders, rounds)
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "shape": str(workload.shape),
        "work": workload.work,
        "length": workload.length,
        "later_sinks_per_head": {
            "mean": sum(later_sinks) / len(later_sinks),
            "least": min(later_sinks),
            "most": max(later_sinks),
        },
        "differences": differences,
        "flops": workload.flops,
        "cache_bytes": workload.cache_bytes,
        "least_bytes": workload.least_bytes,
        "ms": {name: value * 1e3 for name, value in medians.items()},
        "rounds_ms": {name: [value * 1e3 for value in values] for name, values in seconds.items()},
        "ratios": {
            name: {
                "of_medians": medians["calibrated"] / medians[name],
                "of_fastest": min(seconds["calibrated"]) / min(seconds[name]),
                "quartiles": quartiles([a / b for a, b in zip(seconds["calibrated"], seconds[name], strict=True)]),
            }
            for name in against
        },
    }


def take_turns(contenders: list[Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call for each contender and round."""
    calls = {contender.name: find_calls(contender) for contender in contenders}
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for _ in range(rounds):
        for contender in contenders:
            if calls[contender.name] > 1:
                contender.run()
            seconds[contender.name].append(time_calls(contender, calls[contender.name]))
    return seconds


def find_calls(contender: Contender) -> int:
    """As many calls as a turn takes."""
    calls = 1
    while (turn_s := calls * time_calls(contender, calls)) < SHORTEST_TURN_S:
        calls = max(calls + 1, math.ceil(calls * min(SHORTEST_TURN_S / turn_s, 16)))
    return calls


def time_calls(contender: Contender, calls: int) -> float:
    """Seconds of one call, the mean of so many."""
    seconds = 0.0
    for done in range(0, calls, CALLS_BEFORE_RESTORE):
        contender.restore()
        began = time.perf_counter()
        for _ in range(min(CALLS_BEFORE_RESTORE, calls - done)):
            contender.run()
        seconds += time.perf_counter() - began
    return seconds / calls


def quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    lower, _, upper = quantiles(values, n=4, method="inclusive")
    return lower, upper


def summarize(results: list[Result]) -> Result:
    """Geometric mean and worst of the ratios to each contender, for each kind of work."""
    summary: Result = {}
    for work in dict.fromkeys(result["work"] for result in results):
        of_work = [result for result in results if result["work"] == work]
        summary[work] = {}
        for name in of_work[0]["ratios"]:
            ratios = {f"{r['shape']} {r['length']}": r["ratios"][name]["of_medians"] for r in of_work}
            worst = max(ratios, key=ratios.__getitem__)
            summary[work][name] = {
                "geometric_mean": geometric_mean(ratios.values()),
                "geometric_mean_of_fastest": geometric_mean(r["ratios"][name]["of_fastest"] for r in of_work),
                "worst": ratios[worst],
                "worst_at": worst,
            }
    return summary


def measure_roofline(workloads: list[Workload], threads: int) -> Result:
    """By roofline.py, for the sizes that the workloads touch; in a process of its own, without other threads."""
    sizes = sorted({workload.least_bytes for workload in workloads})
    script = Path(__file__).with_name("roofline.py")
    command = [sys.executable, script, "--json", "--threads", threads, "--bytes", *sizes]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"tools/bench/attention/roofline.py failed:\n{result.stderr}")
    found: Result = json.loads(result.stdout)
    return found


def find_roof(result: Result, roofline: Result) -> Result:
    """The least time a workload can take on this machine, and the part of that speed that each contender reaches."""
    rate = dict(roofline["read"])[result["least_bytes"]]
    least_s = {"arithmetic": result["flops"] / roofline["flops"], "memory": result["least_bytes"] / rate}
    bound_by = max(least_s, key=least_s.__getitem__)
    least_ms = least_s[bound_by] * 1e3
    return {
        "read_bytes_a_second": rate,
        "bound_by": bound_by,
        "least_ms": least_ms,
        "reached": {name: least_ms / milliseconds for name, milliseconds in result["ms"].items()},
    }


if __name__ == "__main__":
    sys.exit(main())
