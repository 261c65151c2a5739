"""The source distribution, and the wheel built from it alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from compiled import LAUNCHER

from act_export.calibration.file import Calibration, ModelIdentity

ROOT = Path(__file__).parent.parent.parent
PACKAGE = ROOT / "act_export"
SYSTEM_LIBRARIES = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "libgcc_s.so.1"}
RECIPE = Calibration({1: (0, 2)}, model=ModelIdentity("llama", 2, 4, "sha256:of-a-model-that-only-this-test-knows"))

# Runs in a fresh interpreter: the unpacked wheel goes first, and the finder of an editable install goes.
IN_UNPACKED_WHEEL = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path.insert(0, {folder!r})
import act_export
assert act_export.__file__.startswith({folder!r}), act_export.__file__
{code}
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    """A wheel built from nothing but the source distribution, and one more recipe than is shipped.

    Objects that other tests compiled from the same preprocessed source are taken from there.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(sdist, source)
    (source / "models").mkdir(exist_ok=True)
    RECIPE.save(source / "models" / "of-the-test.json")
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, source)
    _run(*command, "--config-settings=cmake.define.ACT_OLD_GLIBC=ON", env={**os.environ, **LAUNCHER})
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_sdist_has_what_a_build_needs_and_no_build(sdist):
    files = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert {"LICENSE", "README.md", "pyproject.toml", "act_export/ops/CMakeLists.txt"} <= files
    assert {path.relative_to(ROOT).as_posix() for path in (PACKAGE / "ops" / "csrc").iterdir()} <= files
    assert not {file for file in files if file.startswith((".venv", "build/")) or file.endswith((".so", ".onnx"))}


_SUFFIXES = ("*.py", "*.json", "*.html", "*.css", "*.js")


def test_wheel_has_every_module_and_data_file(unpacked):
    expected = {path.relative_to(ROOT) for suffix in _SUFFIXES for path in PACKAGE.rglob(suffix)}
    expected |= {Path("act_export/py.typed"), Path("act_export/ops/libact_ops.so")}
    expected |= {Path("act_export") / path.relative_to(ROOT) for path in (ROOT / "models").glob("*.json")}
    found = {path.relative_to(unpacked) for path in (unpacked / "act_export").rglob("*") if path.is_file()}
    assert expected - found == set()


def test_wheel_has_neither_tests_nor_sources_of_the_library(unpacked):
    assert {path.name for path in unpacked.iterdir() if not path.name.endswith(".dist-info")} == {"act_export"}
    examples = unpacked / "act_export" / "docs" / "examples"
    others = [path for path in unpacked.rglob("*") if not path.is_relative_to(examples)]
    assert not [path for path in others if path.suffix in (".cc", ".h", ".cu") or "csrc" in path.parts]


def test_wheel_fits_every_python_3_of_the_platform(wheel):
    _, _, python, abi, platform = wheel.stem.split("-")
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_metadata(unpacked):
    metadata = _metadata(unpacked)
    assert metadata["Name"] == "act-export"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Project-URL") is None
    assert metadata["Home-page"] is None
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "cpu",
        "gpu",
        "export",
        "report",
        "tasks",
        "lm-eval",
        "smollm2",
        "dev",
    }
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_onnxruntime_comes_only_with_an_extra(unpacked):
    requirements = [line for line in _metadata(unpacked).get_all("Requires-Dist", []) if "onnxruntime" in line]
    extras = {line.partition("extra == ")[2].strip("'\"") for line in requirements}
    assert extras == {"cpu", "gpu", "dev"}  # dev has onnxruntime-genai, which wants one too


def test_command_is_installed(unpacked):
    (entry_points,) = unpacked.glob("*.dist-info/entry_points.txt")
    parser = ConfigParser()
    parser.read(entry_points)
    assert dict(parser["console_scripts"]) == {"act-export": "act_export.commands.main:main"}


def test_installed_wheel_finds_recipe_task_and_library(unpacked):
    code = f"""
from act_export.calibration.file import ModelIdentity
from act_export.calibration.recipes import find_recipes
from act_export.ops.library import library_path
from act_export.tasks import task_names
print(find_recipes({RECIPE.model!r})[0].path)
print(library_path())
print(*task_names())
"""
    recipe, library, tasks = _run(
        sys.executable, "-c", IN_UNPACKED_WHEEL.format(folder=str(unpacked), code=code), cwd=unpacked
    ).splitlines()
    assert Path(recipe) == unpacked / "act_export" / "models" / "of-the-test.json"
    assert Path(library) == unpacked / "act_export" / "ops" / "libact_ops.so"
    assert tasks.split() == sorted(path.stem for path in (PACKAGE / "tasks" / "specs").glob("*.json"))


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf isn't installed")
def test_library_needs_only_the_system(unpacked):
    dynamic = _run("readelf", "--dynamic", "--wide", unpacked / "act_export" / "ops" / "libact_ops.so")
    needed = {line.partition("[")[2].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert {name for name in needed if not name.startswith("ld-linux")} <= SYSTEM_LIBRARIES
    versions = _run("readelf", "--version-info", "--wide", unpacked / "act_export" / "ops" / "libact_ops.so")
    wanted = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)", versions)}
    assert (2, 0) < max(wanted) <= (2, 28)  # of manylinux_2_28, see tools/build_wheels
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


@pytest.mark.skipif(shutil.which("nm") is None, reason="nm isn't installed")
def test_library_exports_three_symbols(unpacked):
    symbols = _run("nm", "--dynamic", "--defined-only", unpacked / "act_export" / "ops" / "libact_ops.so")
    exported = ["ActOpsBuildInfo", "ActOpsLoadedKernels", "RegisterCustomOps"]
    assert [line.split()[-1] for line in symbols.splitlines()] == exported


def _metadata(unpacked: Path) -> Message:
    (path,) = unpacked.glob("*.dist-info/METADATA")
    return Parser().parsestr(path.read_text(encoding="utf-8"))


def _run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout
