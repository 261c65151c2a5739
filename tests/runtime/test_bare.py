"""Serving a file takes numpy, ml_dtypes and ONNX Runtime; who wants more is told which extra has it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import onnx
import pytest
from bare import RUNTIME, run_bare

from act_export.runtime import Session, generate

PROMPTS = [[5, 9, 200, 31, 7], [12, 3]]
GENERATE = f"""
import json
import numpy as np
from act_export import Session, generate
from act_export.runtime.cache import Cache
from act_export.runtime.device import Device
from act_export.runtime.device_memory import DeviceMemory

for native in (True, False):
    with Session.open(sys.argv[1], native=native) as session:
        print(json.dumps(generate(session, {PROMPTS}, max_new_tokens=9)))
        logits = session.run(np.array([[5, 9]]), np.ones((1, 2))).logits[:, -1:]
        cache = Cache(session, DeviceMemory(Device()), 1, 4, in_place=native)
        assert np.allclose(cache.step(np.array([[5, 9]])), logits, atol=1e-5)
"""
TEXT = """
from act_export.errors import SessionError
from act_export.runtime import Session, generate
from act_export.runtime.generation_settings import GenerationSettings
from act_export.runtime.text import load_tokenizer

with Session.open(sys.argv[1]) as session:
    for use in (
        lambda: load_tokenizer(session, sys.argv[2]),
        lambda: generate(session, [[5, 6]], max_new_tokens=2, settings=GenerationSettings({"min_length": 3}, "x.json")),
    ):
        try:
            use()
        except SessionError as error:
            print(error)
"""


def test_a_file_runs_with_nothing_else_installed(tiny_file):
    ran = run_bare(GENERATE, RUNTIME, str(tiny_file))
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    for tokens, native in zip(found, (True, False), strict=True):
        with Session.open(tiny_file, native=native) as session:
            assert tokens == generate(session, PROMPTS, max_new_tokens=9)


def test_text_needs_an_extra(tiny_file, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    ran = run_bare(TEXT, RUNTIME, str(tiny_file), str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == [
        "a tokenizer needs transformers, which isn't installed: pip install 'act-export[export]'",
        "x.json needs torch, which isn't installed: pip install 'act-export[export]'",
    ]


def test_a_file_of_others_needs_an_extra(tiny_file, tmp_path):
    path = shutil.copytree(tiny_file.parent, tmp_path / "of_others") / tiny_file.name
    model = onnx.load(path, load_external_data=False)
    model.ClearField("metadata_props")
    onnx.save(model, path)
    ran = run_bare("from act_export import Session\nSession.open(sys.argv[1])", RUNTIME, str(path))
    assert "SessionError" in ran.stderr
    assert "didn't write, needs onnx, which isn't installed: pip install 'act-export[export]'" in ran.stderr


@pytest.mark.parametrize("module", ["act_export", "act_export.runtime", "act_export.runtime.text"])
def test_importing_takes_little(module):
    """Processor time beside that of numpy, which is most of it; the best of some, as others may use the machine."""

    def best(program):
        text = f"import time\nbegin = time.process_time()\n{program}\nprint(time.process_time() - begin)"
        runs = [subprocess.run([sys.executable, "-c", text], capture_output=True, check=True) for _ in range(3)]
        return min(float(run.stdout) for run in runs)

    assert best(f"import {module}") < 4 * best("import numpy, ml_dtypes")
