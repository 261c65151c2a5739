"""Folders for onnxruntime-genai, grafted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_models import CONTEXT, PAD, Decoder, prompt
from onnx import TensorProto

og = pytest.importorskip("onnxruntime_genai")


PROMPT, OTHER = prompt(14, 1), prompt(9, 2)


STEPS = 24


ENGINES = ("native", "portable")


DECODERS = {
    "float32": Decoder(layers=3, packed=False),
    "float16": Decoder(layers=3, element_type=TensorProto.FLOAT16),
    "windows": Decoder(layers=3, windows=(-1, 6, 6)),
}


@cache
def model(folder: Path) -> Any:
    return og.Model(str(folder))


def generator(folder: Path, tokens: Sequence[Sequence[int]] = (PROMPT,), **options: Any) -> Any:
    """Of prompts, the shorter ones padded behind; of none, to give it some."""
    parameters = og.GeneratorParams(model(folder))
    parameters.set_search_options(**{"max_length": CONTEXT, "batch_size": max(len(tokens), 1), **options})
    made = og.Generator(model(folder), parameters)
    if not tokens:
        return made
    longest = max(map(len, tokens))
    made.append_tokens(np.array([[*row, *[PAD] * (longest - len(row))] for row in tokens], np.int32))
    return made


def steps(running: Any, count: int = STEPS) -> list[list[int]]:
    """New tokens of each sequence."""
    found = []
    for _ in range(count):
        running.generate_next_token()
        found.append([int(token) for token in running.get_next_tokens()])
    return [list(row) for row in zip(*found, strict=True)]
