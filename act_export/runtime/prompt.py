"""A prompt's text -> the tokens that generation begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from act_export.errors import ActExportError, others_errors, shown
from act_export.runtime.chat import render_chat
from act_export.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the model takes it.

    Attributes:
        ids: Token ids, at least one.
        left_out: Tokens that the tokenizer would add at the end, and that were left out.
    """

    ids: list[int]
    left_out: list[int]


def encode_prompt(
    session: Session, tokenizer: PreTrainedTokenizerBase, text: str, *, chat: bool = False
) -> EncodedPrompt:
    """Encodes a prompt that the model is to go on from.

    Some tokenizers end every text with a token that says so. A model that reads it goes on after the end, with another
    text, so it is left out; those within the text, or from the chat template, stay.

    Args:
        session: The model.
        tokenizer: Its tokenizer.
        text: Text to continue, or with `chat` the user's message.
        chat: Put the text into the tokenizer's chat template.

    Raises:
        ActExportError: If the text has half characters, there is no chat template, or it fails, there is no token, one
            that isn't the model's, or more than its context holds.
    """
    if chat:
        return EncodedPrompt(encode_chat(session, tokenizer, [{"role": "user", "content": text}]), [])
    _check_text(text)
    return _encode(session, tokenizer, text, special=True)


def encode_chat(
    session: Session, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Encodes messages up to where the model's reply begins: token ids, at least one.

    Args:
        session: The model.
        tokenizer: Its tokenizer.
        messages: Each with "role" and "content".

    Raises:
        ActExportError: As `encode_prompt`.
    """
    for message in messages:
        _check_text(message["content"])
    return _encode(session, tokenizer, render_chat(tokenizer, messages), special=False).ids


def _encode(session: Session, tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> EncodedPrompt:
    with others_errors("the tokenizer can't encode the prompt", "pass the model's own with --tokenizer"):
        ids, end = _encoded(tokenizer, text, special=special)
    if not end:
        raise ActExportError("the prompt is empty: it has no token; give some text to go on from")
    _check_tokens(session, tokenizer, ids[:end])
    return EncodedPrompt(ids[:end], ids[end:])


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ActExportError(
            f"the prompt isn't text: {shown(text[error.start])} at character {error.start} is half of a character, or "
            f"a byte that isn't UTF-8; give the prompt in UTF-8"
        ) from error


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> tuple[list[int], int]:
    """Tokens of a text, and how many there are without those that the tokenizer adds at the end."""
    plain = [int(token) for token in tokenizer(text, add_special_tokens=False).input_ids]
    if not special:
        return plain, len(plain)
    ids = [int(token) for token in tokenizer(text).input_ids]
    before, after = _added(tokenizer)
    if len(ids) - len(plain) == before + after:
        return ids, len(ids) - after
    ends = ids[-1:] == [tokenizer.eos_token_id] != plain[-1:]
    return ids, len(ids) - int(ends)


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many tokens a tokenizer adds before and after a text."""
    plain, ids = (list(tokenizer("a", add_special_tokens=special).input_ids) for special in (False, True))
    for before in range(len(ids) - len(plain) + 1):
        if ids[before : before + len(plain)] == plain:
            return before, len(ids) - len(plain) - before
    return 0, 0


def _check_tokens(session: Session, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    vocabulary, context = session.limits.vocabulary, session.limits.context
    if vocabulary is not None and max(ids) >= vocabulary:
        raise ActExportError(
            f"the tokenizer, of {len(tokenizer)} tokens, makes token {max(ids)} of the prompt, and {session.path} has "
            f"a vocabulary of {vocabulary}: they aren't of the same model; pass the model's tokenizer with --tokenizer"
        )
    if context is not None and len(ids) > context:
        raise ActExportError(
            f"the prompt has {len(ids)} tokens, and the context of {session.path} holds {context}; shorten it"
        )
