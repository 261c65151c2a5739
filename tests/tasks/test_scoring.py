from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.calibration.file import Calibration
from act_export.errors import ActExportError
from act_export.tasks import EncodedExample
from act_export.tasks.batching import Batching, batches, positions_of
from act_export.tasks.language_model import SessionLanguageModel, TorchLanguageModel
from act_export.tasks.scoring import predicted_choice, score_choices, scores_of_choices

VOCABULARY = 23
token = st.integers(0, VOCABULARY - 1)
tokens = st.lists(token, min_size=1, max_size=5).map(tuple)


@st.composite
def an_example(draw: st.DrawFn) -> EncodedExample:
    choices = draw(st.lists(tokens, min_size=1, max_size=4, unique=True))
    return EncodedExample(draw(tokens), tuple(choices), 0)


class Recurrent:
    """A small recurrent language model: what it says depends on every real token and on their order."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, 8, generator=generator, dtype=torch.float64)
        self.turn = torch.randn(8, 8, generator=generator, dtype=torch.float64) / 3
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        self.calls.append(tuple(input_ids.shape))
        assert input_ids.dtype == attention_mask.dtype == torch.int64
        if state is None:
            state = torch.zeros(len(input_ids), 8, dtype=torch.float64)
            assert attention_mask.shape == input_ids.shape
        real = attention_mask[:, -input_ids.shape[1] :]
        for step in range(input_ids.shape[1]):
            stepped = torch.tanh(state @ self.turn + self.embedding[input_ids[:, step]])
            state = torch.where(real[:, step, None] > 0, stepped, state)
        return state @ self.embedding.T, state

    def select(self, state: Tensor, rows: Tensor) -> Tensor:
        return state[rows]


class RecurrentSession:
    """The same as an ONNX Runtime session: arrays, a state by name, logits of the last position."""

    def __init__(self) -> None:
        self.model = Recurrent()

    def run(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, state: Any = None, *, logits_to_keep: int = 0
    ) -> Any:
        assert logits_to_keep == 1
        before = None if state is None else torch.from_numpy(state["past"])
        logits, after = self.model(torch.from_numpy(input_ids), torch.from_numpy(attention_mask), before)
        return SimpleNamespace(logits=logits.numpy()[:, None], state={"past": after.numpy()})


def brute_force(example: EncodedExample) -> list[float]:
    """Each choice alone, token by token, without batch, padding or state."""
    model = Recurrent()
    scores = []
    for choice in example.choices:
        total = 0.0
        for position, following in enumerate(choice):
            text = torch.tensor([example.prompt + choice[:position]])
            total += model(text, torch.ones_like(text), None)[0][0].log_softmax(-1)[following].item()
        scores.append(total)
    return scores


@given(examples=st.lists(an_example(), min_size=1, max_size=7), batch_size=st.integers(1, 4))
def test_scores_are_those_of_every_choice_alone(examples: list[EncodedExample], batch_size: int) -> None:
    expected = [brute_force(example) for example in examples]
    scores = score_choices(Recurrent(), examples, Batching(batch_size))
    for row, brute in zip(scores, expected, strict=True):
        assert row == pytest.approx(brute, abs=1e-9)
    by_session = score_choices(SessionLanguageModel(RecurrentSession()), examples, Batching(batch_size))
    for row, brute in zip(by_session, expected, strict=True):
        assert row == pytest.approx(brute, abs=1e-4, rel=1e-4)


@given(example=an_example())
def test_length_normalized_scores_are_per_token(example: EncodedExample) -> None:
    ((*plain,),) = score_choices(Recurrent(), [example])
    ((*normalized,),) = score_choices(Recurrent(), [example], length_normalized=True)
    assert normalized == pytest.approx([score / len(c) for score, c in zip(plain, example.choices, strict=True)])


@st.composite
def by_first_token(draw: st.DrawFn) -> EncodedExample:
    choices = draw(st.lists(token, min_size=1, max_size=4, unique=True))
    return EncodedExample(draw(tokens), tuple((first,) for first in choices), 0, first_token=True)


@given(examples=st.lists(st.one_of(by_first_token(), an_example()), min_size=1, max_size=7), size=st.integers(1, 4))
def test_by_the_first_token_the_whole_vocabulary_is_compared(examples: list[EncodedExample], size: int) -> None:
    for model in (Recurrent(), SessionLanguageModel(RecurrentSession())):
        for example, row in zip(examples, score_choices(model, examples, Batching(size)), strict=True):
            if not example.first_token:
                assert row == pytest.approx(brute_force(example), abs=1e-4, rel=1e-4)
                continue
            text = torch.tensor([example.prompt])
            (logits,) = Recurrent()(text, torch.ones_like(text), None)[0]
            shares = logits.softmax(-1).tolist()
            firsts = [choice[0] for choice in example.choices]
            others = max(share for token, share in enumerate(shares) if token not in firsts)
            assert np.exp(row) == pytest.approx([*(shares[first] for first in firsts), others], abs=1e-5, rel=1e-4)
            assert (*firsts, None)[predicted_choice(row)] == (int(logits.argmax()) if max(shares) > others else None)
            assert scores_of_choices([row], [example]) == [row[:-1]]


def test_first_tokens_take_one_pass_and_are_the_greedy_ones() -> None:
    model = Recurrent()
    prompts = [(1, 2, 3), (4,), (7, 7), (20, 1)]
    rows = score_choices(model, [EncodedExample(p, ((5,), (9,)), 0, first_token=True) for p in prompts])
    assert len(model.calls) == 1
    greedy = [int(model(torch.tensor([p]), torch.ones(1, len(p)).long(), None)[0].argmax()) for p in prompts]
    assert [predicted_choice(row) == 2 for row in rows] == [token not in (5, 9) for token in greedy]


def test_one_token_answers_take_one_pass_and_longer_ones_only_their_own_steps() -> None:
    model = Recurrent()
    score_choices(model, [EncodedExample((1, 2, 3), ((4,), (5,)), 0)] * 5)
    assert model.calls == [(5, 3)]
    model.calls.clear()
    score_choices(model, [EncodedExample((1, 2), ((4,), (5, 6), (7, 8, 9)), 0), EncodedExample((1,), ((4,), (5,)), 0)])
    assert model.calls == [(2, 2), (2, 1), (1, 1)]


@given(examples=st.lists(an_example(), min_size=1, max_size=20), batch_size=st.integers(1, 6))
def test_batches_hold_every_example_once_sorted_by_length(examples: list[EncodedExample], batch_size: int) -> None:
    parts = list(batches(examples, Batching(batch_size)))
    flat = [index for part in parts for index in part]
    assert sorted(flat) == list(range(len(examples)))
    assert all(len(part) == batch_size for part in parts[:-1])
    lengths = [len(examples[index].prompt) for index in flat]
    assert lengths == sorted(lengths, reverse=True)


@given(
    examples=st.lists(an_example(), min_size=1, max_size=20),
    batch_size=st.none() | st.integers(1, 6),
    tokens=st.integers(1, 40),
)
def test_batches_stay_within_their_tokens(examples: list[EncodedExample], batch_size: int | None, tokens: int) -> None:
    parts = list(batches(examples, Batching(batch_size, tokens)))
    assert [i for part in parts for i in part] == [i for part in batches(examples, Batching(None)) for i in part]
    for part, following in zip(parts, [*parts[1:], []], strict=True):
        held = positions_of([examples[index] for index in part])
        assert len(part) == 1 or (held <= tokens and len(part) <= (batch_size or 20))
        grown = positions_of([examples[index] for index in [*part, *following[:1]]])
        assert not following or len(part) == batch_size or grown > tokens


def test_positions_are_those_of_the_prompts_and_of_each_choice_that_goes_on() -> None:
    one_token = [EncodedExample((1, 2, 3), ((4,), (5,)), 0), EncodedExample((1,), ((4,), (5,)), 0)]
    assert positions_of(one_token) == 2 * 3
    longer = EncodedExample((1, 2), ((4,), (5, 6), (7, 8, 9)), 0)
    assert positions_of([*one_token, longer]) == 3 * 3 + 2 * (3 + 2)


class AtOnce(Recurrent):
    """Computes what decoding would give in one pass."""

    def continue_at_once(self, input_ids: Tensor, following: Tensor, attention_mask: Tensor, state: Tensor) -> Tensor:
        logits = []
        for end in range(1, input_ids.shape[1] + 1):
            mask = attention_mask[:, : attention_mask.shape[1] - input_ids.shape[1] + end]
            step, state = super().__call__(input_ids[:, end - 1 : end], mask, state)
            logits.append(step)
        return torch.stack(logits, 1).log_softmax(-1).gather(2, following[..., None])[..., 0]


@given(examples=st.lists(an_example(), min_size=1, max_size=7), batch_size=st.integers(1, 4))
def test_a_model_that_continues_at_once_gives_the_same(examples: list[EncodedExample], batch_size: int) -> None:
    at_once = score_choices(AtOnce(), examples, Batching(batch_size))
    for row, example in zip(at_once, examples, strict=True):
        assert row == pytest.approx(brute_force(example), abs=1e-9)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_scores_that_are_no_numbers_are_refused_with_the_prompt(wrong: float) -> None:
    def broken(input_ids: Tensor, attention_mask: Tensor, state: None) -> tuple[Tensor, None]:
        logits = torch.zeros(len(input_ids), VOCABULARY)
        logits[input_ids[:, -1] == 7, 3] = wrong
        return logits, None

    good = EncodedExample((1, 2), ((3,), (4,)), 0, "'the good one'")
    bad = EncodedExample((1, 7), ((3,), (4,)), 0, "'the bad one'")
    assert len(score_choices(broken, [good, good])) == 2
    with pytest.raises(ActExportError, match=r"after the prompt 'the bad one' are \[.*, not all finite numbers"):
        score_choices(broken, [good, bad, good])


def test_progress_counts_every_example() -> None:
    counts: list[int] = []
    score_choices(Recurrent(), [EncodedExample((1,), ((2,), (3,)), 0)] * 7, Batching(3, done=counts.append))
    assert counts == [3, 3, 1]


@given(scores=st.lists(st.integers(-5, 0).map(float), min_size=1))
def test_of_equally_likely_choices_the_first_is_predicted(scores: list[float]) -> None:
    assert predicted_choice(scores) == int(np.argmax(scores))


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model


@settings(max_examples=20)
@given(examples=st.lists(an_example(), min_size=1, max_size=4))
def test_a_calibrated_answer_is_decoded_as_generation_would(
    llama: PreTrainedModel, examples: list[EncodedExample]
) -> None:
    hook = ReferenceAttention(Calibration({0: (0, 3), 1: (1,)}, beta=0.0, threshold=0.05))
    with attention_hook(llama, hook) as hooked, torch.no_grad():
        scores = score_choices(TorchLanguageModel(hooked), examples, Batching(3))
        for example, row in zip(examples, scores, strict=True):
            for choice, score in zip(example.choices, row, strict=True):
                logits, state = hooked(torch.tensor([example.prompt]), torch.ones(1, len(example.prompt)).long())
                total = logits[0, -1].log_softmax(-1)[choice[0]].item()
                for position in range(1, len(choice)):
                    mask = torch.ones(1, len(example.prompt) + position).long()
                    logits, state = hooked(torch.tensor([[choice[position - 1]]]), mask, state)
                    total += logits[0, -1].log_softmax(-1)[choice[position]].item()
                assert score == pytest.approx(total, abs=1e-4, rel=1e-4)


def test_the_calibrated_answer_differs_from_one_calibrated_with_its_prompt(llama: PreTrainedModel) -> None:
    """Else the test above could not tell the two apart."""
    example = EncodedExample((3, 1, 4, 1, 5), ((9, 2, 6, 5),), 0)
    hook = ReferenceAttention(Calibration({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}, beta=0.0, threshold=0.05))
    with attention_hook(llama, hook) as hooked, torch.no_grad():
        ((decoded,),) = score_choices(TorchLanguageModel(hooked), [example])
        text = torch.tensor([example.prompt + example.choices[0]])
        log_probs = hooked(text, torch.ones_like(text)).logits[0].log_softmax(-1)
    together = sum(log_probs[4 + i, token].item() for i, token in enumerate(example.choices[0]))
    assert abs(decoded - together) > 1e-2
