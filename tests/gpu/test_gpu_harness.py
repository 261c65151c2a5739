"""What the tests on a GPU judge, they judge; and one of them that breaks the GPU or its process loses no other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import on_device
import pytest
import test_gpu_environment
import torch
from attention_cases import TYPES, Case, draw, judge
from bound_operator import BoundOperator, array_of, make_model
from on_device import DeviceTensor, make_session

from act_export.errors import SessionError
from act_export.ops.library import library_path
from act_export.runtime.cuda_driver import CudaDriver, CudaDriverError
from act_export.runtime.device import Device

HERE = Path(__file__).parent
ONE = Case(sequence=12, past=3, head_size=8, threshold=0.1, in_place=True)


def run(case, inputs):
    return BoundOperator(case, inputs, Device()).run()


@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize(
    ("name", "place", "change", "message"),
    [
        ("output", (0, 5, 3), 0.5, "output: 1 of"),
        ("output", (0, 5, 3), torch.nan, None),
        ("present_sink_scores", (1, 1, 12, 0), 1e-4, "column sums"),
        ("present_key", (1, 0, 12, 7), 0.25, None),
        ("present_value", (0, 1, 12, 0), 0.25, None),
    ],
)
def test_what_is_wrong_is_found(storage, name, place, change, message):
    case = replace(ONE, storage=storage)
    inputs = draw(case)
    found = run(case, inputs)
    judge(case, inputs, found)
    getattr(found, name)[place] += change
    with pytest.raises(AssertionError, match=message):
        judge(case, inputs, found)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": (0.5,)},
        {"beta": (1.0,)},
        {"gamma": (1.2,)},
        {"threshold": 0.9},
        {"each_sequence": True},
        {"calibrated_heads": (0, 2)},
        {"sliding_window": 5},
        {"softcap": 3.0},
        {"threshold_mode": "relative"},
        {"sink_logits": (0.0,)},
    ],
)
def test_another_operator_is_found(changes):
    inputs, other = draw(ONE), replace(ONE, **changes)
    with pytest.raises(AssertionError):
        judge(ONE, inputs, run(other, replace(inputs, calibration=other.calibration)))


def test_what_is_written_beyond_the_tokens_is_found():
    operator = BoundOperator(ONE, draw(ONE), Device())
    key = operator._outputs["present_key"]
    array = key.read()
    array[0, 0, -1, 0] = 0
    key.write(array)
    with pytest.raises(AssertionError, match="present_key is written to beyond"):
        operator.run()


@pytest.mark.parametrize("storage", TYPES)
@pytest.mark.parametrize("shape", [(2, 3), (0, 4)])
def test_tensors_hold_what_was_written(storage, shape):
    array = array_of(torch.ones(shape, dtype=TYPES[storage]))
    tensor = DeviceTensor(array * 0, Device())
    tensor.write(array)
    assert (tensor.read() == array).all()
    with pytest.raises(ValueError, match="isn't"):
        tensor.write(array.astype("float64"))


def test_a_library_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(on_device, "_prepare_cuda", lambda _: None)
    with pytest.raises(SessionError, match="has no CUDA kernels"):
        make_session(make_model(ONE), library_path(), Device("cuda"))


BROKEN = """
import os, time, pytest
pytestmark = pytest.mark.gpu
broken = False
def test_right(): pass
def test_wrong(): assert False
def test_error():
    global broken
    broken = True
    raise RuntimeError("an illegal address")
def test_after_an_error(): assert not broken
def test_crash(): os.abort()
@pytest.mark.timeout(1)
def test_that_hangs(): time.sleep(60)
def test_last(): assert not broken
"""


def test_a_run_goes_on_after_error_crash_and_time_limit(tmp_path):
    (tmp_path / "test_broken.py").write_text(BROKEN, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n", encoding="utf-8")
    plugins = [word for name in ("xdist", "pytest_timeout", "fresh_process") for word in ("-p", name)]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, "-n", "1", "--timeout-method", "thread"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(HERE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
    )
    failed = {line.split()[1].partition("::")[2] for line in result.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_wrong", "test_error", "test_crash", "test_that_hangs"}, result.stdout
    assert "an illegal address" in result.stdout
    assert "3 passed" in result.stdout


def test_without_a_gpu(request):
    """Tests say why they are skipped, and one fails."""
    try:
        CudaDriver()
    except CudaDriverError as error:
        reason = re.escape(str(error))
    else:
        pytest.skip("there is a GPU")
    with pytest.raises(pytest.skip.Exception, match=reason):
        request.getfixturevalue("gpu")
    with pytest.raises(CudaDriverError, match=reason):
        test_gpu_environment.test_driver_and_gpu(None)
