"""Files that tests of grafts share."""

from __future__ import annotations

from pathlib import Path

import pytest
from foreign_models import Decoder


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return Decoder().save(tmp_path / "in.onnx")


@pytest.fixture
def external(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return Decoder().save(tmp_path / "in" / "model.onnx", external=True)
