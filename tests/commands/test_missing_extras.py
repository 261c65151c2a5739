"""The command line without the packages of an extra: it begins, does what it can, and names the extra for the rest."""

from __future__ import annotations

import pytest
from bare import installed_with, run_bare

from act_export.version import __version__

PROGRAM = """
sys.argv[0] = "act-export"
from act_export.commands.main import main
main()
"""


def test_it_begins():
    ran = run_bare(PROGRAM, installed_with("cpu"), "--version")
    assert (ran.returncode, ran.stdout.strip()) == (0, __version__), ran.stderr
    assert run_bare(PROGRAM, installed_with("cpu"), "library").returncode == 0


@pytest.mark.parametrize(
    ("command", "needs", "extra"),
    [
        ("inspect FILE", "this command needs onnx", "export"),
        ("generate FILE hello --tokenizer FOLDER", "a tokenizer needs transformers", "export"),
        ("FOLDER --plain --out FOLDER/out.onnx", "this command needs torch", "export"),
        ("graft FILE --calibration smollm2-135m --out FOLDER/out.onnx", "this command needs onnx", "export"),
        ("lm-eval --tasks x", "this command needs lm_eval", "lm-eval"),
        ("report FILE", "this command needs vl_convert", "report"),
    ],
)
def test_what_needs_an_extra(command, needs, extra, tiny_file, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    words = command.replace("FILE", str(tiny_file)).replace("FOLDER", str(tmp_path)).split()
    installed = installed_with("cpu", "export") if extra == "report" else installed_with("cpu")
    ran = run_bare(PROGRAM, installed, *words)
    assert ran.returncode == 2
    assert f"error: {needs}, which isn't installed: pip install 'act-export[{extra}]'\n" in ran.stderr
