"""Prompts: what is no text, of another model or too long is refused; a token that ends a text isn't read before it."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import tiny_tokenizer
from tokenizers import processors

from act_export.errors import ActExportError, SessionError
from act_export.runtime import Sampling, generate
from act_export.runtime.prompt import encode_prompt
from act_export.runtime.sampling import left_pad
from act_export.runtime.text import generation_of_options, stream_text
from act_export.runtime.token_input import checked_mask


def tokenizer_with(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("template", "begins", "left_out"),
    [("$A", [], []), ("<s> $A", [1], []), ("$A </s>", [], [2]), ("<s> $A </s>", [1], [2]), ("$A </s> <s>", [], [2, 1])],
)
@pytest.mark.parametrize("text", ["a", "One light", "ends </s>", "</s>"])
def test_what_a_tokenizer_adds_at_the_end_is_left_out(tiny_session, template, begins, left_out, text):
    tokenizer = tokenizer_with(template)
    encoded = encode_prompt(tiny_session, tokenizer, text)
    assert encoded.ids == begins + tokenizer(text, add_special_tokens=False).input_ids
    assert encoded.left_out == left_out


@pytest.mark.parametrize(("template", "ids"), [("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A", None), ("$A </s>", None)])
def test_an_empty_prompt(tiny_session, template, ids):
    """Is one where the tokenizer begins all texts with a token."""
    if ids is not None:
        assert encode_prompt(tiny_session, tokenizer_with(template), "").ids == ids
        return
    with pytest.raises(ActExportError, match="the prompt is empty"):
        encode_prompt(tiny_session, tokenizer_with(template), "")


def test_it_is_said_what_was_left_out(tiny_session):
    said: list[str] = []
    next(stream_text(tiny_session, tokenizer_with("$A </s>"), "One", max_new_tokens=4, note=said.append))
    assert said == ["the tokenizer ends a text with </s>, which was left out: the model is to go on"]


@pytest.mark.parametrize("text", ["\udc80", "a\ud83d", "ok \udcff\udcfe"])
def test_half_characters(tiny_session, text):
    with pytest.raises(ActExportError, match=r"the prompt isn't text: .* at character \d is half of a character"):
        encode_prompt(tiny_session, tiny_tokenizer(), text)


def test_a_tokenizer_of_another_model(tiny_session):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["elsewhere"])
    with pytest.raises(ActExportError, match=r"of 260 tokens, makes token 259 .* a vocabulary of 259.*--tokenizer"):
        encode_prompt(tiny_session, tokenizer, "elsewhere")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no such role') }}", "chat template .* fails: no such role"),
        ("{% for m in messages %}", "chat template .* fails"),
        ("{{ messages[0].content.nothing() }}", "chat template .* fails"),
        (None, "no chat template"),
    ],
)
def test_chat_templates_that_fail(tiny_session, template, message):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ActExportError, match=message):
        encode_prompt(tiny_session, tokenizer, "hello", chat=True)


def test_the_context_has_to_have_room(tiny_session):
    tokenizer = tiny_tokenizer()
    with pytest.raises(ActExportError, match=r"the prompt has 300 tokens, and the context of .* holds 256"):
        encode_prompt(tiny_session, tokenizer, "a" * 300)
    with pytest.raises(ActExportError, match=r"90 new tokens don't fit: the prompt has 200.*at most 57"):
        next(stream_text(tiny_session, tokenizer, "a" * 200, max_new_tokens=90))
    assert "".join(stream_text(tiny_session, tokenizer, "a" * 250))  # as many as there is room for


@pytest.mark.parametrize(
    "prompt",
    [[1.5], [True, 5], ["5"], [None], [5, 2**70], [[5]], np.array([1.0, 2.0]), np.array([True]), "56"],
    ids=repr,
)
def test_ids_that_are_no_whole_numbers(prompt):
    with pytest.raises(ActExportError, match=r"a prompt has .* in it; token ids are whole numbers"):
        left_pad([[5, 6], prompt])


@pytest.mark.parametrize(
    "prompt", [[5, 6], (5, 6), np.array([5, 6], np.int32), np.array([5, 6], np.uint8), range(5, 7)]
)
def test_ids_that_are(prompt):
    assert left_pad([prompt, [1, 2, 3]])[0].tolist() == [[0, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize(
    "mask", [[[1, 0.5]], [[1, 2]], [[-1, 1]], [[float("nan"), 1]], [["1", "1"]], [[None, 1]]], ids=repr
)
def test_masks_of_anything_but_0_and_1(tiny_session, mask):
    ids = np.array([[5, 6]])
    with pytest.raises(SessionError, match="must be"):
        checked_mask(mask, "mask")
    for run in (tiny_session.run, tiny_session.allocate(1).step):
        with pytest.raises(SessionError, match=r"mask .*must be"):
            run(ids, np.array(mask))


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int32, np.float32])
def test_masks_of_any_type(tiny_session, dtype):
    ids, mask = np.array([[5, 6, 7]]), np.array([[0, 1, 1]])
    expected = tiny_session.run(ids, mask).logits
    np.testing.assert_array_equal(tiny_session.run(ids, mask.astype(dtype)).logits, expected)
    np.testing.assert_array_equal(tiny_session.allocate(1).step(ids, mask.astype(dtype))[0, 0], expected[0, -1])


@pytest.mark.parametrize("positions", [[[0.0, 1.0]], [[True, False]]])
def test_positions_that_are_no_whole_numbers(tiny_session, positions):
    with pytest.raises(SessionError, match=r"position_ids are .*whole numbers"):
        tiny_session.run(np.array([[5, 6]]), np.ones((1, 2)), position_ids=np.array(positions))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": 1e-300}, "temperature is 1e-300"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 2.0}, "top_p is 2"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 0.5}, "seed is 0.5"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_out_of_range(options, message):
    with pytest.raises(ActExportError, match=message):
        generation_of_options(
            **{"sample": False, "temperature": None, "top_k": None, "top_p": None, "seed": 0, **options}
        )
    with pytest.raises(ActExportError, match=message):
        Sampling(**options)


def test_what_options_mean():
    assert generation_of_options(False, None, None, None, 3) == (Sampling(0.0, seed=3), {})
    assert generation_of_options(False, 0.0, None, None, 3) == (Sampling(0.0, seed=3), {})
    assert generation_of_options(True, None, None, None, 3) == (Sampling(1.0, seed=3), {})
    found = generation_of_options(False, 0.7, 0, 0.9, 3)
    assert found == (Sampling(1.0, seed=3), {"temperature": 0.7, "top_k": 0, "top_p": 0.9})
    with pytest.raises(ActExportError, match="temperature is 0, which is greedy"):
        generation_of_options(True, 0.0, None, None, 3)


def test_ids_are_looked_at_before_they_are_run(tiny_session):
    with pytest.raises(ActExportError, match=r"a prompt has 1\.5 in it"):
        generate(tiny_session, [[1.5]], max_new_tokens=2)
