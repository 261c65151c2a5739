"""Jobs that are killed and done again give what they give undisturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "tools" / "kill_jobs.py"


@pytest.mark.parametrize(
    ("job", "times"),
    [
        ("graft", 1),
        *(pytest.param(job, 10, marks=pytest.mark.slow) for job in ("export", "graft", "search", "conversion")),
    ],
)
def test_killed_jobs(job: str, times: int) -> None:
    command = [sys.executable, str(PROGRAM), "--job", job, "--times", str(times)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"of {times} times, wrong 0 times" in result.stdout
