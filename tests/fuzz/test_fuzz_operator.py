"""The fuzzer of the operators finds nothing here, and notices what goes wrong."""

from __future__ import annotations

import sys
from dataclasses import replace

import fuzz_operator
import numpy as np
import pytest
from fuzz_operator import fuzz_operator as fuzz
from operator_answers import compare
from operator_cases import ANSWER, ERROR, draw_case

from act_export.ops.library import library_path

pytestmark = pytest.mark.in_turn(2)

# Stands in for the process that runs cases: says that it begins one, and goes wrong. Arguments as there.
BROKEN = """
import json, os, sys, time
first = int(sys.argv[sys.argv.index("--case") + 1])
for case in range(first, int(sys.argv[sys.argv.index("--end") + 1])):
    about = {{"case": case, "kind": "ordinary", "expected": "answer", "description": "this one"}}
    print(json.dumps(about), flush=True)
    if case == 5:
        {what}
    print(json.dumps(about | {{"problems": []}}), flush=True)
"""


def test_a_case_is_the_same_each_time():
    for index in range(30):
        one, again = draw_case(3, index), draw_case(3, index)
        assert str(one) == str(again)
        for name, array in one.inputs.items():
            np.testing.assert_array_equal(array.astype(np.float64), again.inputs[name].astype(np.float64))


def test_there_are_cases_of_every_sort():
    cases = [draw_case(0, index) for index in range(150)]
    assert {case.kind for case in cases} == {
        "ordinary",
        "extreme",
        "wrong attribute",
        "wrong strength",
        "wrong shape",
        "overlap",
        "empty",
    }
    assert {case.expected for case in cases} >= {ANSWER, ERROR}


def test_the_library_withstands_some():
    said: list[str] = []
    report = fuzz(11, 120, count=60, say=said.append)
    assert not report.findings, said
    assert report.tried.total() == 60
    assert report.rows > 1000
    assert report.portable > 0


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("os.abort()", "the process ended with -6"),
        ("sys.exit(0)", "the process ended with 0"),
        ("time.sleep(90)", "no end after 12 s"),
        ("while True: pass", "no end after 1 s of work"),
        ("hog = bytearray(1 << 28); time.sleep(90)", "takes more than 0.125 GB of memory"),
    ],
)
def test_a_process_that_goes_wrong_is_noticed_and_started_again(what, problem, tmp_path, monkeypatch):
    script = tmp_path / "broken.py"
    script.write_text(BROKEN.format(what=what), encoding="utf-8")
    monkeypatch.setattr(fuzz_operator, "__file__", str(script))
    monkeypatch.setattr(fuzz_operator, "MOST_SECONDS", 1.0)
    monkeypatch.setattr(fuzz_operator, "MOST_SECONDS_WAITED", 12.0)
    monkeypatch.setattr(fuzz_operator, "MOST_BYTES", 1 << 27)
    said: list[str] = []
    report = fuzz(7, 60, count=9, say=said.append)
    assert [(finding.case, finding.problem) for finding in report.findings] == [(5, problem)]
    assert said == [f"--seed 7 --case 5: {problem}\n    this one"]
    assert report.tried.total() == 9


def test_wrong_answers_are_noticed():
    case = next(
        case
        for case in (draw_case(1, index) for index in range(100))
        if case.kind == "ordinary" and "past_sink_scores" in case.inputs and case.inputs["query"].shape[1] > 1
    )
    outputs = fuzz_operator.run_case(case, library_path())
    assert not compare(case, outputs).problems
    for name, array in outputs.items():
        changed = array.copy()
        changed[(0,) * changed.ndim] = 3 if name == "present_sink_scores" else np.nan
        assert name in " ".join(compare(case, outputs | {name: changed}).problems)
    assert compare(replace(case, binding="bound"), outputs).rows > 0


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz_operator.py", "--seed", "4", "--case", "2", "--seconds", "60"])
    assert fuzz_operator.main() == 0
    assert capsys.readouterr().out.startswith("1 cases (")
