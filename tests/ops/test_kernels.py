"""The kernels alone: the C++ program in csrc/, built as the library is, and with sanitizers."""

from __future__ import annotations

import os
import subprocess
import zlib
from pathlib import Path

import pytest
from compiled import cmake, compile_file, run

import act_export.ops

SOURCE = Path(__file__).parent / "csrc"
OPERATORS = Path(act_export.ops.__file__).parent

# What each build runs, and of how many neighbours one where not all are. Sanitizers take long: they leave out the
# longest calls, or all but the threads, and a run has one of them.
RUNS = {
    "": (["--random", "200"], 7),
    "address,undefined": (["--verbose", "--random", "20", "--max-total", "300"], 18),
    "thread": (["--verbose", "--filter", "threads/"], 1),
}
SANITIZERS = ("address,undefined", "thread")


@pytest.mark.parametrize("one_of", [RUNS[""][1], pytest.param(1, marks=pytest.mark.slow)])
def test_kernels(one_of, sample_seed, tmp_path):
    check_kernels("", one_of, sample_seed, tmp_path)


@pytest.mark.in_turn(3)
@pytest.mark.sampled(1)
@pytest.mark.parametrize("sanitize", SANITIZERS)
def test_kernels_with_a_sanitizer(sanitize, sample_seed, tmp_path):
    check_kernels(sanitize, RUNS[sanitize][1], sample_seed, tmp_path)


@pytest.mark.slow
def test_all_cases_with_the_address_sanitizer(sample_seed, tmp_path):
    check_kernels(SANITIZERS[0], 1, sample_seed, tmp_path)


def check_kernels(sanitize: str, one_of: int, sample_seed: str, tmp_path: Path) -> None:
    if sanitize and not _has_sanitizer(sanitize, tmp_path):
        pytest.skip(f"a program built with -fsanitize={sanitize} doesn't run here")
    sources = (*SOURCE.glob("*.*"), OPERATORS / "CMakeLists.txt", OPERATORS / "csrc")
    build = cmake(SOURCE, (sanitize, *sources), lambda _: {"SANITIZE": sanitize})
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    drawn = ("--one-of", str(one_of), "--draw", str(zlib.crc32(sample_seed.encode())))
    run(build / "attention_test", *RUNS[sanitize][0], *drawn, env=environment, timeout=900)


def _has_sanitizer(sanitize: str, folder: Path) -> bool:
    source = folder / "empty.cc"
    source.write_text("int main() {}\n", encoding="utf-8")
    try:
        program = compile_file("empty", source, f"-fsanitize={sanitize}")
    except AssertionError:
        return False
    return subprocess.run([program], capture_output=True).returncode == 0
