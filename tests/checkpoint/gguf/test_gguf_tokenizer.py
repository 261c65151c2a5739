"""Tokenizers of GGUF files do what the file says; what they don't is said."""

from __future__ import annotations

import pytest
from gguf_files import BYTE_LEVEL, pieces, tiny_model, tokens, write
from transformers import AutoTokenizer

from act_export.checkpoint.gguf.header import read_header
from act_export.checkpoint.gguf.split import SPLITS
from act_export.checkpoint.gguf.tokenizer import tokenizer_by


@pytest.fixture(scope="module")
def model():
    return tiny_model(vocab_size=268)


def made(tmp_path, model, tokenizer, **keys):
    """The tokenizer, saved and loaded again, and the remarks."""
    path = write(
        tmp_path / "model.gguf", model, tokenizer={**tokenizer, **{f"tokenizer.{k}": v for k, v in keys.items()}}
    )
    found, remarks = tokenizer_by(read_header(path), path)
    found.save_pretrained(tmp_path / "saved")
    return AutoTokenizer.from_pretrained(tmp_path / "saved"), remarks


@pytest.mark.parametrize("first", [None, True, False])
@pytest.mark.parametrize("begins", [None, True, False])
def test_pieces(tmp_path, model, first, begins):
    keys = {"ggml.add_space_prefix": first, "ggml.add_bos_token": begins}
    found, remarks = made(tmp_path, model, pieces(), **keys)
    start = [] if begins is False else [1]
    assert found("the a").input_ids == [*start, *([260, 265, 267] if first is False else [266, 267])]
    assert found.decode([266, 267]).strip() == "the a"
    assert not remarks


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("begins", [True, False])
def test_first_and_last_tokens(tmp_path, model, begins, ends):
    found, remarks = made(tmp_path, model, BYTE_LEVEL, **{"ggml.add_bos_token": begins, "ggml.add_eos_token": ends})
    letters = [tokens().index(letter) for letter in "ab"]
    assert found("ab").input_ids == [*([1] if begins else []), *letters, *([2] if ends else [])]
    assert not remarks


def test_the_tokens_are_the_files_and_no_others(tmp_path, model):
    found, remarks = made(tmp_path, model, BYTE_LEVEL)
    assert [found.convert_ids_to_tokens(token) for token in range(260)] == tokens()
    assert len(found) == 260
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id) == (1, 2, 0, None)
    assert "</s>" in found.all_special_tokens
    assert not remarks


def test_control_tokens_with_other_letters_stay_whole(tmp_path, model):
    names = [*tokens(), "<\uff5cend\uff5c>", "<think>"]
    keys = {"ggml.tokens": names, "ggml.token_type": [3] * 3 + [1] * 257 + [3, 4], "ggml.add_bos_token": False}
    found, remarks = made(tmp_path, model, BYTE_LEVEL, **keys)
    assert found("<\uff5cend\uff5c><think>").input_ids == [260, 261]
    assert not remarks


def test_the_chat_template(tmp_path, model):
    keys = {"chat_template": "{{ messages[0].content }}!", "chat_template.tool": "{{ 1 }}"}
    found, remarks = made(tmp_path, model, BYTE_LEVEL, **keys)
    assert found.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert [remark for remark in remarks if "chat_template.tool" in remark] == remarks


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"ggml.pre": "no_such"}, "'no_such'"),
        ({"ggml.pre": None}, "doesn't say how text is cut"),
        ({"ggml.no_such_key": 3}, "tokenizer.ggml.no_such_key = 3"),
        ({"ggml.add_sep_token": True}, "tokenizer.ggml.add_sep_token = True"),
        ({"ggml.remove_extra_whitespaces": True}, "remove_extra_whitespaces = True"),
        ({"ggml.tokens": [*tokens(), "a"]}, "1 of the file's 261 tokens are listed twice: ['a']"),
    ],
)
def test_what_isnt_applied_is_said(tmp_path, model, keys, said):
    _, remarks = made(tmp_path, model, BYTE_LEVEL, **keys)
    assert any(said in remark for remark in remarks)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["a", " 123", "  ", " b", "'s"]),
        ("smollm", ["a", " ", "1", "2", "3", "  ", " b", "'s"]),
        ("llama-bpe", ["a", " ", "123", "  ", " b", "'s"]),
        ("qwen2", ["a", " ", "1", "2", "3", "  ", " b", "'s"]),
        ("tekken", ["a", " ", "1", "2", "3", "  ", " b", "'s"]),
        ("gpt-4o", ["a", " ", "123", "  ", " b's"]),
    ],
)
def test_text_is_cut_as_the_file_says(name, words):
    import json

    from tokenizers import Tokenizer, models

    tokenizer = json.loads(Tokenizer(models.BPE()).to_str())
    tokenizer["pre_tokenizer"] = SPLITS[name].steps()
    cut = Tokenizer.from_str(json.dumps(tokenizer)).pre_tokenizer.pre_tokenize_str("a 123   b's")
    assert [word.replace("\u0120", " ") for word, _ in cut] == words
