from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from transformers import PreTrainedModel

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.search.decoder_layers import decoder_layers
from act_export.search.exhaustive import PlainRun
from act_export.search.gates import log_likelihoods
from act_export.search.request import Threshold
from act_export.tasks import EncodedExample
from act_export.tasks.language_model import TorchLanguageModel
from act_export.tasks.scoring import choice_scores, predicted_choice

BETA, THRESHOLD = 0.2, Threshold(0.15)
SHAPE = {"num_layers": 3, "num_heads": 4}
ONE_TOKEN = [
    EncodedExample((5, 17, 99, 5, 40, 5, 3), ((1,), (2,)), 1),
    EncodedExample((8, 8, 64), ((1,), (2,), (9,)), 0),
    EncodedExample((100, 3, 77, 21, 3, 3, 50, 11, 90, 3), ((7,), (4,)), 0),
]
MIXED = [
    EncodedExample((5, 17, 99, 5, 40, 5, 3), ((1, 30, 4), (2,)), 0),
    EncodedExample((8, 64), ((1, 5), (2, 6), (9, 9, 9, 9)), 2),
    EncodedExample((8, 8, 64, 7), ((1,), (2,)), 0),
]


def naive(model: PreTrainedModel, batch: Sequence[EncodedExample], layer: int, head: int) -> tuple[float, int]:
    """The head switched on, and everything run anew, one prompt at a time."""
    results = []
    for calibration in (None, Calibration({layer: (head,)}, BETA, THRESHOLD.value)):
        with torch.no_grad(), attention_hook(model, ReferenceAttention(calibration)) as hooked:
            scores = [choice_scores(TorchLanguageModel(hooked), [example])[0] for example in batch]
        right = sum(predicted_choice(row.tolist()) == e.answer for row, e in zip(scores, batch, strict=True))
        results.append((log_likelihoods(batch, scores).sum().item(), right))
    (plain, plain_right), (calibrated, calibrated_right) = results
    return calibrated - plain, calibrated_right - plain_right


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "batch"),
    [*product(["llama", "mistral", "gemma2"], [ONE_TOKEN, MIXED]), ("gpt_oss", MIXED)],
    ids=lambda given: given if isinstance(given, str) else "one token" if given is ONE_TOKEN else "mixed",
)
def test_effects_are_those_of_switching_each_head_on(
    name: str, batch: list[EncodedExample], request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    plain = PlainRun(model, batch, **SHAPE, threshold=THRESHOLD)
    changed = 0
    for layer in range(3):
        for batch_tokens in (None, 1, 20):
            effects = plain.effects(layer, beta=BETA, batch_tokens=batch_tokens)
            for head in range(4):
                gain, right = naive(model, batch, layer, head)
                assert effects.log_likelihood[head] == pytest.approx(gain, abs=2e-6)
                assert effects.correct[head] == right
                changed += abs(gain) > 1e-4
    assert changed > 6


def test_pairs_without_later_sinks_are_not_run(llama: PreTrainedModel) -> None:
    """They would change nothing; a pass from a layer on counts as the share of layers that it runs."""
    everything = PlainRun(llama, ONE_TOKEN, **SHAPE, threshold=Threshold(1e-6))
    assert everything.has_sinks.all()
    assert [everything.effects(layer, beta=BETA).passes for layer in range(3)] == pytest.approx([12, 8, 4])
    nothing = PlainRun(llama, ONE_TOKEN, **SHAPE, threshold=Threshold(1.0))
    assert not nothing.has_sinks.any()
    assert nothing.effects(0, beta=BETA).passes == 0
    assert nothing.effects(0, beta=BETA).log_likelihood == (0.0,) * 4
    some = PlainRun(llama, ONE_TOKEN, **SHAPE, threshold=Threshold(0.4))
    assert some.has_sinks[0].sum() > 0
    assert some.effects(0, beta=BETA).passes == some.has_sinks[0].sum() < 12


def test_only_the_heads_asked_for_are_run(llama: PreTrainedModel) -> None:
    plain = PlainRun(llama, ONE_TOKEN, **SHAPE, threshold=Threshold(1e-6))
    every, some = plain.effects(1, beta=BETA), plain.effects(1, [2], beta=BETA)
    assert some.passes == pytest.approx(every.passes / 4)
    assert some.log_likelihood[2] == pytest.approx(every.log_likelihood[2], abs=1e-9)
    assert [some.log_likelihood[head] for head in (0, 1, 3)] == [0, 0, 0]


def test_layers_below_are_not_computed_again(llama: PreTrainedModel) -> None:
    plain = PlainRun(llama, MIXED, **SHAPE, threshold=Threshold(1e-6))
    calls: list[int] = []
    for index, layer in enumerate(decoder_layers(llama, 3)):
        layer.self_attn.register_forward_pre_hook(lambda *_, index=index: calls.append(index))
    plain.effects(2, beta=BETA)
    assert calls == [2, 2]  # the prompts, and the choices that go on


def test_a_model_without_a_list_of_layers_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ActExportError, match="no list of 5 decoder layers"):
        decoder_layers(llama, 5)
