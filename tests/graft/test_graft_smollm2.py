"""The real model: built by onnxruntime-genai's builder and grafted, beside act-export's own export of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from close import assert_logits_close

from act_export.calibration.file import Calibration
from act_export.calibration.recipes import find_recipes
from act_export.checkpoint.load import Checkpoint
from act_export.export import build_model
from act_export.graft.job import graft
from act_export.runtime import Session, generate

pytestmark = [pytest.mark.real, pytest.mark.slow]
TEXTS = (
    "The history of Rome is long: it begins with a small town on a river, and it goes on:\n",
    "Water boils when it is hot; ice melts when it is warm, and",
)
NEW = 64


@pytest.fixture(scope="module")
def recipe(smollm2: Checkpoint) -> Calibration:
    return find_recipes(smollm2.identity)[0].calibration


@pytest.fixture(scope="module")
def checkpoint(smollm2: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    smollm2.model.save_pretrained(folder)
    smollm2.tokenizer.save_pretrained(folder)
    return folder


def build(checkpoint: Path, out: Path, *options: str) -> Path:
    """A folder of onnxruntime-genai's builder."""
    pytest.importorskip("onnxruntime_genai")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", checkpoint, "-o", out, "-e", "cpu"]
    done = subprocess.run([*map(str, command), "-c", str(out.parent), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def float32(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkpoint, tmp_path_factory.mktemp("float32") / "plain", "-p", "fp32")


@pytest.fixture(scope="module")
def int4(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = "-p", "int4", "--extra_options", "accuracy_level=1"
    return build(checkpoint, tmp_path_factory.mktemp("int4") / "plain", *options)


@pytest.fixture(scope="module")
def own(smollm2: Checkpoint, recipe: Calibration, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("own") / "model.onnx"
    build_model(smollm2, recipe, path, source="smollm2-135m")
    return path


def prompts(smollm2: Checkpoint) -> list[list[int]]:
    return [smollm2.tokenizer(text).input_ids for text in TEXTS]


def logits(file: Path, tokens: list[int]) -> np.ndarray:
    """Of a prompt, and of five tokens after it one by one."""
    with Session.open(file) as session:
        first, state = session.run(np.array([tokens[:-5]]), np.ones((1, len(tokens) - 5), np.int64))
        found = [first]
        for end in range(len(tokens) - 4, len(tokens) + 1):
            one, state = session.run(np.array([tokens[end - 1 : end]]), np.ones((1, end), np.int64), state)
            found.append(one)
    return np.concatenate(found, 1)


def own_tokens(file: Path, tokens: list[int]) -> list[int]:
    """Greedy, without the token that ends them."""
    with Session.open(file) as session:
        stop = session.limits.stop_tokens
        (found,) = generate(session, [tokens], max_new_tokens=NEW, stop_tokens=stop)
    return [token for token in found if token not in stop]


def genai_tokens(folder: Path, tokens: list[int]) -> list[int]:
    """The same by onnxruntime-genai."""
    og: Any = pytest.importorskip("onnxruntime_genai")
    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(tokens) + NEW)
    generator = og.Generator(model, parameters)
    generator.append_tokens(np.array(tokens, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(tokens) :]


def test_float32_is_act_exports_own_export(
    smollm2: Checkpoint, recipe: Calibration, float32: Path, own: Path, tmp_path: Path
) -> None:
    written = graft(float32, recipe, tmp_path / "grafted")
    assert written.difference is not None
    assert written.difference < 1e-5
    for tokens in prompts(smollm2):
        assert_logits_close(logits(written.path, tokens), logits(own, tokens), 5e-5)
        expected = own_tokens(own, tokens)
        assert len(expected) > NEW // 2
        assert own_tokens(written.path, tokens) == expected
        assert genai_tokens(tmp_path / "grafted", tokens) == expected
    assert genai_tokens(float32, prompts(smollm2)[0]) != genai_tokens(tmp_path / "grafted", prompts(smollm2)[0])


def test_int4(smollm2: Checkpoint, recipe: Calibration, int4: Path, own: Path, tmp_path: Path) -> None:
    """With beta = 1 the graft is what was there; with the recipe it moves logits as it moves those of float32."""
    tokens = prompts(smollm2)[0]
    nothing = graft(int4, recipe.with_overrides(beta=1.0), tmp_path / "nothing").path
    calibrated = graft(int4, recipe, tmp_path / "calibrated").path
    before = logits(int4, tokens)
    assert_logits_close(logits(nothing, tokens), before, 5e-5)
    assert np.abs(logits(calibrated, tokens) - before).max() > 0.1
    with Session.open(calibrated) as session:
        assert session.properties["dtype"] == "int4"
    assert genai_tokens(tmp_path / "calibrated", tokens) == own_tokens(calibrated, tokens)
