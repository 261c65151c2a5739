"""Generates with optimum's ORTModelForCausalLM; `check_optimum` runs this in an environment of optimum's own.

    python tests/architectures/optimum_generate.py FOLDER [--library libact_ops.so] < request > answer

The request is JSON: "batches" of prompts, each a list of token ids, and "max_new_tokens". The answer is JSON: "tokens",
the new tokens of each prompt of each batch, or "error"; and "versions".
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from typing import Any

import onnxruntime
import torch
from optimum.onnxruntime import ORTModelForCausalLM

_PACKAGES = ("optimum-onnx", "transformers", "onnxruntime", "torch")


def main() -> None:
    """Reads the request, and writes the answer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--library")
    arguments = parser.parse_args()
    request = json.load(sys.stdin)
    answer: dict[str, Any] = {"versions": {name: version(name) for name in _PACKAGES}}
    try:
        answer["tokens"] = _generate(arguments.folder, arguments.library, **request)
    except Exception as error:  # what optimum can't do is an answer too
        answer["error"] = str(error)
    json.dump(answer, sys.stdout)


def _generate(
    folder: str, library: str | None, batches: list[list[list[int]]], max_new_tokens: int
) -> list[list[list[int]]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(library)
    model = ORTModelForCausalLM.from_pretrained(folder, session_options=options)
    model.generation_config.eos_token_id = None  # every prompt gets all its tokens
    return [_continue(model, prompts, max_new_tokens) for prompts in batches]


def _continue(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0
    )
    new: list[list[int]] = found[:, longest:].tolist()
    return new


if __name__ == "__main__":
    main()
