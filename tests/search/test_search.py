from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import act_export
from act_export.calibration import Calibration, CalibrationError
from act_export.checkpoint import Checkpoint, identify
from act_export.hooks import ReferenceAttention, attention_hook
from act_export.search import search_heads
from act_export.tasks import (
    Example,
    ScoringError,
    Splits,
    TaskError,
    TorchLanguageModel,
    encode_examples,
    predicted_choice,
    prompt_digest,
    score_choices,
    split_examples,
    unused,
)

PLANTED = Calibration({0: (0,)}, beta=0.0, threshold=0.1)
SEARCH: dict[str, Any] = {"beta": 0.0, "threshold": 0.1, "head_counts": (1, 2, 4, 8), "seed": 3}


class Letters:
    """A tokenizer with a token per character."""

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


@pytest.fixture
def checkpoint(llama: PreTrainedModel) -> Checkpoint:
    model = llama.float()
    return Checkpoint("tiny", model, Letters(), identify(model))


def answered_by(checkpoint: Checkpoint, calibration: Calibration | None) -> Splits:
    """Questions whose right answer is what the model, calibrated so, says."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(150):
        length = int(torch.randint(6, 14, (), generator=generator))
        letters = torch.randint(65, 91, (length,), generator=generator).tolist()
        examples.append(Example("".join(map(chr, letters)), (" a", " b"), 0))
    with attention_hook(checkpoint.model, ReferenceAttention(calibration)) as hooked:
        scores = score_choices(TorchLanguageModel(hooked), encode_examples(checkpoint.tokenizer, examples))
    answered = [replace(e, answer=predicted_choice(row)) for e, row in zip(examples, scores, strict=True)]
    return split_examples(answered, rank=40, choose=50, report=50, seed=3)


def test_planted_heads_are_found(checkpoint: Checkpoint) -> None:
    splits = answered_by(checkpoint, PLANTED)
    steps: list[tuple[str, float]] = []
    found = search_heads(
        checkpoint, splits, tasks=("planted",), progress=lambda step, done: steps.append((step, done)), **SEARCH
    )
    assert found.heads == PLANTED.heads
    assert (found.beta, found.threshold, found.threshold_mode) == (0.0, 0.1, "absolute")
    assert found.model == checkpoint.identity
    found.check_fits(checkpoint.identity)
    origin = found.provenance
    assert origin is not None
    assert origin.method == "gates"
    assert origin.tasks == ("planted",)
    assert origin.samples == {"rank": 40, "choose": 50, "report": 50}
    assert origin.seed == 3
    assert origin.versions == {
        "act-export": act_export.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    assert origin.plain_accuracy is not None
    assert origin.calibrated_accuracy is not None
    assert origin.calibrated_accuracy > origin.plain_accuracy
    low, high = origin.notes["gain_interval_95"]
    assert low <= origin.calibrated_accuracy - origin.plain_accuracy <= high
    assert 0 <= origin.notes["mcnemar_p"] <= 1
    assert sum(origin.notes["predicted_shares"]["calibrated"]) == pytest.approx(1)
    assert set(origin.notes["accuracy_without_choice_bias"]) == {"plain", "calibrated"}
    assert list(origin.notes["choose_accuracy"]) == ["0", "1", "2", "4", "8"]
    assert max(origin.notes["choose_accuracy"].values()) == origin.notes["choose_accuracy"]["1"] == 1
    used = origin.notes["used"]
    assert used == sorted(used)
    assert set(used) == {prompt_digest(example.prompt) for example in (*splits.rank, *splits.choose)}
    assert unused(splits.report, used) == list(splits.report)
    assert Calibration.from_json(found.to_json()) == found
    (line,) = [line for line in found.to_json().splitlines() if '"used"' in line]
    assert line.count(",") == len(used) - 1

    assert list(dict.fromkeys(step for step, _ in steps)) == [
        "ranking heads",
        "choosing how many",
        "measuring the gain",
    ]
    done = [share for _, share in steps]
    assert done == sorted(done)
    assert (done[0], done[-1]) == (0, 1)


def test_reported_accuracies_are_those_of_the_reference(checkpoint: Checkpoint) -> None:
    splits = answered_by(checkpoint, PLANTED)
    found = search_heads(checkpoint, splits, **SEARCH)
    report = encode_examples(checkpoint.tokenizer, splits.report)
    for calibration, accuracy in (
        (None, found.provenance.plain_accuracy),
        (found, found.provenance.calibrated_accuracy),
    ):
        with attention_hook(checkpoint.model, ReferenceAttention(calibration)) as hooked:
            scores = score_choices(TorchLanguageModel(hooked), report, batch_size=1)
        right = [predicted_choice(row) == example.answer for row, example in zip(scores, report, strict=True)]
        assert accuracy == pytest.approx(sum(right) / len(right), abs=5e-5)


def test_where_nothing_helps_no_head_is_calibrated_and_that_is_said(checkpoint: Checkpoint) -> None:
    found = search_heads(checkpoint, answered_by(checkpoint, None), **SEARCH)
    assert found.heads == {}
    assert found.model == checkpoint.identity
    assert found.provenance.plain_accuracy == found.provenance.calibrated_accuracy == 1
    assert found.provenance.notes["result"].startswith("no head is calibrated")
    assert found.provenance.notes["choose_p"] > 0.05
    assert len(found.provenance.notes["used"]) == 90


def test_a_model_without_finite_scores_is_refused(checkpoint: Checkpoint) -> None:
    splits = answered_by(checkpoint, None)
    with torch.no_grad():
        checkpoint.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ScoringError, match=r"after the prompt '[A-Z]+' are"):
        search_heads(checkpoint, splits, **SEARCH)


def test_a_search_repeats_and_leaves_the_model_alone(checkpoint: Checkpoint) -> None:
    before = {name: parameter.clone() for name, parameter in checkpoint.model.named_parameters()}
    implementation = checkpoint.model.config._attn_implementation
    splits = answered_by(checkpoint, PLANTED)
    first, second = (search_heads(checkpoint, splits, batch_size=size, **SEARCH) for size in (16, 7))
    assert first.heads == second.heads
    assert first.provenance == second.provenance
    assert checkpoint.model.config._attn_implementation == implementation
    for name, parameter in checkpoint.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


def test_the_threshold_defaults_to_its_mode(checkpoint: Checkpoint) -> None:
    splits = answered_by(checkpoint, PLANTED)
    small = Splits(splits.rank[:2], splits.choose[:2], splits.report[:2])
    for mode, threshold in (("absolute", 0.1), ("relative", 5.0)):
        assert search_heads(checkpoint, small, threshold_mode=mode, head_counts=(1,)).threshold == threshold


def test_what_cannot_be_searched_is_refused_before_any_work(checkpoint: Checkpoint) -> None:
    splits = answered_by(checkpoint, None)
    with pytest.raises(TaskError, match="the model has no tokenizer"):
        search_heads(replace(checkpoint, tokenizer=None), splits)
    with pytest.raises(CalibrationError, match="threshold_mode is 'absolut'"):
        search_heads(checkpoint, splits, threshold_mode="absolut")
    with pytest.raises(CalibrationError, match="beta is 3"):
        search_heads(checkpoint, splits, beta=3)
    with pytest.raises(CalibrationError, match="threshold is -1"):
        search_heads(checkpoint, splits, threshold=-1)
    long = Splits((Example("a" * 3000, (" a", " b"), 0),), splits.choose, splits.report)
    with pytest.raises(TaskError, match="has 3002 tokens; the model takes 2048"):
        search_heads(checkpoint, long)
