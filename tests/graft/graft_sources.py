"""Models to graft, changed a little."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from foreign_models import CALIBRATION, hashes

from act_export.errors import ActExportError
from act_export.graft.job import graft


def refused(
    place: Path, out: Path, reason: str, kind: type[ActExportError] = ActExportError, **options: object
) -> None:
    """By its reason; nothing below the temporary folder is another than it was."""
    root = out.parent
    before = hashes(root)
    with pytest.raises(kind, match=reason):
        graft(place, options.pop("calibration", CALIBRATION), out, **options)
    assert hashes(root) == before


def edit(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    model = onnx.load(path, load_external_data=False)
    change(model)
    path.write_bytes(model.SerializeToString())
