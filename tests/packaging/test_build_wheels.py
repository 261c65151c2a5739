"""tools/build_wheels: a wheel for other machines, in an environment that has only what running a file needs."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
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


def test_a_wheel_generates_tokens_in_a_clean_environment(tiny_file, tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "dist"), "PYTHON": sys.executable}
    built = subprocess.run([ROOT / "tools" / "build_wheels"], capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-manylinux_2_2" in wheel.name
    venv.create(tmp_path / "clean", with_pip=True)
    python = tmp_path / "clean" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "numpy", "ml_dtypes", "onnxruntime"], check=True)
    subprocess.run([*pip, "--no-deps", wheel], check=True)
    ran = subprocess.run([python, "-c", PROGRAM, tiny_file], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with Session.open(tiny_file) as session:
        assert ran.stdout.strip() == str(generate(session, [[5, 17, 42]], max_new_tokens=6)[0])


def test_kernels_that_are_not_there():
    ran = subprocess.run([ROOT / "tools" / "build_wheels", "--cuda", "none.bin"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "--cuda none.bin: no such file" in ran.stderr
