#!/usr/bin/env python3
"""What this machine can do at most with some threads: float32 arithmetic, and reading memory.

    tools/bench/attention/roofline.py [--threads N] [--bytes SIZE ...] [--json]

Arithmetic is a square matrix product, the fastest of two sizes in numpy and torch. Reading is the sum of an array of a
given size again and again, so that what fits into a cache is judged by that cache; copy and triad of a large array are
printed beside it. Each figure is that of the fastest of many calls.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

MATRICES = (512, 1024)  # short calls: the fastest ones run without being interrupted
LARGE_BYTES = 2**28
MEASURED_S = 1.0  # for each figure


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: %(default)s, all cores)")
    parser.add_argument(
        "--bytes",
        type=int,
        nargs="+",
        metavar="SIZE",
        default=[2**20, 2**22, 2**24, 2**26, LARGE_BYTES],
        help="of the array that is read (default: 1, 4, 16, 64 and 256 MiB)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead")
    arguments = parser.parse_args()
    if arguments.threads < 1:
        parser.error(f"--threads is {arguments.threads}; it must be at least 1")
    # Read when numpy and torch are loaded. Unbound, two threads may share a core for long where other work is running.
    os.environ |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    os.environ["OMP_PROC_BIND"] = "true"
    found = measure(arguments.threads, arguments.bytes)
    if arguments.json:
        print(json.dumps(found))
        return 0
    print(f"float32 product {found['flops'] / 1e9:.0f} GFLOP/s, {found['product']}, {found['threads']} threads")
    for size, rate in found["read"]:
        print(f"read  {size / 1e6:9.4g} MB {rate / 1e9:6.1f} GB/s")
    for name in ("copy", "triad"):
        print(f"{name:6}{LARGE_BYTES / 1e6:9.4g} MB {found[name] / 1e9:6.1f} GB/s")
    return 0


def measure(threads: int, sizes: list[int]) -> dict[str, Any]:
    """Rates a second: flops of the product, bytes of each size read, bytes read and written by copy and triad."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    rates: dict[str, float] = {}
    for size in MATRICES:
        one, two = np.random.default_rng(0).random((2, size, size), np.float32)
        products: dict[str, Callable[[], object]] = {
            "numpy": partial(np.matmul, one, two),
            "torch": partial(torch.mm, torch.from_numpy(one), torch.from_numpy(two)),
        }
        rates |= {f"{size} x {size} by {n}": 2 * size**3 / best_seconds(call) for n, call in products.items()}
    fastest = max(rates, key=rates.__getitem__)

    source, added = torch.rand(2, LARGE_BYTES // 4)
    target = torch.zeros(LARGE_BYTES // 4)
    read = []
    for size in sizes:
        array = torch.rand(max(size // 4, 1))
        read.append((size, array.nbytes / best_seconds(array.sum)))
    return {
        "threads": threads,
        "flops": rates[fastest],
        "product": fastest,
        "read": read,
        "copy": 2 * LARGE_BYTES / best_seconds(lambda: target.copy_(source)),
        "triad": 3 * LARGE_BYTES / best_seconds(lambda: torch.add(source, added, alpha=0.4, out=target)),
    }


def best_seconds(call: Callable[[], object]) -> float:
    """Seconds of the fastest of many calls."""
    call()
    best = math.inf
    ends = time.perf_counter() + MEASURED_S
    while (began := time.perf_counter()) < ends:
        call()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    sys.exit(main())
