"""Exports that tests of commands share."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_runs import HEADS, run


@pytest.fixture
def heads_file(tmp_path) -> Path:
    path = tmp_path / "heads.json"
    path.write_text(HEADS)
    return path


@pytest.fixture(scope="session")
def exported(checkpoint_folder, tmp_path_factory) -> Path:
    """A folder export with calibrated heads, made on the command line."""
    base = tmp_path_factory.mktemp("out")
    (base / "heads.json").write_text(HEADS)
    result = run(checkpoint_folder, "--out", base / "out", "--calibration", base / "heads.json", "--threshold", "0.06")
    assert result.exit_code == 0, result.output
    return base / "out"
