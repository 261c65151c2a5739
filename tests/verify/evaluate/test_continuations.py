from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from act_export.runtime import Session, generate
from act_export.tasks import EncodedExample
from act_export.tasks.batching import Batching, positions_of
from act_export.tasks.language_model import SessionLanguageModel
from act_export.tasks.scoring import score_choices
from act_export.verify.evaluate.continuations import Continuation, passes, score_continuations

tokens = st.lists(st.integers(3, 40), min_size=1, max_size=6).map(tuple)
continuations = st.lists(
    st.builds(Continuation, st.sampled_from([(3,), (4, 5), (6, 7, 8, 9), tuple(range(3, 33))]), tokens),
    min_size=1,
    max_size=12,
)


@pytest.fixture(scope="module")
def model(tiny_file) -> SessionLanguageModel:
    return SessionLanguageModel(Session.open(tiny_file))


@pytest.mark.in_turn(2)
@given(asked=continuations, batch_tokens=st.one_of(st.none(), st.integers(1, 100)))
@example(asked=[Continuation((6, 7, 8, 9), (3,)), Continuation((4, 5), (23, 13, 13, 37, 3))], batch_tokens=None)
def test_log_likelihoods_are_those_of_choices(
    model: SessionLanguageModel, asked: list[Continuation], batch_tokens: int | None
) -> None:
    found = score_continuations(model, asked, Batching(tokens=batch_tokens))
    for (log_likelihood, _), one in zip(found, asked, strict=True):
        ((alone,),) = score_choices(model, [EncodedExample(one.context, (one.tokens,), 0)])
        assert log_likelihood == pytest.approx(alone, abs=1e-5, rel=1e-5)


@given(context=tokens, wrong=st.integers(0, 4))
def test_greedy_is_what_generation_says(model: SessionLanguageModel, context: tuple[int, ...], wrong: int) -> None:
    (said,) = generate(model.session, [context], max_new_tokens=5)
    other = list(said)
    other[wrong] = 3 if said[wrong] != 3 else 4
    asked = [Continuation(context, tuple(said)), Continuation(context, tuple(other)), Continuation(context, ())]
    asked += [Continuation(context, tuple(said[:2]))]
    assert [greedy for _, greedy in score_continuations(model, asked)] == [True, False, True, True]
    assert score_continuations(model, asked)[2][0] == 0.0


def test_a_context_runs_once_for_all_that_may_follow() -> None:
    calls: list[tuple[int, ...]] = []

    class Counting:
        def __call__(self, input_ids, attention_mask, state):
            calls.append(tuple(input_ids.shape))
            return torch.zeros(len(input_ids), 50), len(input_ids)

        def select(self, state, rows):
            return len(rows)

    score_continuations(Counting(), [Continuation((1, 2, 3), (token,)) for token in (4, 5, 6, 5)])
    assert calls == [(1, 3)]


@given(asked=continuations, batch_tokens=st.integers(1, 100))
def test_passes_hold_every_continuation_once_and_few_tokens(asked: list[Continuation], batch_tokens: int) -> None:
    found = passes(asked, batch_tokens)
    flat = [Continuation(example.prompt, choice) for example in found for choice in example.choices]
    assert sorted(flat, key=repr) == sorted(set(asked), key=repr)
    for one in found:
        assert len(one.choices) == 1 or positions_of([one]) <= batch_tokens
    assert len(passes(asked)) == len({one.context for one in asked})
