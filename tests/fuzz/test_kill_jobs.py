"""Jobs that are killed and done again give what they give undisturbed."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("kill_jobs.py")


@pytest.mark.slow
@pytest.mark.parametrize("job", ["export", "graft", "search", "conversion"])
def test_killed_jobs(job: str) -> None:
    command = [sys.executable, str(PROGRAM), "--job", job, "--times", "10"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "of 10 times, wrong 0 times" in result.stdout


@pytest.mark.parametrize(
    ("found", "is_wrong"),
    [
        ({"model.onnx": "1", "data": "1"}, False),
        ({"model.onnx": "2", "data": "2"}, False),
        ({"data": "2"}, False),
        ({}, False),
        ({"model.onnx": "2", "data": "1"}, True),
        ({"model.onnx": "1"}, True),
        ({"model.onnx": "3", "data": "2"}, True),
    ],
)
def test_what_a_kill_may_leave(found: dict[str, str], is_wrong: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")  # it sets them
    fault_of = runpy.run_path(str(PROGRAM))["fault_of"]
    older, new = ({"model.onnx": digest, "data": digest} for digest in "12")
    assert bool(fault_of(found, older, new)) == is_wrong
