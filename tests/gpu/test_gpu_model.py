"""A whole model of random weights with heads of a published recipe: agreement with PyTorch, placement, and speed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from random_llama import Shape, write_checkpoint
from typer.testing import CliRunner

from act_export.calibration.file import Calibration
from act_export.commands.main import app
from act_export.runtime import Session

RECIPE = Path(__file__).parents[2] / "models" / "llama-2-7b-chat-classification.json"
LAYERS = int(os.environ.get("ACT_GPU_LAYERS", "4"))  # 3 to 32: fewer have no head of the recipe
SMALL = Shape(layers=3, hidden=128, intermediate=64, vocabulary=400, sink_every=100)  # on the CPU
PROMPT_TOKENS, NEW_TOKENS = 2048, 128
ON_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.timeout(600)])


@dataclass(frozen=True)
class Files:
    checkpoint: Path
    calibrated: Path


def act_export(*arguments):
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output


def recipe_of(layers):
    """The published recipe's heads in the first layers."""
    recipe = Calibration.load(RECIPE)
    heads = {layer: chosen for layer, chosen in recipe.heads.items() if layer < layers}
    return replace(recipe, heads=heads, model=None)


def test_recipe_of_fewer_layers():
    assert recipe_of(4).heads == {2: (2, 8, 12, 13, 16, 17, 20, 25), 3: (0, 1, 2, 10, 24, 28)}


@pytest.fixture(scope="module")
def files(device, tmp_path_factory) -> Files:
    folder = tmp_path_factory.mktemp("model")
    shape = replace(Shape(), layers=LAYERS) if device.is_cuda else SMALL
    found = Files(folder / "checkpoint", folder / "calibrated.onnx")
    write_checkpoint(found.checkpoint, shape)
    calibration = folder / "calibration.json"
    recipe_of(shape.layers).save(calibration)
    dtype = "bfloat16" if device.is_cuda else "float32"  # ONNX Runtime multiplies no bfloat16 on CPUs
    options = ["--calibration", calibration, "--dtype", dtype, "--no-verify"]
    act_export(found.checkpoint, *options, "--out", found.calibrated)
    return found


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), ON_GPU], indirect=True)
def test_nothing_is_copied_in_a_run(files, device, record_property):
    with Session.open(files.calibrated, device=str(device)) as session:
        placement = session.placement()
    record_property("placement", placement.describe())
    assert placement.attention
    assert placement.attention_on_device
    assert placement.copies == 0


@pytest.mark.parametrize("device", [ON_GPU], indirect=True)
def test_agreement_with_pytorch(files):
    act_export("verify", files.calibrated, "--against", files.checkpoint, "--device", "cuda")


@pytest.mark.parametrize("device", [ON_GPU], indirect=True)
def test_speed(files, tmp_path, record_property):
    """Beside the plain export, and PyTorch where it has CUDA; figures go to the report."""
    plain, path = tmp_path / "plain.onnx", tmp_path / "model.json"
    act_export(files.checkpoint, "--plain", "--dtype", "bfloat16", "--no-verify", "--out", plain)
    options = ["--prompt-tokens", PROMPT_TOKENS, "--new-tokens", NEW_TOKENS, "--rounds", 3, "--json", path]
    if torch.cuda.is_available():
        options += ["--pytorch", files.checkpoint, "--pytorch-rounds", 2]
    act_export("bench", files.calibrated, "--against", plain, "--device", "cuda", *options)
    for found in json.loads(path.read_text(encoding="utf-8"))["ratios"]:
        for phase in ("prompt", "decode"):
            record_property(f"calibrated / {found['against']}, {phase}", found[phase]["of_medians"])
