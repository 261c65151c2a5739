from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from act_export.tasks import EncodedExample, Example, TaskError, encode_examples


class Characters:
    """A tokenizer with a token per character, and one token for each of these words."""

    def __init__(self, *words: str, end: tuple[int, ...] = ()) -> None:
        self.pieces = re.compile("|".join([*map(re.escape, words), "."]), re.DOTALL)
        self.end = end

    def __call__(self, text: str) -> Any:
        pieces = self.pieces.findall(text)
        return SimpleNamespace(input_ids=[ord(piece[0]) + 1000 * (len(piece) - 1) for piece in pieces] + [*self.end])


@given(prompt=st.text(min_size=1), choices=st.lists(st.text(min_size=1), min_size=2, unique=True))
def test_prompt_and_choice_are_the_whole_text(prompt: str, choices: list[str]) -> None:
    (encoded,) = encode_examples(Characters(), [Example(prompt, tuple(choices), 0)])
    assert encoded.prompt == tuple(map(ord, prompt))
    assert [encoded.prompt + choice for choice in encoded.choices] == [
        tuple(map(ord, prompt + choice)) for choice in choices
    ]


def test_a_choice_may_have_one_token() -> None:
    encoded = encode_examples(Characters(" no", " yes"), [Example("ok?", (" no", " yes"), 1)])
    assert encoded == [EncodedExample((111, 107, 63), ((2032,), (3032,)), 1)]


def test_tokens_across_the_boundary_are_refused() -> None:
    with pytest.raises(TaskError, match=r"tokens of the prompt 'ok\? ' change when 'no' follows it.*end the prompt"):
        encode_examples(Characters(" no"), [Example("ok? ", ("no", "yes"), 0)])


def test_a_tokenizer_that_ends_the_text_is_refused() -> None:
    with pytest.raises(TaskError, match="change when ' no' follows it"):
        encode_examples(Characters(end=(2,)), [Example("ok?", (" no", " yes"), 0)])


def test_choices_with_the_same_tokens_are_refused() -> None:
    class Deaf(Characters):
        def __call__(self, text: str) -> Any:
            return super().__call__(text.replace("É", "E"))

    with pytest.raises(TaskError, match=r"choices ' E' and ' É' of the prompt 'ok\?' have the same tokens"):
        encode_examples(Deaf(), [Example("ok?", (" E", " É"), 0)])


def test_a_choice_or_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(TaskError, match=r"the choice '' of the prompt 'ok\?' has no tokens"):
        encode_examples(Characters(), [Example("ok?", (" a", ""), 0)])
    with pytest.raises(TaskError, match="the prompt '' has no tokens"):
        encode_examples(Characters(), [Example("", (" a", " b"), 0)])


def test_a_text_that_is_too_long_is_refused_and_shortened() -> None:
    example = Example("a" * 100, (" a", " b"), 0)
    assert encode_examples(Characters(), [example], max_length=102)
    with pytest.raises(TaskError, match=r"prompt 'a{28}\.\.\.a{28}' with ' a' has 102 tokens; the model takes 101"):
        encode_examples(Characters(), [example], max_length=101)


def test_no_tokenizer_and_no_example_are_refused() -> None:
    with pytest.raises(TaskError, match="the model has no tokenizer"):
        encode_examples(None, [Example("a", ("b", "c"), 0)])
    with pytest.raises(TaskError, match="there are no examples to score"):
        encode_examples(Characters(), [])
