"""Steps of the plan that need no ONNX Runtime: HARNESS_STEPS images | parity | hopper | sanitize TOOL | short.

They call the launches in the carried libcuda_harness.so, `CHECK_GPU_HARNESS` in the environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attention_cases import CASES, TYPES, Case, draw, judge, root_mean_square
from gpu_memory import Gpu
from harness_calls import Harness, PlacedCall
from plan import write_result

from act_export.ops.cuda.catalogue import read_catalogue

HARNESS, CATALOGUE = "CHECK_GPU_HARNESS", "CHECK_GPU_KERNELS"
SHORT = ("head size 128", "sinks", "little rest", "holes", "decode", "decode, sinks", "decode, in place", "in place")
TOKENS = 16  # of a call, more of which are a prompt: as in ops/cuda/specs.py, which needs Triton
HALF_TYPES = ("bfloat16", "float16")
FOUND_ERRORS = 99  # the exit code that compute-sanitizer is told to give
_SANITIZER_FOLDERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer")

Found = dict[str, Any]


def images(harness: Harness, catalogue: Path) -> Found:
    """Which image of each kernel with machine code was loaded, and which of them fell back to PTX.

    Those that the driver has to compile aren't: it takes a second for each.
    """
    best: dict[str, set[str]] = {}
    for image in read_catalogue(catalogue):
        best.setdefault(image.name, set()).add(image.target_name)
    taken = {name: harness.find(name) for name, targets in best.items() if targets != {"ptx"}}
    machine_code = {target for target in taken.values() if target != "ptx"}
    fallen = sorted(name for name, target in taken.items() if target == "ptx" and machine_code & best[name])
    return {"targets": taken, "refused": harness.refused(), "fell back to PTX": fallen}


def parity(
    gpu: Gpu,
    harness: Harness,
    cases: Mapping[str, Case],
    save: Callable[[Found], None],
    storages: Sequence[str] = tuple(TYPES),
) -> Found:
    """Every case in every type against the reference in float64: errors in root mean square, or what is wrong.

    First those whose kernels are machine code, for the driver takes its time with the others.
    """
    found: Found = {"calls": {}, "wrong": {}}
    rounds = [(storage, has_own) for has_own in (True, False) for storage in storages]
    for storage, has_own in rounds:
        for name, base in cases.items():
            if _has_own_kernels(base) != has_own:
                continue
            case = replace(base, storage=storage)
            inputs = draw(case)
            call = PlacedCall(case, inputs, gpu.place)
            try:
                harness.attention(storage, call.arguments)
                errors = judge(case, inputs, call.result())
                found["calls"][f"{name}, {storage}"] = [root_mean_square(errors.own), root_mean_square(errors.pytorch)]
            except (AssertionError, RuntimeError) as error:
                found["wrong"][f"{name}, {storage}"] = str(error)[:500]
            gpu.free()
        save(found)
    return found


def hopper(gpu: Gpu, harness: Harness, cases: Mapping[str, Case], save: Callable[[Found], None]) -> Found:
    """Parity of the prompts that take the kernel for Hopper, which the environment asks for; it has to be taken."""
    taken = {name: case for name, case in cases.items() if _takes_hopper(case)}
    found = parity(gpu, harness, taken, save, HALF_TYPES)
    loaded = harness.loaded()
    if not any(name.startswith("hopper.") for name in loaded) or any(name.startswith("forward.") for name in loaded):
        found["wrong"]["kernels"] = f"{', '.join(loaded)} were taken. {harness.refused()}"
    save(found)
    return found


def _takes_hopper(case: Case) -> bool:
    return _has_own_kernels(case) and case.head_size == case.value_size in (64, 128) and case.sequence > TOKENS


def _has_own_kernels(case: Case) -> bool:
    """Whether its head size has kernels of its own, and it takes no general ones."""
    return {case.head_size, case.value_size} <= {64, 128, 256} and not case.softcap and case.attributes["scale"] > 0


def short(gpu: Gpu, harness: Harness) -> None:
    """Some calls, for a tool that watches them; nothing is judged."""
    for storage in TYPES:
        for name in SHORT:
            case = replace(CASES[name], storage=storage)
            call = PlacedCall(case, draw(case), gpu.place)
            harness.attention(storage, call.arguments)
            call.result()
            gpu.free()


def sanitize(tool: str) -> Found:
    """What compute-sanitizer counts in those calls, in a process of its own."""
    program = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *_SANITIZER_FOLDERS]))
    if program is None:
        raise FileNotFoundError(f"compute-sanitizer is neither on PATH nor in {' or '.join(_SANITIZER_FOLDERS)}")
    command = [program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS), sys.executable, __file__, "short"]
    said = subprocess.run(command, capture_output=True, text=True)
    summary = [line.strip("= ") for line in said.stdout.splitlines() if "SUMMARY" in line]
    return {"summary": (summary or [""])[-1], "exit": said.returncode, "output": (said.stdout + said.stderr)[-3000:]}


def main(arguments: list[str]) -> int:
    """Runs one step; its result goes to the plan's file. 1 where something is wrong."""
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    if arguments[0] == "sanitize":
        found = sanitize(arguments[1])
        write_result(found)
        return found["exit"]
    harness = Harness(Path(os.environ[HARNESS]))
    if arguments[0] == "images":
        found = images(harness, Path(os.environ[CATALOGUE]))
        write_result(found)
        return bool(found["fell back to PTX"])
    gpu = Gpu()
    try:
        if arguments[0] == "short":
            short(gpu, harness)
            return 0
        found = (hopper if arguments[0] == "hopper" else parity)(gpu, harness, CASES, write_result)
        return bool(found["wrong"])
    finally:
        gpu.close()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Exception:
        traceback.print_exc()
        sys.exit(1)
