from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluation import evaluate
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration, Provenance
from act_export.errors import ActExportError
from act_export.tasks import Example, TaskError, prompt_digest, split_examples
from act_export.tasks import batching as batching_module
from act_export.tasks.batching import Batching
from act_export.tasks.language_model import SessionLanguageModel, TorchLanguageModel
from act_export.tasks.statistics import accuracy_interval, gain_interval, mcnemar_p
from act_export.verify.evaluate.answers import Evaluation, compare
from act_export.verify.evaluate.held_out import held_out

QUESTIONS = [Example(prompt, (" n", " y"), len(prompt) % 2) for prompt in ("is it", "is it not so", "why", "so", "and")]


class Letters:
    def __len__(self) -> int:
        return 128

    def __call__(self, text: str) -> Any:
        return SimpleNamespace(input_ids=[ord(letter) for letter in text])


LETTERS = Letters()


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


SIZES = {"rank": 3, "choose": 4, "report": 8}
DATA = [Example(f"prompt {index}", (" n", " y"), index % 2) for index in range(20)]


def searched(data: list[Example], seed: int, *, recorded: bool = True) -> Calibration:
    """What a search of this data with this seed leaves behind."""
    splits = split_examples(data, **SIZES, seed=seed)
    used = [prompt_digest(example.prompt) for example in (*splits.rank, *splits.choose)]
    return Calibration({}, provenance=Provenance("gates", (), SIZES, seed, notes={"used": used} if recorded else {}))


def of(correct: list[bool]) -> Evaluation:
    """An evaluation with these right answers; the right choice is always 1."""
    return Evaluation(((0.0, 0.0),) * len(correct), tuple(map(int, correct)), (1,) * len(correct))


def test_every_example_is_answered_with_its_likeliest_choice() -> None:
    counts: list[int] = []
    model = Stubborn({" ": 0.0, "y": 2.0, "n": 1.0})
    evaluation = evaluate(model, LETTERS, QUESTIONS, Batching(2, done=counts.append))
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
    sums, means = (evaluate(model, LETTERS, [example], length_normalized=flag) for flag in (False, True))
    assert (sums.predictions, means.predictions) == ((1,), (0,))


def test_a_session_and_the_model_it_was_exported_from_agree() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)

    class Session:
        """The interface of `act_export.runtime.Session`, run by PyTorch."""

        def run(
            self, input_ids: np.ndarray, attention_mask: np.ndarray, state: Any = None, *, logits_to_keep: int = 0
        ) -> Any:
            past = None
            if state is not None:
                layers = [[torch.from_numpy(state[f"{layer}.{part}"]) for part in range(3)] for layer in range(2)]
                past = [type(self).layer(*parts) for parts in layers]
            logits, present = hooked(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), past)
            type(self).layer = type(present[0])
            arrays = {f"{i}.{j}": part.numpy() for i, layer in enumerate(present) for j, part in enumerate(layer)}
            return SimpleNamespace(logits=logits.numpy()[:, -logits_to_keep:], state=arrays)

    with attention_hook(model, ReferenceAttention(None)) as hooked, torch.no_grad():
        by_torch = evaluate(TorchLanguageModel(hooked), LETTERS, QUESTIONS, Batching(2))
        by_session = evaluate(SessionLanguageModel(Session()), LETTERS, QUESTIONS, Batching(3))
    assert by_torch.predictions == by_session.predictions
    for mine, theirs in zip(by_torch.log_likelihoods, by_session.log_likelihoods, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5, rel=1e-5)
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
    with pytest.raises(ActExportError, match="have 2 and 3 examples with different answers; compare two models on the"):
        compare(of([True, False]), of([True, False, True]))


def test_what_cannot_be_scored_is_refused() -> None:
    with pytest.raises(TaskError, match="the model has no tokenizer"):
        evaluate(Stubborn({}), None, QUESTIONS)
    with pytest.raises(TaskError, match="there are no examples to score"):
        evaluate(Stubborn({}), LETTERS, [])
    with pytest.raises(ActExportError, match="after the prompt 'is it not so' are"):
        evaluate(Stubborn({" ": float("nan")}), LETTERS, QUESTIONS)


def test_batches_shrink_so_that_their_logits_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching_module, "LOGITS_BYTES", 4 * 128 * 40)  # 40 positions of 128 logits
    model = Stubborn({" ": 0.0, "y": 2.0, "n": 1.0})
    counts: list[int] = []
    fitting = Batching(tokens=batching_module.default_batch_tokens(LETTERS), done=counts.append)
    evaluation = evaluate(model, LETTERS, QUESTIONS, fitting)
    assert counts == [1, 2, 2]  # of 12; 5 and 3; 3 and 2 letters, each again for either choice
    assert evaluation == evaluate(model, LETTERS, QUESTIONS)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "drawn again"])
@pytest.mark.parametrize("seed", [0, 5])
def test_a_searched_model_is_measured_on_what_its_own_search_left(seed: int, recorded: bool) -> None:
    calibration = searched(DATA, seed, recorded=recorded)
    splits = split_examples(DATA, **SIZES, seed=seed)
    for asked in (None, seed):
        assert tuple(held_out(DATA, [calibration, None], split="report", seed=asked)) == splits.report
    others = held_out(DATA, [None, calibration], split="held-out")
    assert set(others) == set(DATA) - {*splits.rank, *splits.choose}
    assert held_out(DATA, [calibration], split="all", seed=17) == DATA


@given(seed=st.integers(0, 9), added=st.integers(0, 20), removed=st.sets(st.integers(0, 19), max_size=5))
def test_no_used_prompt_is_counted_after_the_data_changed(seed: int, added: int, removed: set[int]) -> None:
    calibration = searched(DATA, seed)
    kept = [example for index, example in enumerate(DATA) if index not in removed]
    data = kept + [Example(f"added {index}", (" n", " y"), 0) for index in range(added)]
    used = set(calibration.provenance.notes["used"])
    assert used
    for split in ("report", "held-out"):
        for example in held_out(data, [calibration], split=split):
            assert prompt_digest(example.prompt) not in used


def test_models_of_two_searches_are_measured_on_what_neither_used() -> None:
    first, second = searched(DATA, 1), searched(DATA, 2)
    used = {*first.provenance.notes["used"], *second.provenance.notes["used"]}
    left = held_out(DATA, [first, second], split="held-out")
    assert {prompt_digest(example.prompt) for example in DATA} - used == {prompt_digest(e.prompt) for e in left}
    for seed, drawn in ((None, 1), (1, 1), (2, 2)):
        report = split_examples(DATA, **SIZES, seed=drawn).report
        left = held_out(DATA, [first, second], split="report", seed=seed)
        assert list(left) == [example for example in report if prompt_digest(example.prompt) not in used]


def test_models_that_were_not_searched_are_measured_on_the_splits_of_the_seed() -> None:
    data = [Example(f"prompt {index}", (" n", " y"), 0) for index in range(500)]
    by_hand = Calibration({0: (1,)}, provenance=Provenance("by hand"))
    for seed in (None, 3):
        splits = split_examples(data, seed=seed or 0)
        assert tuple(held_out(data, [None, by_hand], split="report", seed=seed)) == splits.report
        others = held_out(data, [None], split="held-out", seed=seed)
        assert set(others) == set(data) - {*splits.rank, *splits.choose}


def test_what_cannot_be_held_out_is_refused() -> None:
    calibration = searched(DATA, 5)
    for split in ("report", "held-out"):
        with pytest.raises(
            ActExportError, match="the seed is 0, but the heads were searched with seed 5; leave it out"
        ):
            held_out(DATA, [None, calibration], split=split, seed=0)
    with pytest.raises(ActExportError, match="there is no split 'test'; pass report, held-out or all"):
        held_out(DATA, [calibration], split="test")
    with pytest.raises(
        TaskError, match=r"splits can't be drawn again: there are 9 different .*; or pass another split"
    ):
        held_out(DATA[:9], [calibration], split="report")
    used = [e for e in DATA if prompt_digest(e.prompt) in calibration.provenance.notes["used"]]
    with pytest.raises(ActExportError, match="ranked or chosen with all of these examples"):
        held_out(used, [calibration], split="held-out")
