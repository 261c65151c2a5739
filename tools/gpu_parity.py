#!/usr/bin/env python3
"""The operator in ONNX Runtime against its definition, act_export.calibration.reference in float64, on the cases of
gpu_cases.py.

    tools/gpu_parity.py --library libact_ops.so --device cuda [--dtypes TYPE ...] [--cases WORD ...] [--small] ...

Allowed in float32: 1e-5, absolute for values below 1 and relative above. In half types: twice the error that PyTorch
makes in the same type (calibrated attention map in float32, rounded, times the values), or half the spacing of the type
at the largest output, where PyTorch happens to be better than its output can be stored. Column sums are float32 in all
types. The cache has to be right to the last bit, what lies beyond the tokens included.

A case that raises an error ends the run, since a GPU is of no use to a process after some errors. Results are written
after each case, one JSON object a line. Exit code: 0 if all are right, 1 if one is not, 3 after an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cases import COPIED, SHARED, Case, Tokens, all_cases, draw
from gpu_definition import Truth, true_calls
from on_device import DTYPES, Array, DeviceTensor, make_session, storage
from onnx import helper

from act_export.ops import schema
from act_export.ops.library import library_path
from act_export.runtime.device import Device

TOLERANCE = 1e-5
TIMES_PYTORCH = 2.0
NOT_RIGHT, ERROR = 1, 3  # exit codes


@dataclass(frozen=True)
class Call:
    """Outputs of one call; present ones have the length of their buffers."""

    output: Array
    present_key: Array
    present_value: Array
    present_sink_scores: Array


@dataclass(frozen=True)
class Finding:
    """How a case went.

    Attributes:
        case: Name and type.
        passed: Whether all is within what is allowed.
        error: Largest, of the output, in the measure that `allowed` is in.
        allowed: Of the error.
        sums_error: Largest, of the column sums.
        cache_exact: Whether keys and values are right to the last bit.
        message: What is wrong; empty if nothing is.
    """

    case: str
    passed: bool
    error: float
    allowed: float
    sums_error: float
    cache_exact: bool
    message: str = ""


def main() -> int:
    arguments = parse_arguments()
    cases = [case for case in all_cases() if chosen(case, arguments)]
    if arguments.list:
        print("\n".join(map(str, cases)))
        return 0
    if not cases:
        print("error: no case has all these words in its name", file=sys.stderr)
        return 2
    failed = 0
    for case in cases:
        print(f"{case} ... ", end="", flush=True)
        try:
            finding = check_case(case, arguments.library, arguments.device)
        except Exception as error:  # whatever it is belongs into the report
            finding = Finding(str(case), False, np.inf, 0.0, np.inf, False, f"{type(error).__name__}: {error}")
            write(finding, arguments.json)
            print(finding.message, flush=True)
            return ERROR
        write(finding, arguments.json)
        print("right" if finding.passed else finding.message, flush=True)
        failed += not finding.passed
    print(f"{len(cases) - failed} of {len(cases)} cases are right")
    return NOT_RIGHT if failed else 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--library", type=Path, help="native library (default: the installed one)")
    parser.add_argument("--device", type=Device.parse, default=Device(), help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="(default: all)")
    parser.add_argument("--cases", nargs="+", metavar="WORD", default=[], help="only those with all words in the name")
    parser.add_argument("--small", action="store_true", help="only short cases")
    parser.add_argument("--from-case", metavar="NAME", help="leave out the cases before this one")
    parser.add_argument("--list", action="store_true", help="only print the names of the cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a line for each case")
    arguments = parser.parse_args()
    if not arguments.list:
        arguments.library = arguments.library or library_path()
    if arguments.from_case is not None and arguments.from_case not in map(str, all_cases()):
        parser.error(f"--from-case {arguments.from_case}: there is no such case")
    return arguments


def chosen(case: Case, arguments: argparse.Namespace) -> bool:
    """Whether the command line asks for a case."""
    names = list(map(str, all_cases()))
    if arguments.from_case is not None and names.index(str(case)) < names.index(arguments.from_case):
        return False
    if case.dtype not in arguments.dtypes:
        return False
    return all(word in str(case) for word in arguments.cases) and (case.small or not arguments.small)


def write(finding: Finding, path: Path | None) -> None:
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(finding)) + "\n")


def check_case(case: Case, library: Path, device: Device) -> Finding:
    """Runs one case and compares it with the definition."""
    runs = [(tokens := draw(case), run_case(case, tokens, library, device))]
    if case.graph:
        other = draw(case, variant=1)
        runs = [(tokens, runs[0][1][:-1]), (other, runs[0][1][-1:])]
    findings = [judge(case, tokens, calls, true_calls(case, tokens)) for tokens, calls in runs]
    return max(findings, key=lambda found: (not found.passed, found.error / max(found.allowed, 1e-300)))


# ----------------------------------------------------------------------------------------------------------------------
# In ONNX Runtime.


def run_case(case: Case, tokens: Tokens, library: Path, device: Device) -> list[Call]:
    """The calls of a case; where it has a graph, a last one that replays it with the tokens of variant 1."""
    session = make_session(make_model(case), library, device, cuda_graph=case.graph)
    calls = []
    state = past_state(case, tokens)
    buffers = {name: DeviceTensor(array, device) for name, array in state.items()}
    past = case.past
    for sequence in case.calls:
        feeds = call_feeds(case, tokens, past, sequence)
        inputs = {name: DeviceTensor(array, device) for name, array in feeds.items()}
        presents = buffers
        if case.layout != SHARED:
            length = past + sequence if case.layout == COPIED else case.capacity
            presents = {name: DeviceTensor(empty_state(t, length), device) for name, t in buffers.items()}
        output = DeviceTensor(np.zeros(feeds["query"].shape, storage(case.dtype)), device)
        binding = session.io_binding()
        for name, tensor in {**inputs, **buffers}.items():
            tensor.bind_input(binding, name)
        output.bind_output(binding, "output")
        for name, tensor in presents.items():
            tensor.bind_output(binding, name.replace("past", "present"))
        session.run_with_iobinding(binding)
        if case.graph:
            # Captured by now: what that run left in the state is taken back.
            refill(buffers, past_state(case, tokens))
            session.run_with_iobinding(binding)
        calls.append(read_call(case, output, presents))
        if case.graph:
            other = draw(case, variant=1)
            refill(buffers, past_state(case, other))
            refill(inputs, call_feeds(case, other, past, sequence))
            session.run_with_iobinding(binding)
            calls.append(read_call(case, output, presents))
        buffers = presents
        past += sequence
    return calls


def refill(tensors: dict[str, DeviceTensor], arrays: dict[str, Array]) -> None:
    for name, tensor in tensors.items():
        tensor.write(arrays[name])


def read_call(case: Case, output: DeviceTensor, presents: dict[str, DeviceTensor]) -> Call:
    sums = presents["past_sink_scores"].read() if case.calibrated_heads else np.zeros((case.batch, 0, 0, 1), np.float32)
    return Call(output.read(), presents["past_key"].read(), presents["past_value"].read(), sums)


def empty_state(past: DeviceTensor, length: int) -> Array:
    """A buffer for the present, filled with what nothing may rely on."""
    return np.full((*past.shape[:2], length, past.shape[3]), 7, past.dtype)


def past_state(case: Case, tokens: Tokens) -> dict[str, Array]:
    """Caches before the first call, by the names of the node's inputs."""
    length = case.past if case.layout == COPIED else case.capacity
    unwritten = np.nan if case.garbage else 0

    def cached(array: Array) -> Array:
        buffer = np.full((case.batch, array.shape[1], length, array.shape[3]), unwritten, array.dtype)
        buffer[:, :, : case.past] = array[:, :, : case.past]
        return buffer

    state = {
        "past_key": cached(with_garbage(case, tokens, tokens.key).swapaxes(1, 2)),
        "past_value": cached(with_garbage(case, tokens, tokens.value).swapaxes(1, 2)),
    }
    if case.calibrated_heads:
        state["past_sink_scores"] = cached(tokens.past_sums)
    return state


def call_feeds(case: Case, tokens: Tokens, past: int, sequence: int) -> dict[str, Array]:
    """The other inputs of one call."""
    total = past + sequence

    def new(array: Array, first: int) -> Array:
        return np.ascontiguousarray(array[:, first : first + sequence]).reshape(case.batch, sequence, -1)

    return {
        "query": new(tokens.query, past - case.past),
        "key": new(with_garbage(case, tokens, tokens.key), past),
        "value": new(with_garbage(case, tokens, tokens.value), past),
        "attention_mask": np.ascontiguousarray(tokens.mask[:, :total]),
    }


def with_garbage(case: Case, tokens: Tokens, array: Array) -> Array:
    """Keys or values (batch, total, kv_heads, head_size) as the node gets them."""
    return np.where(tokens.mask[:, :, None, None] == 0, array.dtype.type(np.nan), array) if case.garbage else array


def make_model(case: Case) -> bytes:
    """The one node."""
    kind = helper.np_dtype_to_tensor_dtype(storage(case.dtype))
    single = helper.np_dtype_to_tensor_dtype(np.dtype(np.float32))
    inputs = dict.fromkeys(("query", "key", "value", "past_key", "past_value"), kind)
    outputs = dict.fromkeys(("output", "present_key", "present_value"), kind)
    attributes: dict[str, Any] = {
        "num_heads": case.heads,
        "kv_num_heads": case.kv_heads,
        "scale": case.head_size**-0.5,
        "softcap": case.softcap,
        "sliding_window": case.sliding_window,
    }
    if case.calibrated_heads:
        inputs["past_sink_scores"] = single
        outputs["present_sink_scores"] = single
        attributes |= {
            "calibrated_heads": list(case.calibrated_heads),
            "beta": list(case.beta),
            "threshold": case.threshold,
            "threshold_mode": case.threshold_mode,
        }
    inputs["attention_mask"] = helper.np_dtype_to_tensor_dtype(np.dtype(np.int64))
    operator = schema.CALIBRATED if case.calibrated_heads else schema.PLAIN
    node = helper.make_node(operator, list(inputs), list(outputs), domain=schema.DOMAIN, **attributes)

    def describe(types: dict[str, Any]) -> list[Any]:
        return [helper.make_tensor_value_info(name, kind, None) for name, kind in types.items()]

    graph = helper.make_graph([node], "case", describe(inputs), describe(outputs))
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=11).SerializeToString()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The comparison.


def judge(case: Case, tokens: Tokens, calls: list[Call], truths: list[Truth]) -> Finding:
    """Compares all calls of a case."""
    error, allowed, sums_error, exact, finite = 0.0, 0.0, 0.0, True, True
    worst = 0.0
    past = case.past
    for call, truth, sequence in zip(calls, truths, case.calls, strict=True):
        total = past + sequence
        of_call, allowed_of_call = output_error(case, call.output.astype(np.float64), truth)
        if of_call / allowed_of_call >= worst:
            worst, error, allowed = of_call / allowed_of_call, of_call, allowed_of_call
        if case.calibrated_heads:
            found = call.present_sink_scores[:, :, :total, 0].astype(np.float64)
            sums_error = max(sums_error, relative_error(found, truth.column_sums))
        exact &= cache_is_exact(case, tokens, call, total)
        finite &= bool(np.isfinite(call.output.astype(np.float32)).all())
        past = total
    wrong = []
    if not error <= allowed:
        wrong.append(f"output differs by {error:.2g}, allowed {allowed:.2g}")
    if not sums_error <= TOLERANCE:
        wrong.append(f"column sums differ by {sums_error:.2g}, allowed {TOLERANCE:.2g}")
    if not exact:
        wrong.append("cache isn't what was written to it")
    if not finite:
        wrong.append("output isn't finite everywhere")
    return Finding(str(case), not wrong, error, allowed, sums_error, exact, "; ".join(wrong))


def output_error(case: Case, output: Array, truth: Truth) -> tuple[float, float]:
    """Largest error of a real row, and what is allowed."""
    found, expected = output[truth.real_rows], truth.output[truth.real_rows]
    if case.dtype == "float32":
        return relative_error(found, expected), TOLERANCE
    largest = float(np.abs(expected).max(initial=0.0))
    half_spacing = float(np.spacing(storage(case.dtype).type(largest))) / 2
    return absolute_error(found, expected), TIMES_PYTORCH * max(truth.pytorch_error, half_spacing)


def relative_error(found: Array, expected: Array) -> float:
    """Largest difference: absolute for values below 1, relative above; infinite where one isn't a number."""
    return absolute_error(found / (1 + np.abs(expected)), expected / (1 + np.abs(expected)))


def absolute_error(found: Array, expected: Array) -> float:
    difference = np.abs(found - expected)
    return float(np.where(np.isnan(difference), np.inf, difference).max(initial=0.0))


def cache_is_exact(case: Case, tokens: Tokens, call: Call, total: int) -> bool:
    """Keys and values of all tokens so far; in a preallocated cache also that the rest is as it was."""
    for present, array in ((call.present_key, tokens.key), (call.present_value, tokens.value)):
        expected = with_garbage(case, tokens, array)[:, :total].swapaxes(1, 2)
        if not np.array_equal(present[:, :, :total], expected, equal_nan=True):
            return False
        rest = present[:, :, total:].astype(np.float32)
        if case.layout != COPIED and not (np.isnan(rest).all() if case.garbage else (rest == 0).all()):
            return False
    return True


if __name__ == "__main__":
    sys.exit(main())
