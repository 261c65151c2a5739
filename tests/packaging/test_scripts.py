"""tools/setup refuses what it can't work with in one line; the scripts can be run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def clone(tmp_path) -> Path:
    """As much of a checkout as the set-up reads before it installs anything."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "setup", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "act_export" / "ops", tmp_path / "act_export" / "ops")
    return tmp_path


def test_old_python_is_refused_in_one_line(clone):
    old = clone / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.2" || exit 1\n', encoding="utf-8")
    old.chmod(0o755)
    result = _setup(clone, PYTHON=str(old))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: Python 3.11 or newer")
    assert "Python 3.9.2" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (clone / ".venv").exists()


def test_missing_compiler_is_said_in_one_line(clone):
    result = _setup(clone, CXX="no-such-compiler")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: a C++17 compiler is needed (tried: no-such-compiler)")
    assert result.stderr.count("\n") == 1
    assert not (clone / ".venv").exists()


@pytest.mark.parametrize("script", ["tools/setup", "tools/demo", "tools/test", ".ci/run"])
def test_scripts_are_valid_bash_and_can_be_run(script):
    path = ROOT / script
    if not path.exists():
        pytest.skip(f"{script} isn't part of a source distribution")
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)


def _setup(clone: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run([clone / "tools" / "setup"], env=environment, capture_output=True, text=True)
