"""A search that counts an answer as right only if the model's greedy first token is its first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from planted import PLANTED, planted_task, words_checkpoint

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.checkpoint.load import Checkpoint
from act_export.search import SearchOptions, search_heads
from act_export.search.answers import REPORT, answer, encode_task
from act_export.search.processes import Workers
from act_export.search.request import RANKINGS

OPTIONS = SearchOptions(methods=("act",), betas=(0.0,), head_counts=(1, 2, 4), confirm=4)


@pytest.fixture
def checkpoint() -> Checkpoint:
    return words_checkpoint()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("ranking", RANKINGS)
def test_first_tokens(checkpoint: Checkpoint, ranking: str) -> None:
    """Nearly all words are choices, or a model that is no language's would hardly say one of them."""
    choices = tuple(f" w{token} w4" for token in range(6, 99))
    task = planted_task(checkpoint, PLANTED, choices=choices, first_token=True)
    result = search_heads(checkpoint, [task], replace(OPTIONS, ranking=ranking))
    assert result.calibrations["planted"].heads == PLANTED.heads
    assert result.reports["planted"].plain_accuracy < result.reports["planted"].own.accuracy

    encoded = encode_task(checkpoint, task)
    both = [(encoded, REPORT, None), (encoded, REPORT, PLANTED)]
    for (_, _, calibration), found in zip(both, answer(checkpoint, both, OPTIONS, Workers(), step=""), strict=True):
        said, log_likelihoods = [], []
        with attention_hook(checkpoint.model, ReferenceAttention(calibration)) as hooked, torch.no_grad():
            for example in encoded.splits[REPORT]:
                logits = hooked(torch.tensor([example.prompt]), torch.ones(1, len(example.prompt)).long()).logits[0, -1]
                said.append(int(logits.argmax()) - 6)
                log_likelihoods.append(logits.log_softmax(-1)[example.answer + 6].item())
        valid = [0 <= choice < len(choices) for choice in said]
        right = [choice == example.answer for choice, example in zip(said, encoded.splits[REPORT], strict=True)]
        assert found.credits == tuple(right)
        assert found.valid == tuple(valid)
        assert 0 < found.invalid == pytest.approx(valid.count(False) / len(valid))
        assert found.valid_accuracy == pytest.approx(sum(right) / sum(valid))
        assert found.log_likelihood == pytest.approx(sum(log_likelihoods) / len(log_likelihoods), abs=1e-5)
        assert {len(row) for row in found.scores} == {len(choices)}
    letters = replace(encoded, splits={REPORT: [replace(e, first_token=False) for e in encoded.splits[REPORT]]})
    assert encoded.digest != letters.digest


def test_beyond_a_remedy_heads_are_found_that_no_answer_shows(checkpoint: Checkpoint) -> None:
    """The model says a word that is no choice, and of the choices the first; its heads know better."""
    task = planted_task(checkpoint, PLANTED, choices=(" w97", " w98"), first_token=True)
    output = checkpoint.model.get_output_embeddings()
    bias = torch.zeros(output.out_features)
    bias[50], bias[97] = 20.0, 5.0
    output.bias = torch.nn.Parameter(bias)
    as_it_is, beyond = (
        search_heads(checkpoint, [task], replace(OPTIONS, methods=("act", "fit"), goal=goal))
        for goal in ("accuracy", "beyond-remedy")
    )
    assert not as_it_is.calibrations["planted"].heads  # no answer is valid
    report, found = beyond.reports["planted"], beyond.calibrations["planted"]
    assert found.heads
    assert found.provenance.notes["goal"] == "beyond-remedy"
    assert report.control in ("choice bias", "offsets", "label prior")
    assert report.own.accuracy < 0.1
    assert report.with_remedy.accuracy > report.controls[report.control]
    assert found.provenance.notes["gain_with_remedy_on_both"]["gain"] == report.with_remedy.gain
