from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CALIBRATION, tiny_tokenizer
from torch import Tensor

from act_export.attention.hook import attention_hook
from act_export.attention.reference_attention import ReferenceAttention
from act_export.checkpoint.load import Checkpoint
from act_export.errors import ActExportError
from act_export.runtime import Sampling, Session, generate
from act_export.tasks import EncodedExample
from act_export.tasks.batching import Batching
from act_export.tasks.generation import cut_at_stop, generate_answers
from act_export.tasks.language_model import SessionLanguageModel, TorchLanguageModel

TOKENIZER = tiny_tokenizer()
EOS = TOKENIZER.eos_token_id
prompts_of_any_length = st.lists(
    st.lists(st.integers(3, 258), min_size=1, max_size=30).map(tuple), min_size=1, max_size=6
)


def encoded(prompts: Sequence[Sequence[int]]) -> list[EncodedExample]:
    return [EncodedExample(tuple(prompt), (), 0, f"number {index}") for index, prompt in enumerate(prompts)]


def tokens_of(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False).input_ids)


class Script:
    """A language model that says, after a prompt, what is written for the prompt's first token, and then ends."""

    def __init__(self, lines: dict[int, Sequence[int]]) -> None:
        self.lines = lines
        self.calls: list[tuple[int, int]] = []

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor, state: list[tuple[int, int]] | None
    ) -> tuple[Tensor, list[tuple[int, int]]]:
        self.calls.append((input_ids.shape[0], input_ids.shape[1]))
        if state is None:
            state = [(int(ids[mask > 0][0]), 0) for ids, mask in zip(input_ids, attention_mask, strict=True)]
        logits = torch.zeros(len(state), len(TOKENIZER))
        for row, (line, position) in enumerate(state):
            tokens = (*self.lines[line], EOS)
            logits[row, tokens[position]] = 1
            if position:
                assert input_ids[row, -1] == tokens[position - 1]
        return logits, [(line, position + 1) for line, position in state]

    def select(self, state: list[tuple[int, int]], rows: Tensor) -> list[tuple[int, int]]:
        return [state[row] for row in rows.tolist()]


def say(lines: Sequence[Sequence[int]], **options: Any) -> tuple[list[str], Script]:
    """What becomes of these lines, each for a prompt of its own."""
    model = Script({10 + index: line for index, line in enumerate(lines)})
    examples = encoded([(10 + index, *range(3, 3 + index)) for index in range(len(lines))])
    options = {"max_new_tokens": max(map(len, lines)), **options}
    return generate_answers(model, examples, tokenizer=TOKENIZER, **options), model


@pytest.mark.in_turn(2)
@given(prompts=prompts_of_any_length, batch_size=st.integers(1, 3))
def test_answers_of_a_session_are_those_of_generate(
    tiny_file_session: Session, prompts: list[tuple[int, ...]], batch_size: int
) -> None:
    texts = generate_answers(
        SessionLanguageModel(tiny_file_session),
        encoded(prompts),
        Batching(batch_size),
        tokenizer=TOKENIZER,
        max_new_tokens=9,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        (tokens,) = generate(tiny_file_session, [prompt], max_new_tokens=9, stop_tokens={EOS})
        assert text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny_file_session(tiny_file) -> Session:
    return Session.open(tiny_file)


def test_pytorch_and_onnx_runtime_say_the_same(tiny: Checkpoint, tiny_file_session: Session) -> None:
    examples = encoded([tokens_of(text) for text in ("One light, two ships", "And", "?" * 40)])
    options = {"tokenizer": TOKENIZER, "max_new_tokens": 12}
    by_session = generate_answers(SessionLanguageModel(tiny_file_session), examples, **options)
    with attention_hook(tiny.model, ReferenceAttention(CALIBRATION)) as hooked:
        by_torch = generate_answers(TorchLanguageModel(hooked), examples, Batching(1), **options)
    assert by_session == by_torch
    assert all(by_session)


def test_an_answer_ends_before_the_first_stop_text() -> None:
    lines = [tokens_of(text) for text in ("red\nblue##", "red##blue\n", "no end", "##")]
    texts, model = say(lines, stop=("\n", "##"), max_new_tokens=20)
    assert texts == ["red", "red", "no end", ""]
    assert len(model.calls) == 7  # those of "no end" and its end, not of what would come after a stop


def test_an_answer_ends_before_a_stop_token() -> None:
    lines = [(*tokens_of("one"), EOS, *tokens_of("more")), (*tokens_of("two"), 1, *tokens_of("more")), tokens_of("six")]
    for options, second in (({}, "twomore"), ({"stop_tokens": (1,)}, "two"), ({"stop": ("<s>",)}, "two")):
        assert say(lines, max_new_tokens=9, **options)[0] == ["one", second, "six"]


def test_a_sequence_leaves_its_batch_when_it_has_ended() -> None:
    texts, model = say([tokens_of("a" * length) for length in (1, 5, 3)], max_new_tokens=9)
    assert texts == ["a", "aaaaa", "aaa"]
    assert [rows for rows, _ in model.calls] == [3, 3, 2, 2, 1, 1]


@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=8),
    batch_size=st.one_of(st.none(), st.integers(1, 3)),
    batch_tokens=st.one_of(st.none(), st.integers(1, 60)),
)
def test_batches_keep_their_limits_and_the_order(
    lengths: list[int], batch_size: int | None, batch_tokens: int | None
) -> None:
    lines = [tokens_of(chr(97 + index) * length) for index, length in enumerate(lengths)]
    counts: list[int] = []
    texts, model = say(lines, batching=Batching(batch_size, batch_tokens, counts.append), max_new_tokens=9)
    assert texts == [chr(97 + index) * length for index, length in enumerate(lengths)]
    assert sum(counts) == len(lines)
    assert max(counts) <= (batch_size or len(lines))
    for rows, longest in model.calls:
        assert batch_tokens is None or rows == 1 or longest == 1 or rows * (longest + 9) <= batch_tokens


def test_no_more_tokens_than_asked_for() -> None:
    texts, model = say([tokens_of("abcdef")], max_new_tokens=3)
    assert texts == ["abc"]
    assert len(model.calls) == 3


def test_sampling_draws_other_answers(tiny_file_session: Session) -> None:
    examples = encoded([tokens_of("One light, two ships")])
    model = SessionLanguageModel(tiny_file_session)
    answers = {
        generate_answers(
            model, examples, tokenizer=TOKENIZER, max_new_tokens=12, sampling=Sampling(temperature=5.0, seed=seed)
        )[0]
        for seed in range(4)
    }
    assert len(answers) == 4


def test_logits_that_are_no_numbers_are_refused() -> None:
    class Broken(Script):
        def __call__(self, *arguments: Any) -> Any:
            logits, state = super().__call__(*arguments)
            logits[1, 7] = math.nan
            return logits, state

    model = Broken({10: (3,), 11: (3,)})
    with pytest.raises(ActExportError, match="after the prompt number 0 aren't finite numbers"):
        generate_answers(model, encoded([(10,), (11, 4)]), tokenizer=TOKENIZER, max_new_tokens=1)


@given(text=st.text("ab#\n", max_size=12), stop=st.lists(st.sampled_from(["#", "\n", "ab", "##", ""]), max_size=3))
def test_the_cut_is_at_the_first_stop(text: str, stop: list[str]) -> None:
    cut = cut_at_stop(text, stop)
    assert text.startswith(cut)
    ends = [end for end in stop if end]
    assert not any(end in cut for end in ends)
    assert cut == text or any(text[len(cut) :].startswith(end) for end in ends)
