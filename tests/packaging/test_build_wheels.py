"""tools/build_wheels: a wheel for other machines, in an environment that has only what running a file needs."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from act_export.runtime import Session, generate

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from act_export.runtime import Session, generate
with Session.open(sys.argv[1]) as session:
    print(generate(session, [[5, 17, 42]], max_new_tokens=6)[0])
assert "torch" not in sys.modules
"""


def build(folder: Path, *arguments: str) -> Path:
    environment = {**os.environ, "OUT": str(folder), "PYTHON": sys.executable}
    built = subprocess.run(
        [ROOT / "tools" / "build_wheels", *arguments], capture_output=True, text=True, env=environment
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    (glibc,) = re.findall(r"-py3-none-manylinux_2_(\d+)_", wheel.name)
    assert int(glibc) <= 28
    return wheel


def test_a_wheel_generates_tokens_in_a_clean_environment(tiny_file, tmp_path):
    wheel = build(tmp_path / "dist")
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "numpy", "ml_dtypes", "onnxruntime"], check=True)
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    ran = subprocess.run([python, "-c", PROGRAM, tiny_file], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with Session.open(tiny_file) as session:
        assert ran.stdout.strip() == str(generate(session, [[5, 17, 42]], max_new_tokens=6)[0])


@pytest.fixture(scope="module")
def unpacked_aarch64(tmp_path_factory) -> Path:
    """A wheel for another architecture, unpacked."""
    wheel = build(tmp_path_factory.mktemp("dist"), "--target", "aarch64")
    assert wheel.stem.endswith("_aarch64")
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_a_wheel_for_another_architecture(unpacked_aarch64):
    library = (unpacked_aarch64 / "act_export" / "ops" / "libact_ops.so").read_bytes()
    assert (library[:4], int.from_bytes(library[18:20], "little")) == (b"\x7fELF", 183)  # EM_AARCH64
    versions = {tuple(map(int, found.split(b"."))) for found in re.findall(rb"GLIBC_([\d.]+)", library)}
    assert max(versions) <= (2, 28)


@pytest.mark.skipif(
    not {"ACT_AARCH64_PYTHON", "ACT_AARCH64_PACKAGES"} <= os.environ.keys(),
    reason="needs a Python of aarch64, which an emulator may run: act_export/docs/wheels.md",
)
def test_it_generates_the_same_tokens_there(unpacked_aarch64, tiny_file, tmp_path):
    packages = os.pathsep.join([str(unpacked_aarch64), os.environ["ACT_AARCH64_PACKAGES"]])
    command = [*shlex.split(os.environ["ACT_AARCH64_PYTHON"]), "-c", PROGRAM, str(tiny_file)]
    environment = {**os.environ, "PYTHONPATH": packages}
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    with Session.open(tiny_file) as session:
        assert ran.stdout.strip() == str(generate(session, [[5, 17, 42]], max_new_tokens=6)[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cuda", "none.bin"], "--cuda none.bin: no such file"),
        (["--target", "sparc"], "--target sparc: aarch64 or x86_64"),
        (["--target"], "--target : aarch64 or x86_64"),
        (["--other"], "unknown argument --other"),
    ],
)
def test_arguments_that_can_not_be(arguments, message):
    ran = subprocess.run([ROOT / "tools" / "build_wheels", *arguments], capture_output=True, text=True)
    assert ran.returncode == 2
    assert message in ran.stderr
