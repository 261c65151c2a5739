"""The command line without the packages of an extra: it begins, does what it can, and names the extra for the rest."""

from __future__ import annotations

import json

import pytest
from bare import installed_with, run_bare
from profiles import random_profile

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


SEVERAL = """
import json
from act_export.commands.main import app
for words in json.loads(sys.argv[1]):
    try:
        app(words)
    except SystemExit as end:
        print("ended with", end.code, file=sys.stderr, flush=True)
"""
NEEDS = {
    "inspect FILE": ("this command needs onnx", "export"),
    "generate FILE hello --tokenizer FOLDER": ("a tokenizer needs transformers", "export"),
    "FOLDER --plain --out FOLDER/out.onnx": ("this command needs onnx", "export"),
    "graft FILE --calibration smollm2-135m --out FOLDER/out.onnx": ("this command needs onnx", "export"),
    "lm-eval --tasks x": ("this command needs lm_eval", "lm-eval"),
    "report FOLDER/profile.safetensors": ("this command needs vl_convert", "report"),
}


@pytest.mark.parametrize("installed", [("cpu",), ("cpu", "export")])
def test_what_needs_an_extra(installed, tiny_file, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    random_profile(2, 2).save(tmp_path / "profile.safetensors")
    needs = {command: need for command, need in NEEDS.items() if (need[1] == "report") == ("export" in installed)}
    words = [each.replace("FILE", str(tiny_file)).replace("FOLDER", str(tmp_path)).split() for each in needs]
    ran = run_bare(SEVERAL, installed_with(*installed), json.dumps(words))
    told = ran.stderr.split("ended with 2\n")
    assert len(told) == len(needs) + 1, ran.stderr
    for said, (package, extra) in zip(told, needs.values(), strict=False):
        assert f"error: {package}, which isn't installed: pip install 'act-export[{extra}]'\n" in said
