"""The names that users import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import act_export


@pytest.mark.parametrize("name", act_export.__all__)
def test_every_public_name_is_there(name):
    assert getattr(act_export, name) is not None


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = act_export.nothing


def test_no_public_name_hides_a_module():
    modules = {path.stem for path in Path(act_export.__file__).parent.iterdir()}
    assert not modules & set(act_export.__all__)


def test_running_a_model_imports_no_torch(tiny_file):
    """Production inference needs ONNX Runtime and numpy only."""
    program = f"""
import sys
from act_export import Session, generate
with Session.open({str(tiny_file)!r}) as session:
    assert session.calibration is not None
    generate(session, [[5, 6, 7]], max_new_tokens=3)
unwanted = {{"torch", "transformers", "onnxscript", "optimum"}} & set(sys.modules)
assert not unwanted, unwanted
"""
    subprocess.run([sys.executable, "-c", program], check=True)
