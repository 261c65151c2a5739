from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from act_export.hooks import ReferenceAttention, attention_hook
from act_export.tasks import Example, TaskError
from act_export.tasks.statistics import accuracy_interval, gain_interval, mcnemar_p
from act_export.verify.evaluate import Evaluation, EvaluationError, compare, evaluate

QUESTIONS = [Example(prompt, (" n", " y"), len(prompt) % 2) for prompt in ("is it", "is it not so", "why", "so", "and")]


class Letters:
    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


class Stubborn:
    """A language model that finds every letter as likely as its favour says."""

    def __init__(self, favour: dict[str, float]) -> None:
        self.logits = torch.full((128,), -20.0)
        for letter, logit in favour.items():
            self.logits[ord(letter)] = logit

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, state: None) -> tuple[Tensor, None]:
        return self.logits.repeat(len(input_ids), 1), None

    def select(self, state: None, rows: Tensor) -> None:
        return None


def of(correct: list[bool]) -> Evaluation:
    """An evaluation with these right answers; the right choice is always 1."""
    return Evaluation(((0.0, 0.0),) * len(correct), tuple(map(int, correct)), (1,) * len(correct))


def test_every_example_is_answered_with_its_likeliest_choice() -> None:
    counts: list[int] = []
    model = Stubborn({" ": 0.0, "y": 2.0, "n": 1.0})
    evaluation = evaluate(model, Letters(), QUESTIONS, batch_size=2, on_batch=counts.append)
    assert evaluation.predictions == (1,) * 5
    assert evaluation.answers == (1, 0, 1, 0, 1)
    assert evaluation.correct == (True, False, True, False, True)
    assert evaluation.accuracy == 0.6
    assert evaluation.interval == accuracy_interval(3, 5)
    assert counts == [2, 2, 1]
    log_probs = model.logits.log_softmax(-1)
    both = [(log_probs[32] + log_probs[ord(letter)]).item() for letter in "ny"]
    for row in evaluation.log_likelihoods:
        assert row == pytest.approx(both)


def test_length_normalization_reaches_the_scores() -> None:
    example = Example("?", ("yy", "n"), 0)
    model = Stubborn({"y": 0.0, "n": -0.1})
    sums, means = (evaluate(model, Letters(), [example], length_normalized=flag) for flag in (False, True))
    assert (sums.predictions, means.predictions) == ((1,), (0,))


def test_a_session_and_the_model_it_was_exported_from_agree() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)

    class Session:
        """The interface of `act_export.runtime.Session`, run by PyTorch."""

        def run(self, input_ids: np.ndarray, attention_mask: np.ndarray, state: Any = None) -> Any:
            past = None
            if state is not None:
                layers = [[torch.from_numpy(state[f"{layer}.{part}"]) for part in range(3)] for layer in range(2)]
                past = [type(self).layer(*parts) for parts in layers]
            logits, present = hooked(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), past)
            type(self).layer = type(present[0])
            arrays = {f"{i}.{j}": part.numpy() for i, layer in enumerate(present) for j, part in enumerate(layer)}
            return SimpleNamespace(logits=logits.numpy(), state=arrays)

    with attention_hook(model, ReferenceAttention(None)) as hooked, torch.no_grad():
        by_torch = evaluate(hooked, Letters(), QUESTIONS, batch_size=2)
        by_session = evaluate(Session(), Letters(), QUESTIONS, batch_size=3)
    assert by_torch.predictions == by_session.predictions
    for mine, theirs in zip(by_torch.log_likelihoods, by_session.log_likelihoods, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)
    assert len(set(by_torch.log_likelihoods)) == len(QUESTIONS)


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_a_comparison_is_that_of_the_paired_answers(pairs: list[tuple[bool, bool]]) -> None:
    before, after = map(list, zip(*pairs, strict=True))
    comparison = compare(of(before), of(after))
    assert comparison.gain == pytest.approx(of(after).accuracy - of(before).accuracy)
    assert comparison.interval == gain_interval(before, after)
    assert comparison.p == mcnemar_p(before, after)
    assert comparison.gained == sum(new and not old for old, new in pairs)
    assert comparison.lost == sum(old and not new for old, new in pairs)


def test_evaluations_of_other_examples_are_not_compared() -> None:
    with pytest.raises(
        EvaluationError, match="have 2 and 3 examples with different answers; compare two models on the"
    ):
        compare(of([True, False]), of([True, False, True]))


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(TaskError, match="the model has no tokenizer"):
        evaluate(Stubborn({}), None, QUESTIONS)
    with pytest.raises(TaskError, match="there are no examples to score"):
        evaluate(Stubborn({}), Letters(), [])
