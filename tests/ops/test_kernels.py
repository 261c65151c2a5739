"""The kernels alone: the C++ program in csrc/, built as the library is, and with sanitizers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ninja
import pytest

SOURCE = Path(__file__).parent / "csrc"

# What each build runs. Sanitizers take long: they leave out the longest calls, or all but the threads.
RUNS = {
    "": ["--random", "300"],
    "address,undefined": ["--verbose", "--random", "40", "--max-total", "300"],
    "thread": ["--verbose", "--filter", "threads/"],
}


@pytest.mark.parametrize("sanitize", RUNS, ids=lambda sanitize: sanitize or "release")
def test_kernels(sanitize, tmp_path):
    if sanitize and not _has_sanitizer(sanitize, tmp_path):
        pytest.skip(f"a program built with -fsanitize={sanitize} doesn't run here")
    build = tmp_path / "build"
    make = f"-DCMAKE_MAKE_PROGRAM={ninja.BIN_DIR}/ninja"
    _run(sys.executable, "-m", "cmake", "-S", SOURCE, "-B", build, "-G", "Ninja", make, f"-DSANITIZE={sanitize}")
    _run(sys.executable, "-m", "cmake", "--build", build)
    _run(build / "attention_test", *RUNS[sanitize])


def _has_sanitizer(sanitize: str, folder: Path) -> bool:
    source, program = folder / "empty.cc", folder / "empty"
    source.write_text("int main() {}\n", encoding="utf-8")
    compiler = os.environ.get("CXX", "c++")
    built = subprocess.run([compiler, f"-fsanitize={sanitize}", source, "-o", program], capture_output=True)
    return built.returncode == 0 and subprocess.run([program], capture_output=True).returncode == 0


def _run(*command: str | Path) -> None:
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    result = subprocess.run(
        list(map(str, command)),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    last_lines = "\n".join(result.stdout.splitlines()[-100:])
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{last_lines}"
