"""The check of a GPU: its cases are right, what it judges it judges, and it survives what it checks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import gpu_model_step
import gpu_parity
import gpu_steps
import numpy as np
import pytest
from gpu_cases import LAYOUTS, Case, all_cases, draw
from gpu_definition import true_calls
from gpu_parity import check_case, judge, run_case
from gpu_programs import FAILED, PASSED, SKIPPED, Check, Outcome
from on_device import DTYPES, DeviceTensor, make_session

from act_export.errors import SessionError
from act_export.ops.library import library_path
from act_export.runtime.device import Device

TOOLS = Path(__file__).parent.parent.parent / "tools"
SAFE_MARGIN = 2e-5  # of a sink score from the threshold: float32 sums differ by less
CASES = all_cases()
LONG = [case for case in CASES if not case.small and case.dtype == "float32"]
SHORT = [case for case in CASES if case.small]
ONE = Case("one", (12, 1), head_size=8, heads=4, kv_heads=2, padding="left", garbage=True)


def run_tool(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


# ---------------------------------------------------------------------------------------------------------------------
# Cases.


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_short_cases_are_right_on_the_cpu(case):
    finding = check_case(case, library_path(), Device())
    assert finding.passed, finding.message


@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_cases_are_right_on_the_cpu(case):
    finding = check_case(case, library_path(), Device())
    assert finding.passed, finding.message


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_no_case_hangs_on_rounding(case):
    for variant in range(1 + case.graph):
        truths = true_calls(case, draw(case, variant))
        assert min(truth.margin for truth in truths) > SAFE_MARGIN


def test_cases_are_what_kernels_treat_differently():
    names = list(map(str, CASES))
    assert len(set(names)) == len(names)
    for dtype in DTYPES:
        of_type = [case for case in CASES if case.dtype == dtype]
        assert {case.head_size for case in of_type} >= {64, 96, 128, 256}
        assert {case.layout for case in of_type} == set(LAYOUTS)
        assert {case.padding for case in of_type} >= {"none", "left", "right", "holes", "ragged"}
        for wanted in ("garbage", "graph", "softcap"):
            assert any(getattr(case, wanted) for case in of_type)
        assert any(case.sliding_window > 0 for case in of_type)
        assert any(not case.calibrated_heads for case in of_type)
        assert max(case.heads // case.kv_heads for case in of_type) == 16


# ---------------------------------------------------------------------------------------------------------------------
# Judgement.


@cache
def outcome_of(dtype):
    case = replace(ONE, dtype=dtype)
    tokens = draw(case)
    return case, tokens, run_case(case, tokens, library_path(), Device()), true_calls(case, tokens)


def change(call, name, place, value):
    array = getattr(call, name).copy()
    array[place] = value(array[place]) if callable(value) else value
    return replace(call, **{name: array})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "place", "value", "message"),
    [
        ("output", (0, 0, 3), lambda x: x + 0.5, "output differs by"),
        ("output", (0, 0, 3), np.nan, "output differs by inf"),
        ("present_sink_scores", (1, 1, 12, 0), lambda x: x + 1e-4, "column sums differ by"),
        ("present_key", (1, 0, 12, 7), lambda x: x + 0.01, "cache isn't"),
        ("present_value", (0, 1, 12, 0), lambda x: x + 0.01, "cache isn't"),
        ("present_value", (0, 1, 14, 0), 0.0, "cache isn't"),
    ],
)
def test_what_is_wrong_is_found(dtype, name, place, value, message):
    case, tokens, calls, truths = outcome_of(dtype)
    assert judge(case, tokens, calls, truths).passed
    finding = judge(case, tokens, [calls[0], change(calls[1], name, place, value)], truths)
    assert not finding.passed
    assert message in finding.message


def test_small_errors_are_found_where_the_type_is_precise():
    case, tokens, calls, truths = outcome_of("float32")
    finding = judge(case, tokens, [calls[0], change(calls[1], "output", (0, 0, 3), lambda x: x + 1e-4)], truths)
    assert not finding.passed


def test_rows_of_padding_only_have_to_be_finite():
    case, tokens, calls, truths = outcome_of("float32")
    assert tokens.mask[0, 0] == 0
    assert judge(case, tokens, [change(calls[0], "output", (0, 0), 1.0), calls[1]], truths).passed
    finding = judge(case, tokens, [change(calls[0], "output", (0, 0), np.inf), calls[1]], truths)
    assert finding.message == "output isn't finite everywhere"


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": (0.5,)},
        {"threshold": 0.5},
        {"calibrated_heads": (0, 2)},
        {"sliding_window": 5},
        {"softcap": 3.0},
        {"threshold_mode": "relative"},
    ],
)
def test_another_operator_is_found(changes):
    case, tokens, _, truths = outcome_of("float32")
    calls = run_case(replace(case, **changes), tokens, library_path(), Device())
    assert not judge(case, tokens, calls, truths).passed


def test_a_replay_with_old_tokens_is_found(monkeypatch):
    case = replace(ONE, calls=(1,), past=20, graph=True)
    assert check_case(case, library_path(), Device()).passed
    refill = gpu_parity.refill
    monkeypatch.setattr(gpu_parity, "refill", lambda tensors, arrays: "query" in arrays or refill(tensors, arrays))
    assert not check_case(case, library_path(), Device()).passed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 4)])
def test_tensors_hold_what_was_written(dtype, shape):
    from on_device import storage

    array = np.arange(np.prod(shape)).reshape(shape).astype(storage(dtype))
    tensor = DeviceTensor(np.zeros_like(array), Device())
    tensor.write(array)
    np.testing.assert_array_equal(tensor.read(), array)
    with pytest.raises(ValueError, match="isn't"):
        tensor.write(array.astype(np.float64))


def test_a_library_without_kernels_is_refused(monkeypatch):
    import on_device

    monkeypatch.setattr(on_device, "prepare_cuda", lambda *_, **__: None)
    with pytest.raises(SessionError, match="has no CUDA kernels"):
        make_session(gpu_parity.make_model(ONE), library_path(), Device("cuda"))
    on_device._prepare_cuda.cache_clear()


def test_parity_ends_after_an_error(tmp_path):
    path = tmp_path / "found.jsonl"
    result = run_tool(TOOLS / "gpu_parity.py", "--cases", "chunks", "--device", "cuda", "--json", path)
    assert result.returncode == gpu_parity.ERROR
    (finding,) = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    assert finding["case"] == "chunks, float32"
    assert not finding["passed"]


# ---------------------------------------------------------------------------------------------------------------------
# The steps.


def make_check(tmp_path, **changes):
    return Check(**{"out": tmp_path, "device": "cpu", "library": library_path(), **changes})


def test_everything_on_the_cpu(tmp_path):
    result = run_tool(TOOLS / "check_gpu", "--device", "cpu", "--out", tmp_path, "--cases", "chunks")
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    found = {row["step"]: row["result"] for row in results["rows"]}
    assert found == {
        "packages": PASSED,
        "library": PASSED,
        **{f"parity, {dtype}": PASSED for dtype in DTYPES},
        **dict.fromkeys(("memcheck", "racecheck", "operator: prompts", "operator: decode"), SKIPPED),
        **dict.fromkeys(("operator: decode, CUDA graph", "model"), SKIPPED),
    }
    assert len(results["measurements"]["parity"]) == 3
    assert "| parity, bfloat16 | passed | 1 of 1 cases right" in result.stdout


def test_without_a_gpu_it_says_so(without_gpu, tmp_path):
    result = run_tool(TOOLS / "check_gpu", "--out", tmp_path, ACT_LIBRARY=str(library_path()))
    assert result.returncode == 1
    assert "| GPU | failed |" in result.stdout
    assert f"| library | failed | {library_path()}: no kernels for GPUs |" in result.stdout
    assert "parity" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--library", "nowhere.so"), "there is no library nowhere.so"),
        (("--layers", "33"), "--layers 33; give 3 to 32"),
        (("--only", "everything"), "invalid choice"),
    ],
)
def test_refuses(tmp_path, arguments, message):
    result = run_tool(TOOLS / "check_gpu", "--out", tmp_path, *arguments)
    assert result.returncode == 2
    assert message in result.stderr


class ScriptedRuns:
    """Stands for gpu_parity.py: each run finishes so many cases and ends so."""

    def __init__(self, monkeypatch, names, runs):
        self.names, self.runs, self.starts = names, list(runs), []
        monkeypatch.setattr(gpu_steps, "run", self)

    def __call__(self, name, command, check, limit_s=None, path=""):
        if "--list" in command:
            return Outcome(0, 1.0, "\n".join(self.names) + "\n", "")
        start = command[command.index("--from-case") + 1]
        self.starts.append(start)
        finished, code = self.runs.pop(0)
        first = self.names.index(start)
        with Path(command[command.index("--json") + 1]).open("a", encoding="utf-8") as file:
            for done in self.names[first : first + finished]:
                row = {"case": done, "passed": True, "error": 1.0, "allowed": 2.0, "sums_error": 0.0, "message": ""}
                file.write(json.dumps(row) + "\n")
        return Outcome(code, 1.0, "", "last words")


def test_parity_goes_on_after_crash_error_and_time_limit(tmp_path, monkeypatch):
    names = [f"{letter}, float32" for letter in "abcdef"]
    scripted = ScriptedRuns(monkeypatch, names, [(1, -signal.SIGSEGV), (1, gpu_steps.ERROR), (0, None), (2, 0)])
    findings = gpu_steps.parity_of("float32", make_check(tmp_path))
    assert [finding["case"] for finding in findings] == names
    assert [finding["passed"] for finding in findings] == [True, False, True, False, True, True]
    assert scripted.starts == ["a, float32", "c, float32", "d, float32", "e, float32"]
    assert findings[1]["message"] == "killed by SIGSEGV: last words"
    assert "time limit" in findings[3]["message"]


def test_parity_gives_up_after_many_crashes(tmp_path, monkeypatch):
    names = [f"{number}, float32" for number in range(20)]
    ScriptedRuns(monkeypatch, names, [(0, 1)] * gpu_steps.MOST_RESTARTS)
    check = make_check(tmp_path, dtypes=["float32"])
    gpu_steps.check_parity(check)
    assert check.rows[0].result == FAILED
    assert check.rows[0].detail.startswith("0 of 20 cases right")
    assert len([row for row in check.rows if row.step.startswith("case: ")]) == 20
    assert "not run" in check.rows[-1].detail


def test_a_program_is_ended_at_its_time_limit_with_its_children(tmp_path):
    script = (
        "import subprocess, sys, time; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True); time.sleep(60)"
    )
    outcome = gpu_steps.run("endless", [sys.executable, "-c", script], make_check(tmp_path), limit_s=2)
    assert outcome.code is None
    assert outcome.failure.startswith("stopped after its time limit of 2 s")
    assert is_gone(int(outcome.output))


def is_gone(process):
    """Whether a process has ended, or does so within five seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text(encoding="ascii").split()[2] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_crashes_are_told(tmp_path):
    script = "import os, sys; print('the last words', file=sys.stderr, flush=True); os.kill(os.getpid(), 11)"
    outcome = gpu_steps.run("crash", [sys.executable, "-c", script], make_check(tmp_path))
    assert outcome.failure == "killed by SIGSEGV: the last words"


@pytest.mark.parametrize(("code", "result"), [(0, PASSED), (99, FAILED), (1, FAILED)])
def test_sanitizer(tmp_path, monkeypatch, code, result):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\necho $@\necho '========= ERROR SUMMARY: 7 errors'\nexit {code}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = make_check(tmp_path, device="cuda", cases=["chunks"])
    gpu_steps.check_sanitizer(check)
    assert [(row.step, row.result) for row in check.rows] == [("memcheck", result), ("racecheck", result)]
    assert check.rows[0].detail.startswith("ERROR SUMMARY: 7 errors")
    said = (tmp_path / "racecheck.out").read_text(encoding="utf-8")
    assert said.startswith("--tool racecheck --error-exitcode 99")
    assert "--small" in said


def test_a_missing_sanitizer_is_no_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_steps, "find_sanitizer", lambda: None)
    check = make_check(tmp_path, device="cuda")
    gpu_steps.check_sanitizer(check)
    assert {row.result for row in check.rows} == {"not found"}


@pytest.mark.parametrize("code", [0, 1])
def test_benchmarks_of_the_operator(tmp_path, monkeypatch, code):
    summary = {"decode": {"calibrated / gqa": {"geometric_mean": 0.9, "worst": 1.25}}}
    workloads = [{"failures": {"gqa": "no kernel"}}, {"skipped": "too large"}]

    def run(name, command, check, limit_s=None, path=""):
        report = json.dumps({"summary": summary, "workloads": workloads})
        Path(command[command.index("--json") + 1]).write_text(report, encoding="utf-8")
        return Outcome(code, 1.0, "| a table |\n", "last words")

    monkeypatch.setattr(gpu_steps, "run", run)
    check = make_check(tmp_path, device="cuda")
    gpu_steps.bench_operator(check)
    assert [row.step for row in check.rows] == [
        "operator: prompts",
        "operator: decode",
        "operator: decode, CUDA graph",
    ]
    ratios = "calibrated / gqa 0.90 (worst 1.25)"
    if code:
        assert check.rows[0].detail == f"exit code 1: last words; measured before: {ratios}"
        assert {row.result for row in check.rows} == {FAILED}
    else:
        assert check.rows[0].detail == f"{ratios}; 1 of 2 skipped for lack of memory; gqa fails: no kernel"
        assert check.markdown == ["| a table |"] * 3


# ---------------------------------------------------------------------------------------------------------------------
# The model.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no"}, "left out"),
        ({"device": "cpu"}, "needs a GPU"),
        ({"environment": {}}, "this Python lacks transformers"),
        ({"layers": 32, "gpu": 2**34}, "the GPU has 17 GB free, and 32 layers take 54"),
    ],
)
def test_when_the_model_is_left_out(tmp_path, changes, message):
    changes = dict(changes)
    gpu = {"memory_bytes": changes.pop("gpu", 2**40)}
    environment = {"model_packages": dict.fromkeys(gpu_model_step.NEEDED, "1"), "gpu": gpu}
    check = make_check(tmp_path, **{"device": "cuda", "environment": environment, **changes})
    gpu_model_step.bench_model(check)
    (row,) = check.rows
    assert row.result == SKIPPED
    assert message in row.detail


def test_recipe_of_fewer_layers(tmp_path):
    from act_export.calibration.file import Calibration

    assert gpu_model_step.recipe(make_check(tmp_path)) == "llama-2-7b-chat-classification"
    calibration = Calibration.load(gpu_model_step.recipe(make_check(tmp_path, layers=4)))
    assert calibration.heads == {2: (2, 8, 12, 13, 16, 17, 20, 25), 3: (0, 1, 2, 10, 24, 28)}


def test_the_package_takes_the_library_that_is_checked(tmp_path):
    library = tmp_path / "mine.so"
    library.write_bytes(b"")
    folder = gpu_model_step.package_folder(make_check(tmp_path, library=library))
    outside_of_an_installation = (
        "import sys; "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f) and 'ScikitBuild' not in str(f)]; "
    )
    command = [sys.executable, "-c", outside_of_an_installation + gpu_model_step.SAY_LIBRARY]
    outcome = gpu_steps.run("library", command, make_check(tmp_path), path=folder)
    assert outcome.output.strip() == str(library), outcome.failure
