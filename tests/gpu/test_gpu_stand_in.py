"""Where ONNX Runtime's CUDA provider puts the nodes of an exported file, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import cuda_stand_in
import onnxruntime
import pytest
from attention_cases import TYPES
from tiny import CALIBRATION

from act_export.export import build_model
from act_export.runtime.cuda_driver import CudaDriver, CudaDriverError

HERE = Path(__file__).parent
GIVEN = os.environ.get("ACT_ONNXRUNTIME_GPU")  # the folder `onnxruntime` of a wheel of onnxruntime-gpu


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> dict[str, str]:
    """Environment of a process with ONNX Runtime's CUDA provider over stand-ins, and `LIBRARY` with placeholders."""
    package = Path(GIVEN or Path(onnxruntime.__file__).parent)
    provider = package / "capi" / "libonnxruntime_providers_cuda.so"
    if not provider.exists():
        pytest.skip("needs onnxruntime-gpu, or its folder in ACT_ONNXRUNTIME_GPU")
    try:
        CudaDriver()
    except CudaDriverError:
        pass
    else:
        pytest.skip("there is a GPU")
    monkeypatch.syspath_prepend(HERE.parent / "ops" / "cuda")
    from fake_driver import build

    libraries, folder = build(), tmp_path / "cuda"
    folder.mkdir()
    headers = Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "include"
    for name, functions in cuda_stand_in.wanted(provider).items():
        cuda_stand_in.build(folder / name, functions, headers)
    (folder / "libcuda.so.1").unlink(missing_ok=True)
    (folder / "libcuda.so.1").symlink_to(libraries.driver)
    (folder / "onnxruntime").symlink_to(package)  # without its metadata: beside the other package both would be refused
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(folder), "LIBRARY": str(libraries.act_ops)}


def test_nodes_on_the_cuda_provider(stand_in, tiny, tmp_path):
    """On the CPU is integer arithmetic of shapes alone, and nothing is copied in a run."""
    files = [tmp_path / f"{dtype}.onnx" for dtype in TYPES]
    for dtype, file in zip(TYPES, files, strict=True):
        build_model(tiny, CALIBRATION, file, dtype=dtype)
    command = [sys.executable, HERE / "placement_on_stand_in.py", stand_in["LIBRARY"], *files]
    result = subprocess.run(command, env={**os.environ, **stand_in}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        placement = json.loads(line)
        assert set(placement["attention"].values()) == {"CUDAExecutionProvider"}
        assert set(placement["operators"]["CPUExecutionProvider"]) <= {"Mul", "Sub"}
        assert placement["copies"] == 0
    assert len(result.stdout.splitlines()) == len(files)
