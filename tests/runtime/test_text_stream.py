"""Streamed text: pieces joined are what the tokenizer makes of all tokens, whatever the tokens and the tokenizer."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from act_export.errors import ActExportError
from act_export.runtime.text_stream import TextStream

WORDS = [
    "a",
    "do",
    "n",
    "t",
    "'",
    ".",
    ",",
    "?",
    "!",
    "s",
    "m",
    "ve",
    "re",
    "it",
    "can",
    "##not",
    "##t",
    "##.",
    "é",
    "你",
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _word_piece(*, clean: bool) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", *WORDS])}
    inner = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    inner.decoder = decoders.WordPiece(cleanup=False)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        clean_up_tokenization_spaces=clean,
    )


def _pieces(kind: str) -> PreTrainedTokenizerFast:
    """As sentencepiece has them: spaces as part of words, bytes for what is in no word."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "▁the", "▁a", "x", "▁'", "'", "s", "▁.", "▁▁", "é", "�", "👍", *BYTES]
    if kind == "unigram":
        inner = Tokenizer(models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], 0, True))
        inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
    else:
        vocabulary = {token: i for i, token in enumerate(tokens)}
        inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=kind == "unigram",
    )


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<think>", "über", " 你好"])
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_end|>", special=True)]})
    return tokenizer


def _backwards() -> PreTrainedTokenizerFast:
    """Whose decoder looks at the whole text."""
    inner = tiny_tokenizer().backend_tokenizer
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Replace(Regex("aa+b"), "-")])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def _end_of_word() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE(vocab={"a": 0, "b</w>": 1, "</w>": 2, "c</w>d</w>": 3}, merges=[]))
    inner.decoder = decoders.BPEDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


TOKENIZERS = {
    "byte-level": _byte_level,
    "pieces with bytes": lambda: _pieces("pairs"),
    "unigram, cleaned": lambda: _pieces("unigram"),
    "word pieces": lambda: _word_piece(clean=False),
    "word pieces, cleaned": lambda: _word_piece(clean=True),
    "whole text": _backwards,
    "end of word": _end_of_word,
}


@cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    return TOKENIZERS[kind]()


def streamed(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.put(token) for token in tokens), stream.end()]


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(st.data())
@settings(max_examples=60)
def test_pieces_join_to_the_text(kind, data):
    tokenizer = tokenizer_of(kind)
    tokens = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), max_size=14))
    assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", list(TOKENIZERS)[:5])
@given(st.data())
@settings(max_examples=15)
def test_pieces_of_long_texts_join(kind, data):
    """Long enough that the window that is decoded moves; runs of few tokens, of which many are spaces or nothing."""
    tokenizer = tokenizer_of(kind)
    some = data.draw(st.lists(st.integers(0, len(tokenizer) + 2), min_size=1, max_size=6))
    tokens = data.draw(st.lists(st.sampled_from(some), min_size=60, max_size=120))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("act_export.runtime.text_stream._WINDOW", data.draw(st.sampled_from([2, 5, 32])))
        patch.setattr("act_export.runtime.text_stream._OVERLAP", data.draw(st.sampled_from([1, 2, 8])))
        assert "".join(streamed(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["byte-level", "pieces with bytes", "unigram, cleaned", "word pieces, cleaned"])
def test_a_step_decodes_the_last_tokens_alone(kind):
    tokenizer = tokenizer_of(kind)
    stream = TextStream(tokenizer)
    decoded, lengths = stream._decoded, []
    stream._decoded = lambda start, **how: lengths.append(len(stream._tokens) - start) or decoded(start, **how)
    words = [token for token in (tokenizer.convert_tokens_to_ids(word) for word in ("a", "▁the", "can")) if token]
    for _ in range(1000):
        stream.put(words[-1])
    assert max(lengths) < 100
    assert len(stream._shown) > 900


@pytest.mark.in_turn(2)
@given(st.text(max_size=12))
@example("e\u0301 👨\u200d👩\u200d👧 नि ข้ \u202eabc")
def test_letters_of_several_tokens(text):
    for kind in ("byte-level", "pieces with bytes"):
        tokenizer = tokenizer_of(kind)
        tokens = tokenizer(text, add_special_tokens=False).input_ids
        pieces = streamed(tokenizer, tokens)
        assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize(
    ("kind", "words", "pieces"),
    [
        ("word pieces, cleaned", ["do", "n", "'", "t", "a", "."], ["do", "", "", "n't", " a", ".", ""]),
        ("word pieces, cleaned", ["it", "'", "s", "can", "##not"], ["it", "", "'s", " can", "not", ""]),
        ("word pieces", ["do", "n", "'", "t"], ["do", " n", " '", " t", ""]),
        ("byte-level", ["a", "Ã", "©", "<|im_end|>", "b"], ["a", "", "é", "", "b", ""]),
        ("pieces with bytes", ["▁the", "<0xC3>", "<0xA9>", "▁a"], ["the", "", "", "é a", ""]),
        # Three bytes are a letter; with one more that is none, four are none.
        ("pieces with bytes", ["x", "<0xE4>", "<0xBD>", "<0xA0>", "</s>", "<0xE4>"], ["x", "", "", "", "", "", "����"]),
        ("whole text", ["a", "b"], ["", "", "ab"]),
        ("end of word", ["b</w>", "a"], ["", "", "b a"]),
    ],
)
def test_text_comes_as_soon_as_it_is_certain(kind, words, pieces):
    tokenizer = tokenizer_of(kind)
    assert streamed(tokenizer, tokenizer.convert_tokens_to_ids(words)) == pieces


def test_what_cleaning_may_change_is_held_back():
    """Every text of the letters that it looks at, with every text after it: drawn at random, always the same."""
    tokenizer = tokenizer_of("word pieces, cleaned")
    random_letters = random.Random(0)
    stream = TextStream(tokenizer)
    for _ in range(4_000):
        before, after = (
            "".join(random_letters.choices(random_letters.choice((".' ntsvemrx", "' nt.", " '")), k=length))
            for length in (random_letters.randrange(10), random_letters.randrange(7))
        )
        assert tokenizer.clean_up_tokenization(before + after).startswith(stream._certain(before))


def test_a_tokenizer_that_changes_what_was_certain():
    stream = TextStream(tokenizer_of("byte-level"))
    stream.put(70)
    stream._decoded = lambda start, *, clean=None: "another text"
    assert stream.put(71) == ""
    with pytest.raises(ActExportError, match="the whole text is 'another text'"):
        stream.end()


@pytest.mark.in_turn(2)
@pytest.mark.real
@given(st.lists(st.integers(0, 49151), max_size=40))
@settings(max_examples=25)
def test_the_tokenizer_of_a_real_model(smollm2, tokens):
    pieces = streamed(smollm2.tokenizer, tokens)
    assert "".join(pieces) == smollm2.tokenizer.decode(tokens, skip_special_tokens=True)
