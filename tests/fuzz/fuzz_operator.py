#!/usr/bin/env python3
"""Hostile nodes and inputs for the native operators: random cases that are run, compared, and survived.

    tests/fuzz/fuzz_operator.py [--seconds N] [--seed N] [--library FILE] [--case N]

Each case is a node with attributes and inputs from a seed (operator_cases.py), run in ONNX Runtime in another process,
so that a crash, a hang or much memory is noticed and counted as that case's. Cases with an answer are compared with the
definition (operator_answers.py), some with the portable function too; others have to be an error.

What is found is printed with the seed and the number of the case: `--seed S --case N` runs that one again. Exit code: 0
where nothing was found, 1 otherwise.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import selectors
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper
from operator_answers import compare
from operator_cases import ANSWER, BOUND, EITHER, ERROR, FED, IN_PLACE, STORAGE, Array, Case, draw_case, output_shapes

from act_export.ops import functions, schema
from act_export.ops.library import library_path

MOST_SECONDS = 10.0  # of a processor, for a case
MOST_SECONDS_WAITED = 60.0  # for a case, with whatever else the machine does
MOST_BYTES = 3 << 30  # of a process of cases
MOST_BYTES_MORE = 1 << 30  # of a case, beside what cases before it took
PORTABLE_SHARE = 8  # of so many cases, one is run by the portable function too
PORTABLE_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 8e-2}


@dataclass(frozen=True)
class Finding:
    """A case that went wrong.

    Attributes:
        seed: With `case`, what to draw it from.
        case: Its number.
        problem: What went wrong.
        description: The case.
    """

    seed: int
    case: int
    problem: str
    description: str

    def __str__(self) -> str:
        return f"--seed {self.seed} --case {self.case}: {self.problem}\n    {self.description}"


@dataclass
class Report:
    """What a run tried and found.

    Attributes:
        tried: Cases, by kind and by what was expected of them.
        rows: Rows of heads whose output was compared; `left_out`: those that rounding or overflow decides about.
        portable: Cases that the portable function ran too.
        findings: What went wrong.
    """

    tried: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    left_out: int = 0
    portable: int = 0
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(self.tried.items()))
        return (
            f"{self.tried.total()} cases ({counts}); {self.rows} rows of heads compared, {self.left_out} left out; "
            f"{self.portable} cases with the portable function; {len(self.findings)} findings"
        )


def fuzz_operator(
    seed: int,
    seconds: float,
    *,
    library: Path | None = None,
    first: int = 0,
    count: int | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Runs random cases of the operators in processes of their own.

    Args:
        seed: Of all cases.
        seconds: No case begins after so many.
        library: The native library; None for that of this installation.
        first: Number of the first case.
        count: Of cases at the most; None for no such limit.
        say: Called with each finding, as text, as it is found.
    """
    report = Report()
    deadline = time.monotonic() + seconds
    end = None if count is None else first + count
    next_case = first
    while time.monotonic() < deadline and (end is None or next_case < end):
        for result in _run_cases(seed, next_case, end, library or library_path(), deadline):
            next_case = result["case"] + 1
            report.tried[f"{result['kind']} -> {result['expected']}"] += 1
            report.rows += result.get("rows", 0)
            report.left_out += result.get("left_out", 0)
            report.portable += result.get("portable", 0)
            for problem in result["problems"]:
                report.findings.append(Finding(seed, result["case"], problem, result["description"]))
                say(str(report.findings[-1]))
    return report


def _run_cases(seed: int, first: int, end: int | None, library: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Results of the cases from `first` on, until the process that runs them ends."""
    command = [sys.executable, __file__, "--child", "--seed", seed, "--case", first, "--library", library]
    if end is not None:
        command += ["--end", end]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    running: dict[str, Any] | None = None
    try:
        for result in _lines(process, deadline):
            if isinstance(result, str):  # it hangs, or takes too much
                if running is not None:
                    yield running | {"problems": [result]}
                return
            if "problems" in result:
                yield result
                running = None
            else:
                running = result
        if time.monotonic() >= deadline:
            return
        code = process.wait()
        if running is not None:
            yield running | {"problems": [f"the process ended with {code}"]}
        elif code != 0:
            raise RuntimeError(f"the process that runs the cases ended with {code} between two of them")
    finally:
        process.kill()
        process.wait()


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[dict[str, Any] | str]:
    """What the process says, line by line; a text where it says nothing for long, or takes much memory."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    os.set_blocking(process.stdout.fileno(), False)
    buffer, spoke, worked = b"", time.monotonic(), _processor_seconds(process.pid)
    while time.monotonic() < deadline:
        if selector.select(timeout=0.1):
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                return
            spoke, worked = time.monotonic(), _processor_seconds(process.pid)
            *lines, buffer = (buffer + part).split(b"\n")
            for line in lines:
                yield json.loads(line)
        if _processor_seconds(process.pid) - worked > MOST_SECONDS:
            yield f"no end after {MOST_SECONDS:g} s of work"
            return
        if time.monotonic() - spoke > MOST_SECONDS_WAITED:
            yield f"no end after {MOST_SECONDS_WAITED:g} s"
            return
        if _resident_bytes(process.pid) > MOST_BYTES:
            yield f"takes more than {MOST_BYTES / 2**30:g} GB of memory"
            return


def _processor_seconds(pid: int) -> float:
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


# ---------------------------------------------------------------------------------------------------------------------
# In the process that runs cases.


def _work(seed: int, first: int, end: int | None, library: Path) -> None:
    """Runs cases; a line of JSON before each, and one after."""
    torch.set_num_threads(1)  # maps are small
    index = first
    while end is None or index < end:
        case = draw_case(seed, index)
        about = {"case": index, "kind": case.kind, "expected": case.expected, "description": str(case)}
        print(json.dumps(about), flush=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
        result = _try(case, library, with_portable=index % PORTABLE_SHARE == 0)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
        if grown > MOST_BYTES_MORE:
            result["problems"].append(f"takes {grown / 2**30:.1f} GB of memory")
        print(json.dumps(about | result), flush=True)
        index += 1


def _try(case: Case, library: Path, *, with_portable: bool) -> dict[str, Any]:
    try:
        outputs = run_case(case, library)
    except Exception as error:  # whatever ONNX Runtime makes of the operator's status
        return {"problems": _problems_of_error(case, str(error))}
    if case.expected == ERROR:
        return {"problems": ["no error"]}
    if case.expected == EITHER and any(array.nbytes == 0 for array in outputs.values()):
        return {"problems": []}
    verdict = compare(case, outputs)
    problems = list(verdict.problems)
    has_portable = with_portable and case.kind == "ordinary"
    if has_portable and not problems:
        problems += _compare_portable(case, outputs)
    return {"problems": problems, "rows": verdict.rows, "left_out": verdict.left_out, "portable": int(has_portable)}


def _problems_of_error(case: Case, message: str) -> list[str]:
    problems = []
    if case.expected == ANSWER:
        problems.append(f"an error: {message[-1000:]}")
    if "bad_alloc" in message or "out of memory" in message or "Failed to allocate" in message:
        problems.append(f"asks for memory before it looks: {message[-1000:]}")
    said = "Attention" in message or "Invalid rank" in message or "Type Error" in message or "type" in message
    if not said:
        problems.append(f"an error that doesn't say whose: {message[-1000:]}")
    return problems


def run_case(case: Case, library: Path | None) -> dict[str, Array]:
    """Outputs of a case in ONNX Runtime, with a native library, or by the portable function."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        _model(case, portable=library is None), options, providers=["CPUExecutionProvider"]
    )
    outputs = _output_arrays(case) if case.expected != EITHER else {}
    inputs = {name: np.ascontiguousarray(array) for name, array in case.inputs.items()}
    if case.overlap is not None:
        _share_memory(case, inputs, outputs)
    elif case.binding == IN_PLACE:
        for name in outputs:
            if name != "output":
                past = name.replace("present", "past")
                inputs[name] = outputs[name] = inputs[past].copy()
                inputs[past] = inputs.pop(name)
    binding = session.io_binding()
    values = {name: _ort_value(array, _kind(case, name)) for name, array in inputs.items()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    is_bound = case.binding in (BOUND, IN_PLACE)
    for name in output_names(case):
        past = name.replace("present", "past")
        if is_bound and past in inputs and inputs[past] is outputs[name]:
            binding.bind_ortvalue_output(name, values[past])
        elif is_bound:
            binding.bind_ortvalue_output(name, _ort_value(outputs[name], _kind(case, name)))
        else:
            binding.bind_output(name)
    session.run_with_iobinding(binding)
    if is_bound:
        return outputs
    found = zip(output_names(case), binding.get_outputs(), strict=True)
    return {name: _array(value, _kind(case, name), case) for name, value in found}


def output_names(case: Case) -> list[str]:
    """In the operator's order."""
    sinks = ["present_sink_scores"] if case.operator == schema.CALIBRATED else []
    return ["output", "present_key", "present_value", *sinks]


def _kind(case: Case, name: str) -> int:
    if name == "attention_mask":
        return TensorProto.INT64
    return TensorProto.FLOAT if name.endswith(("sink_scores", "calibration")) else STORAGE[case.storage][0]


def _model(case: Case, *, portable: bool) -> bytes:
    node = helper.make_node(
        case.operator, list(case.inputs), output_names(case), domain=schema.DOMAIN, **case.attributes
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, _kind(case, name), None) for name in case.inputs],
        [helper.make_tensor_value_info(name, _kind(case, name), None) for name in output_names(case)],
    )
    opsets = [helper.make_opsetid("", functions.OPSET), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    own = [functions.function_body(case.operator)] if portable else []
    return helper.make_model(graph, opset_imports=opsets, functions=own, ir_version=10).SerializeToString()


def _output_arrays(case: Case) -> dict[str, Array]:
    """Memory for the outputs of a case with an answer: garbage."""
    if case.binding == FED:
        return {}
    return {
        name: np.full(shape, 77, np.float32 if name.endswith("sink_scores") else STORAGE[case.storage][1])
        for name, shape in output_shapes(case).items()
    }


def _share_memory(case: Case, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
    """Moves an output, and what it overlaps with, to the same memory."""
    overlap = case.overlap
    assert overlap is not None
    owner = inputs if overlap.with_name in inputs else outputs
    other, output = owner[overlap.with_name], outputs[overlap.output]
    begin = max(0, -overlap.offset_bytes)
    memory = np.zeros(begin + other.nbytes + abs(overlap.offset_bytes) + output.nbytes + 64, np.uint8)
    skip = -memory.ctypes.data % 64 + (-begin % 8)
    memory = np.zeros(memory.nbytes + 128, np.uint8)[skip:]

    def view(like: Array, offset: int) -> Array:
        return memory[offset : offset + like.nbytes].view(like.dtype).reshape(like.shape)

    moved = view(other, begin)
    outputs[overlap.output] = view(output, begin + overlap.offset_bytes)
    outputs[overlap.output][...] = output
    moved[...] = other
    owner[overlap.with_name] = moved


def _ort_value(array: Array, kind: int) -> onnxruntime.OrtValue:
    """Over the array's own memory."""
    if kind == TensorProto.BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(value: onnxruntime.OrtValue, kind: int, case: Case) -> Array:
    """A copy of a tensor of the runtime's."""
    if kind != TensorProto.BFLOAT16:
        return value.numpy()
    shape = tuple(value.shape())
    bits = np.empty(shape, np.uint16)
    if bits.size > 0:
        ctypes.memmove(bits.ctypes.data, value.data_ptr(), bits.nbytes)
    return bits.view(STORAGE[case.storage][1])


def _compare_portable(case: Case, outputs: dict[str, Array]) -> list[str]:
    """What the portable function says otherwise."""
    try:
        expected = run_case(replace(case, binding=FED, overlap=None), None)
    except Exception as error:
        return [f"the portable function fails: {str(error)[-1000:]}"]
    verdict = compare(case, expected)
    return [f"the portable function: {problem}" for problem in verdict.problems]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all cases (default: %(default)s)")
    parser.add_argument("--library", type=Path, help="the native library (default: that of this installation)")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--end", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        _work(arguments.seed, arguments.case, arguments.end, arguments.library)
        return 0
    only = {} if arguments.case is None else {"first": arguments.case, "count": 1}
    report = fuzz_operator(arguments.seed, arguments.seconds, library=arguments.library, **only)
    print(report)
    return 1 if report.findings else 0


if __name__ == "__main__":
    raise SystemExit(main())
