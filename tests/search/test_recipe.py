from __future__ import annotations

from pathlib import Path

import pytest
from evaluation import evaluate

from act_export.attention.fast_attention import FastAttention
from act_export.attention.hook import attention_hook
from act_export.calibration.file import Calibration
from act_export.calibration.recipes import find_recipes
from act_export.checkpoint.load import Checkpoint
from act_export.tasks import load_examples, prompt_digest, split_examples
from act_export.tasks.language_model import TorchLanguageModel
from act_export.verify.evaluate.answers import compare
from act_export.verify.evaluate.held_out import held_out

RECIPE = Path(__file__).parents[2] / "models" / "smollm2-135m.json"

pytestmark = pytest.mark.real


def test_the_shipped_recipe_is_found_for_the_built_in_model(smollm2: Checkpoint) -> None:
    found = find_recipes(smollm2.identity, smollm2.names)
    assert RECIPE in [one.path for one in found]
    recipe = next(one.calibration for one in found if one.path == RECIPE)
    recipe.check_fits(smollm2.identity)
    assert recipe.num_calibrated_heads > 0
    assert recipe.to_json() == RECIPE.read_text(encoding="utf-8")


def test_the_shipped_recipe_records_the_prompts_it_was_found_with(sst2_rows: None) -> None:
    examples = load_examples("sst2").examples
    recipe = Calibration.load(RECIPE)
    splits = split_examples(examples)
    assert recipe.provenance is not None
    assert recipe.provenance.notes["used"] == sorted(prompt_digest(e.prompt) for e in (*splits.rank, *splits.choose))
    assert tuple(held_out(examples, [recipe], split="report")) == splits.report


@pytest.mark.slow  # of PyTorch; through ONNX Runtime each run shows it, in test_smollm2.py
def test_the_shipped_recipe_answers_more_unseen_questions(smollm2: Checkpoint, sst2_rows: None) -> None:
    recipe = Calibration.load(RECIPE)
    examples = held_out(load_examples("sst2").examples, [recipe], split="report")[:40]
    results = []
    for calibration in (None, recipe):
        with attention_hook(smollm2.model, FastAttention(calibration)) as hooked:
            results.append(evaluate(TorchLanguageModel(hooked), smollm2.tokenizer, examples))
    comparison = compare(*results)
    assert comparison.gained > comparison.lost, comparison
