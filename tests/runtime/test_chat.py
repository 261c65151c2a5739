"""Tests of rendering chat templates that somebody else wrote."""

from __future__ import annotations

import time

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from act_export.errors import SessionError
from act_export.runtime.chat import render_chat

MESSAGES = [{"role": "user", "content": "Hi"}]


def tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    made.chat_template = template
    return made


def test_a_chat() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert render_chat(tokenizer(template), MESSAGES) == "<user>Hi>"
    assert render_chat(tokenizer(template), MESSAGES, add_generation_prompt=False) == "<user>Hi"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "has no chat template"),
        ("{% for %}", "fails: Expected"),
        ("{{ raise_exception('only one message') }}", "fails: only one message"),
        ("{{ nothing.inner.more }}", "fails: 'nothing' is undefined"),
        ("{{ 1 / 0 }}", "fails: division by zero"),
        ("{{ messages.append(1) }}", "fails:"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails: Range too big"),
        ("{{ 'a' * 10**7 }}", "makes 10000000 characters"),
        ("{{ 'a' * 10**11 }}", "takes more than 512 MB"),
        ("{{ '%99999999999d' % 1 }}", "takes more than 512 MB"),
        ("{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "512 MB"),
    ],
)
def test_what_a_template_may_not_do(template: str | None, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_export.limits._one_process", True)  # as in a command
    with pytest.raises(SessionError) as caught:
        render_chat(tokenizer(template), MESSAGES, error=SessionError)
    assert reason in str(caught.value)
    assert "chat_template.jinja" in str(caught.value)


def test_a_template_without_memory_in_a_library_call() -> None:
    with pytest.raises(SessionError, match=r"takes more memory than there is; .*chat_template\.jinja"):
        render_chat(tokenizer("{{ 'a' * 10**15 }}"), MESSAGES, error=SessionError)


def test_a_template_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_export.runtime.chat._SECONDS", 0.3)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    begun = time.monotonic()
    with pytest.raises(SessionError, match=r"takes longer than 0\.3 seconds"):
        render_chat(tokenizer(loops), MESSAGES, error=SessionError)
    assert time.monotonic() - begun < 5
