"""The kernels in processes of their own: as the machine code of this GPU, and under compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import test_gpu_parity

from act_export.ops.library import library_info

LIMIT_S = 600
FOUND_ERRORS = 99  # the exit code that compute-sanitizer is told to give
SHORT_CALLS = f"{test_gpu_parity.__file__}::{test_gpu_parity.test_short_calls.__name__}"
PARITY = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", SHORT_CALLS]


def run_in_a_process(*command, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    result = subprocess.run(
        list(map(str, command)), env=environment | variables, capture_output=True, text=True, timeout=LIMIT_S - 30
    )
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def has_machine_code(capability, targets):
    """Whether one of "sm_80", ... runs on a compute capability: of the same major number, no newer."""
    major, minor = map(int, capability.split("."))
    return any(f"sm_{major}{older}" in targets for older in range(minor + 1))


def find_sanitizer():
    """Path of compute-sanitizer: on PATH, of the CUDA toolkit, or of NVIDIA's packages for Python; None without."""
    roots = [Path(root) for name in ("CUDA_HOME", "CUDA_PATH") if (root := os.environ.get(name))]
    roots += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    folders = [root / part for root in roots for part in ("bin", "compute-sanitizer")]
    packages = Path(sysconfig.get_paths()["purelib"], "nvidia")
    folders += [path.parent for path in packages.rglob("compute-sanitizer") if path.is_file()]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ["PATH"], *map(str, folders)]))


def sanitize(tool, command):
    """Runs a command under one of compute-sanitizer's tools; returns its last line of counts."""
    program = find_sanitizer()
    if program is None:
        pytest.skip("compute-sanitizer is neither on PATH nor in CUDA's folder or packages")
    # ONNX Runtime tries calls that fail, which are no errors of a kernel.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    said = run_in_a_process(program, "--tool", tool, "--error-exitcode", FOUND_ERRORS, *options, *command)
    return [line.strip("= ") for line in said.splitlines() if "SUMMARY" in line][-1]


@pytest.mark.gpu
@pytest.mark.timeout(LIMIT_S)
def test_machine_code_is_loaded(gpu):
    """Without the driver's compiler, which would silently take PTX where it refuses an image; images loaded at once."""
    if not has_machine_code(gpu.capability, library_info().cuda):
        pytest.skip(f"the library has only PTX for compute capability {gpu.capability}")
    run_in_a_process(*PARITY, CUDA_DISABLE_PTX_JIT="1", CUDA_MODULE_LOADING="EAGER")


@pytest.mark.gpu
@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(gpu, tool, record_property):
    record_property("summary", sanitize(tool, PARITY))


def test_machine_code_of_a_capability():
    assert has_machine_code("8.9", ["sm_80", "ptx"])
    assert not has_machine_code("9.0", ["sm_80", "ptx"])
    assert not has_machine_code("8.0", ["sm_86"])


@pytest.mark.parametrize("code", [0, FOUND_ERRORS])
def test_what_the_sanitizer_finds_is_told(tmp_path, monkeypatch, code):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho $@\necho '========= ERROR SUMMARY: 7 errors'\nexit {code}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if code == 0:
        assert sanitize("racecheck", ["the", "program"]) == "ERROR SUMMARY: 7 errors"
        return
    with pytest.raises(AssertionError, match=r"exit code 99\n *--tool memcheck --error-exitcode 99 .*program"):
        sanitize("memcheck", ["the", "program"])
