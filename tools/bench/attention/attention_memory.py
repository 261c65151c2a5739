"""Memory of one call of the attention operator beyond its inputs and outputs.

Each contender is measured in a process of its own: the growth of its largest resident set in the first call, where
inputs and outputs are in memory already. Linux only.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from attention_contenders import Contender, share_threads
from attention_workloads import Shape, Workload, make_data

MEASURED = ("calibrated", "gqa")


def compare_memory(workload: Workload, threads: int) -> dict[str, Any]:
    """Bytes of the contenders in `MEASURED`, and the ratio of the extra ones."""
    found = {name: measure_in_child(name, workload, threads) for name in MEASURED}
    extra = {name: one["extra_bytes"] for name, one in found.items()}
    return {
        "shape": str(workload.shape),
        "work": workload.work,
        "length": workload.length,
        "arrays_bytes": {name: one["arrays_bytes"] for name, one in found.items()},
        "extra_bytes": extra,
        "ratio": extra["calibrated"] / extra["gqa"] if extra["gqa"] else None,
    }


def measure_in_child(name: str, workload: Workload, threads: int) -> dict[str, int]:
    fields = (workload.shape, workload.work, workload.length, workload.batch, workload.dtype)
    command = [sys.executable, __file__, name, str(threads), *map(str, fields)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"the memory of {name} can't be measured:\n{result.stderr}")
    found: dict[str, int] = json.loads(result.stdout.splitlines()[-1])
    return found


def measure(name: str, workload: Workload, threads: int) -> dict[str, int]:
    """In this process."""
    share_threads(threads)
    # A small call before: it brings code and threads into memory, which belong to no call.
    small = replace(workload, length=16)
    Contender(name, small, make_data(small)).run()
    contender = Contender(name, workload, make_data(workload))
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not serve the call
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the largest resident set starts again from now
    before = largest_resident_bytes()
    contender.run()
    arrays = {id(array): array.nbytes for array in contender.arrays.values()}
    return {"extra_bytes": largest_resident_bytes() - before, "arrays_bytes": sum(arrays.values())}


def largest_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


if __name__ == "__main__":
    name, threads, shape, work, length, batch, dtype = sys.argv[1:]
    workload = Workload(Shape.parse(shape), work, int(length), int(batch), dtype)
    print(json.dumps(measure(name, workload, int(threads))))
