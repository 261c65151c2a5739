from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from act_export.calibration import Calibration, find_recipe
from act_export.checkpoint import Checkpoint, load_checkpoint
from act_export.hooks import attention_hook
from act_export.search import FastAttention
from act_export.tasks import Example, load_examples, split_examples
from act_export.verify.evaluate import compare, evaluate

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "models" / "smollm2-135m.json"

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return load_checkpoint("smollm2-135m")


@pytest.fixture(scope="module")
def report() -> tuple[Example, ...]:
    subprocess.run([sys.executable, str(ROOT / "tools" / "fetch_data"), "sst2"], check=True)
    return split_examples(load_examples("sst2")).report


def test_the_shipped_recipe_is_found_for_the_built_in_model(checkpoint: Checkpoint) -> None:
    found = find_recipe(checkpoint.identity)
    assert found is not None
    recipe = Calibration.load(found)
    assert recipe == Calibration.load(RECIPE)
    recipe.check_fits(checkpoint.identity)
    assert recipe.num_calibrated_heads > 0
    assert recipe.to_json() == RECIPE.read_text(encoding="utf-8")


def test_the_shipped_recipe_answers_more_unseen_questions(checkpoint: Checkpoint, report: tuple[Example, ...]) -> None:
    examples = report[:40]
    results = []
    for calibration in (None, Calibration.load(RECIPE)):
        with attention_hook(checkpoint.model, FastAttention(calibration)) as hooked:
            results.append(evaluate(hooked, checkpoint.tokenizer, examples))
    comparison = compare(*results)
    assert comparison.gained > comparison.lost, comparison
