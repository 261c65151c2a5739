"""The programs of docs/examples generate what Python does; each is skipped, with a reason, where its tools are not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import CALIBRATION

import act_export
from act_export.export import build_model
from act_export.ops.library import library_path
from act_export.runtime import Session, generate
from act_export.runtime.request import DEFAULT, Choice, DefaultType

EXAMPLES = Path(act_export.__file__).parent / "docs" / "examples"
HEADER = "onnxruntime_cxx_api.h"
PROMPT = [5, 17, 42, 9, 9, 12, 200, 31]
COUNT = 24
SECONDS = 120


@pytest.fixture(scope="module")
def half_file(tiny, tmp_path_factory) -> Path:
    """Cache and logits in float16, sink scores in float32."""
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    build_model(tiny, CALIBRATION, path, source="tiny", dtype="float16")
    return path


@pytest.fixture(params=["tiny_file", "tiny_plain_file", "half_file"])
def file(request) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def cpp(tmp_path_factory) -> list[str | Path]:
    """The C++ program; CPATH can name the folder of ONNX Runtime's headers, which no package has."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))  # which the package was built with
    if run([compiler, "-E", "-x", "c++", "-"], input=f"#include <{HEADER}>").returncode != 0:
        pytest.skip(f"{HEADER} isn't where the compiler looks; CPATH can name its folder")
    import onnxruntime

    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("ONNX Runtime's package has no libonnxruntime.so here")
    folder = tmp_path_factory.mktemp("cpp")
    (folder / "libonnxruntime.so.1").symlink_to(libraries[-1])  # its name among libraries
    program = folder / "generate"
    succeed([compiler, "-std=c++17", EXAMPLES / "cpp" / "generate.cc", "-o", program, libraries[-1]])
    return ["env", f"LD_LIBRARY_PATH={folder}", program]


@pytest.fixture(scope="module")
def javascript(tmp_path_factory) -> list[str | Path]:
    """The JavaScript program and its package; install scripts would fetch CUDA."""
    if not shutil.which("node") or not shutil.which("npm"):
        pytest.skip("there is no node, or no npm")
    folder = tmp_path_factory.mktemp("javascript")
    shutil.copytree(EXAMPLES / "javascript", folder, dirs_exist_ok=True)
    succeed(["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund"], cwd=folder)
    yield ["node", folder / "generate.mjs"]
    shutil.rmtree(folder / "node_modules")  # 290 MB


@pytest.fixture(scope="module")
def csharp(tmp_path_factory) -> list[str | Path]:
    """The C# program."""
    if not shutil.which("dotnet"):
        pytest.skip("there is no dotnet")
    folder = tmp_path_factory.mktemp("csharp")
    shutil.copytree(EXAMPLES / "csharp", folder, dirs_exist_ok=True)
    succeed(["dotnet", "build", "-o", "out"], cwd=folder)
    return ["dotnet", folder / "out" / "generate.dll"]


def test_cpp(cpp, file):
    assert numbers(succeed([*cpp, file, library_path(), COUNT, *PROMPT])) == expected(file)


@pytest.fixture(scope="module")
def switched(tiny_file, tmp_path_factory) -> Path:
    """Another calibration of the file's heads, as its numbers."""
    folder = tmp_path_factory.mktemp("switched")
    replace(CALIBRATION, beta=1.9, gamma=3.0, threshold=0.02).save(folder / "other.json")
    arguments = [tiny_file, "--calibration", folder / "other.json", "--out", folder / "other.bin"]
    succeed([sys.executable, "-m", "act_export", "adapter", *arguments])
    return folder / "other.bin"


def test_cpp_with_another_calibration(cpp, tiny_file, switched):
    found = numbers(succeed([*cpp, tiny_file, library_path(), COUNT, *PROMPT, f"calibration={switched}"]))
    assert found == expected(tiny_file, calibration=str(switched.with_suffix(".json"))) != expected(tiny_file)


def test_cpp_refusals(cpp, tiny_file, tmp_path):
    assert run([*cpp, tiny_file, library_path(), COUNT]).returncode == 2
    failed = run([*cpp, tmp_path / "none.onnx", library_path(), COUNT, *PROMPT])
    assert failed.returncode == 1
    assert "none.onnx" in failed.stderr


@pytest.mark.in_turn(2)
def test_javascript(javascript, file):
    assert numbers(succeed([*javascript, file, COUNT, *PROMPT])) == expected(file, native=False)


def test_javascript_refusals(javascript, tiny_file):
    assert run([*javascript, tiny_file, COUNT]).returncode == 2


def test_csharp(csharp, file):
    assert numbers(succeed([*csharp, file, library_path(), COUNT, *PROMPT])) == expected(file)


def test_a_session_in_node_cannot_register_a_library(javascript):
    """What the docs say of onnxruntime-node; when this fails it can, and the example should."""
    declared = (javascript[1].parent / "node_modules/onnxruntime-common/dist/cjs/inference-session.d.ts").read_text()
    assert "interface SessionOptions" in declared
    assert "customop" not in declared.lower()
    (binding,) = javascript[1].parent.glob("node_modules/onnxruntime-node/bin/*/linux/x64/onnxruntime_binding.node")
    assert b"graphOptimizationLevel" in binding.read_bytes()
    assert b"customop" not in binding.read_bytes().lower()


def expected(file: Path, native: bool = True, calibration: Choice | DefaultType = DEFAULT) -> list[int]:
    with Session.open(file, native=native, calibration=calibration) as session:
        return generate(session, [PROMPT], max_new_tokens=COUNT)[0]


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def run(command: list, **options) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, **options)


def succeed(command: list, **options) -> str:
    result = run(command, **options)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout
