"""The names that users import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import act_export
import act_export.checkpoint
import act_export.search
import act_export.search.run as search_module


@pytest.mark.parametrize("name", act_export.__all__)
def test_every_public_name_is_there(name):
    assert getattr(act_export, name) is not None


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = act_export.nothing


@pytest.mark.parametrize("name", act_export.checkpoint.__all__)
def test_every_name_of_checkpoints_is_there(name):
    assert getattr(act_export.checkpoint, name) is not None


@pytest.mark.parametrize("name", act_export.search.__all__)
def test_what_a_search_takes_and_gives_is_there(name):
    assert getattr(act_export.search, name) is not None


def test_a_search_needs_public_names_only():
    """Every type in its signature has a public name."""
    hints = get_type_hints(act_export.search_heads, vars(search_module))
    text = " ".join(str(hint) for hint in hints.values())
    found = set(re.findall(r"act_export\.search\.[\w.]*\.(\w+)", text))
    assert {"SearchOptions", "SearchResult", "SearchTask"} == found <= set(act_export.search.__all__)


def test_no_public_name_hides_a_module():
    modules = {path.stem for path in Path(act_export.__file__).parent.iterdir()}
    assert not modules & set(act_export.__all__)


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"]])
def test_help_names_every_built_in_model_and_imports_nothing_that_takes_long(arguments):
    program = f"""
import sys
from act_export.commands.main import main
sys.argv[1:] = {arguments}
try:
    main()
finally:
    print("imported", {{"torch", "transformers", "gguf", "onnx", "onnxruntime", "platformdirs"}} & set(sys.modules))
"""
    wide = os.environ | {"COLUMNS": "200"}
    shown = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=wide).stdout
    assert "(smollm2-135m, gemma3-270m, qwen2.5-coder-0.5b, qwen2.5-coder-1.5b)" in " ".join(
        re.sub("│", " ", shown).split()
    )
    assert shown.endswith("imported set()\n")


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
