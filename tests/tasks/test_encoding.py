from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers.processors import TemplateProcessing

from act_export.tasks import EncodedExample, Example, TaskError, encode_examples

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}[it]{% endif %}"
)


class Characters:
    """A tokenizer with a token per character, and one token for each of these words."""

    def __init__(self, *words: str, end: tuple[int, ...] = ()) -> None:
        self.pieces = re.compile("|".join([*map(re.escape, words), "."]), re.DOTALL)
        self.end = end

    def __call__(self, text: str) -> Any:
        pieces = self.pieces.findall(text)
        return SimpleNamespace(input_ids=[ord(piece[0]) + 1000 * (len(piece) - 1) for piece in pieces] + [*self.end])


def real_tokenizer(*, chat_template: str | None = None) -> Any:
    """A token per byte, and a token that begins every sequence."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = chat_template
    return tokenizer


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


def test_references_are_kept() -> None:
    (encoded,) = encode_examples(Characters(), [Example("a?", (" b",), 0, references=("b", "c"))])
    assert encoded == EncodedExample((97, 63), ((32, 98),), 0, references=("b", "c"))


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


def test_by_the_first_token_choices_are_their_first_tokens() -> None:
    example = Example("ok?", (" no", " yes", " maybe"), 1, first_token=True)
    (encoded,) = encode_examples(Characters(" n", " ye", " may"), [example], max_length=4)
    assert encoded == EncodedExample((111, 107, 63), ((1032,), (2032,), (3032,)), 1, first_token=True)
    assert encoded.num_scores == 4


def test_choices_that_begin_alike_are_refused_by_the_first_token() -> None:
    example = Example("ok?", (" no", " not"), 1, where="row 3 of mine", first_token=True)
    with pytest.raises(
        TaskError,
        match=r"choices ' no' and ' not' of the prompt 'ok\?', row 3 of mine, begin with the same token; .*another",
    ):
        encode_examples(Characters(" no", "t"), [example])
    assert encode_examples(Characters(" no", "t"), [replace(example, first_token=False)])


def test_a_message_is_answered_by_a_first_token_too() -> None:
    tokenizer = real_tokenizer(chat_template=CHAT)
    example = Example("Is it?", (" no", " yes"), 1, first_token=True)
    (encoded,) = encode_examples(tokenizer, [example], chat=True)
    assert [tokenizer.decode(choice) for choice in encoded.choices] == ["n", "y"]
    assert encoded.first_token


def test_a_choice_or_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(TaskError, match=r"the choice '' of the prompt 'ok\?' has no tokens"):
        encode_examples(Characters(), [Example("ok?", (" a", ""), 0)])
    with pytest.raises(TaskError, match="the prompt '' has no tokens"):
        encode_examples(Characters(), [Example("", (" a", " b"), 0)])


def test_a_text_that_is_too_long_is_refused_and_shortened() -> None:
    example = Example("a" * 100, (" a", " b"), 0, where="line 7 of data.jsonl")
    assert encode_examples(Characters(), [example], max_length=102)
    with pytest.raises(
        TaskError, match=r"'a{28}\.\.\.a{28}', line 7 of data\.jsonl, with ' a' has 102 tokens; the model takes 101"
    ):
        encode_examples(Characters(), [example], max_length=101)


def test_no_tokenizer_and_no_example_are_refused() -> None:
    with pytest.raises(TaskError, match="the model has no tokenizer"):
        encode_examples(None, [Example("a", ("b", "c"), 0)])
    with pytest.raises(TaskError, match="there are no examples to score"):
        encode_examples(Characters(), [])


@given(prompt=st.text(min_size=1, max_size=40), limit=st.integers(1, 60), longest=st.integers(1, 5))
def test_a_prompt_is_cut_where_it_begins(prompt: str, limit: int, longest: int) -> None:
    tokenizer = real_tokenizer()
    example = Example(prompt, (" a", " " + "b" * longest), 1)
    (whole,) = encode_examples(tokenizer, [example])
    if limit < 1 + 1 + 1 + longest:  # first token, one of the prompt, the choice
        if len(whole.prompt) + 1 + longest > limit:
            with pytest.raises(TaskError, match="leaves no room"):
                encode_examples(tokenizer, [example], max_length=limit, truncate=True)
        return
    (cut,) = encode_examples(tokenizer, [example], max_length=limit, truncate=True)
    assert cut.choices == whole.choices
    assert cut.prompt[0] == tokenizer.bos_token_id
    assert whole.prompt[1:][-len(cut.prompt[1:]) :] == cut.prompt[1:]
    assert len(cut.prompt) == min(len(whole.prompt), limit - 1 - longest)


def test_a_message_is_put_into_the_template_once() -> None:
    tokenizer = real_tokenizer(chat_template=CHAT)
    (encoded,) = encode_examples(tokenizer, [Example("Is it?", (" no", " yes"), 1)], chat=True)
    assert tokenizer.decode(encoded.prompt) == "<s>[user] Is it?</s>[it]"
    assert encoded.prompt.count(tokenizer.bos_token_id) == 1
    assert [tokenizer.decode(choice) for choice in encoded.choices] == ["no", "yes"]


@given(message=st.text("abcé€😀 ", min_size=12, max_size=60), room=st.integers(4, 50))
def test_a_message_is_cut_inside_the_template(message: str, room: int) -> None:
    tokenizer = real_tokenizer(chat_template=CHAT)
    frame = len(tokenizer("[user] </s>[it]", add_special_tokens=False).input_ids) + 1
    (encoded,) = encode_examples(
        tokenizer, [Example(message, (" no", " yes"), 0)], chat=True, truncate=True, max_length=frame + room + 3
    )
    text = tokenizer.decode(encoded.prompt)
    assert text.startswith("<s>[user] ")
    assert text.endswith("</s>[it]")
    assert message.endswith(text.removeprefix("<s>[user] ").removesuffix("</s>[it]"))
    assert frame + room - 4 < len(encoded.prompt) <= frame + room or len(message.encode()) <= room


def test_a_template_that_leaves_no_room_is_refused() -> None:
    tokenizer = real_tokenizer(chat_template=CHAT)
    with pytest.raises(TaskError, match="can't be shortened to 12 tokens"):
        encode_examples(tokenizer, [Example("a" * 30, (" a", " b"), 0)], chat=True, truncate=True, max_length=12)


def test_a_tokenizer_without_chat_template_is_refused() -> None:
    with pytest.raises(TaskError, match="has no chat template"):
        encode_examples(real_tokenizer(), [Example("a", (" a", " b"), 0)], chat=True)


def test_a_tokenizer_that_ends_every_text() -> None:
    tokenizer = real_tokenizer()
    ends = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ends
    with pytest.raises(TaskError, match=r"ends every text with the token 2, so no choice .*add_eos_token.* false"):
        encode_examples(tokenizer, [Example("a", (" b", " c"), 0)])


def test_what_a_tokenizer_raises_is_said_of_the_prompt() -> None:
    def broken(text: str) -> Any:
        if text != "a":
            raise Exception("no such piece")
        return SimpleNamespace(input_ids=[1])

    with pytest.raises(TaskError, match="tokenizer can't read the prompt 'b': no such piece; put the model's own"):
        encode_examples(broken, [Example("b", (" b", " c"), 0)])  # type: ignore[arg-type]
