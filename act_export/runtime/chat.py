"""A tokenizer's chat template, which is a program that somebody else wrote, with limits on what it may do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from act_export.errors import ActExportError, others_errors
from act_export.limits import memory_limit, time_limit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 10.0
_MORE_BYTES = 512 << 20
_LARGEST_TEXT = 1 << 20  # characters that a template may add to its messages
_ADVICE = "leave out the chat format, or put another chat_template.jinja into the model's folder"


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Mapping[str, str]],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    error: type[ActExportError] = ActExportError,
) -> str:
    """The text of messages in the chat format of a tokenizer's model; it has the special tokens already.

    Args:
        tokenizer: Has a chat template.
        messages: Each with "role" and "content".
        add_generation_prompt: Whether the text ends where the model's reply begins.
        continue_final_message: Whether it ends with the last message, which goes on.
        error: What is raised.

    Raises:
        ActExportError: Or `error`, if there is no template, it can't be read, refuses the messages, or is over a limit
            of time, memory or length: with the template's own words.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise error(
            "the model's tokenizer has no chat template, so prompts can't be put as messages; leave out the chat "
            "format, or put chat_template.jinja into the model's folder"
        )
    what = "the chat template of the model's tokenizer"
    with (
        others_errors(f"{what} fails", _ADVICE, error=error),
        time_limit(_SECONDS, what, _ADVICE, error=error),
        memory_limit(_MORE_BYTES, what, _ADVICE, error=error),
    ):
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
        )
    if not isinstance(text, str):
        raise error(f"{what} makes a {type(text).__name__} of messages, no text; {_ADVICE}")
    largest = _LARGEST_TEXT + 4 * sum(len(message.get("content", "")) for message in messages)
    if len(text) > largest:
        raise error(
            f"{what} makes {len(text)} characters of these messages; more than {largest} aren't used; {_ADVICE}"
        )
    return text
