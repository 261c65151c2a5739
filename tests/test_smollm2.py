"""The real model end to end, on the command line: export, parity, graph, generation, accuracy through ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from close import assert_logits_close
from typer.testing import CliRunner

from act_export.calibration.recipes import find_recipes
from act_export.commands.main import app
from act_export.runtime import Session, generate

pytestmark = pytest.mark.real
LAYERS = 30


def act_export(*arguments: object) -> str:
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def calibrated(smollm2, tmp_path_factory) -> Path:
    """`act-export smollm2-135m --calibration smollm2-135m --out calibrated.onnx`, which `parity` verifies."""
    path = tmp_path_factory.mktemp("real") / "calibrated.onnx"
    act_export("smollm2-135m", "--calibration", "smollm2-135m", "--out", path, "--no-verify")
    return path


@pytest.fixture(scope="module")
def parity(calibrated) -> dict:
    return json.loads(act_export("verify", calibrated, "--against", "smollm2-135m", "--json"))


def test_the_shipped_recipe_is_inside(calibrated, smollm2):
    recipe = find_recipes(smollm2.identity)[0].calibration

    with Session.open(calibrated, native=False) as session:
        assert session.calibration == recipe
        assert session.properties["source"] == "smollm2-135m"


@pytest.mark.parametrize("engine", ["native library", "portable functions"])
def test_parity_within_a_thousandth(parity, engine):
    report = next(e for e in parity["engines"] if e["engine"] == engine)
    assert len(report["results"]) == 12
    for result in report["results"]:
        assert result["metrics"]["max_difference"] <= 1e-3, result
        assert result["greedy_identical"] in (None, True), result
        assert result["flips"] == 0, result


def test_native_and_portable_agree(calibrated):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 49152, (2, 90))
    mask = np.ones_like(ids)
    mask[0, :31] = 0
    with Session.open(calibrated) as native, Session.open(calibrated, native=False) as portable:
        ours, theirs = native.run(ids, mask).logits, portable.run(ids, mask).logits
        assert_logits_close(ours[mask == 1], theirs[mask == 1], 5e-5)
        prompt = ids[:1, :40].tolist()
        assert generate(native, prompt, max_new_tokens=16) == generate(portable, prompt, max_new_tokens=16)


def test_the_graph_is_small(calibrated):
    model = onnx.load(calibrated, load_external_data=False)
    outside_layers = 14  # embedding, positions to angles, last norm, logits, and which of them
    assert len(model.graph.node) <= 17 * LAYERS + outside_layers
    assert sum(node.domain == "act" for node in model.graph.node) == LAYERS
    assert calibrated.stat().st_size < 400_000
    onnx.checker.check_model(str(calibrated), full_check=True)


def test_generation(calibrated):
    answer = act_export("generate", calibrated, "What is the capital of France?", "--chat", "--max-new-tokens", 24)
    assert "Paris" in answer


def test_held_out_accuracy_through_onnxruntime(calibrated, sst2_rows):
    shown = json.loads(act_export("eval", calibrated, "--task", "sst2", "--limit", "40", "--json"))
    (task,) = shown["tasks"]
    assert len(task["calibrated"]["answers"]) == 40
    assert task["comparison"]["accuracy"]["gain"] >= 0.10
