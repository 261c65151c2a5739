"""Text to tokens, with care where the prompt ends and the choice begins."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from act_export.errors import others_errors
from act_export.runtime.chat import render_chat
from act_export.tasks.examples import Example, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_REPAIR = "put the model's own tokenizer files into its folder"


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens.

    Attributes:
        prompt: Token ids.
        choices: Token ids of each choice, without the prompt's.
        answer: Index of the right choice.
        text: The prompt, shortened, for messages.
        references: Texts that count as right where the model writes the answer itself; else none.
        first_token: The choices are their first tokens, and all others of the vocabulary are compared with them.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int
    text: str = field(default="", compare=False)
    references: tuple[str, ...] = ()
    first_token: bool = False

    @property
    def num_scores(self) -> int:
        """How many numbers score it: one per choice, and where first tokens are compared one of all others."""
        return len(self.choices) + self.first_token


def encode_examples(
    tokenizer: PreTrainedTokenizerBase | None,
    examples: Iterable[Example],
    *,
    max_length: int | None = None,
    chat: bool = False,
    truncate: bool = False,
) -> list[EncodedExample]:
    """Encodes examples.

    A choice is encoded together with its prompt, because tokens may span the boundary; where they do, the choice has no
    likelihood of its own and the example is refused.

    Args:
        tokenizer: Of the model that will score them.
        examples: At least one.
        max_length: Longest sequence the model takes, in tokens: prompt and longest choice; None for any.
        chat: The prompt is a user's message in the tokenizer's chat template, and a choice begins the reply.
        truncate: Of a prompt that is too long the beginning is left out; the tokens that begin every sequence, and what
            a chat template adds, stay. Without it such a prompt is refused.

    Raises:
        TaskError: If there is no tokenizer, no chat template, or no example, or naming the example and what is wrong
            with it.
    """
    if tokenizer is None:
        raise TaskError("the model has no tokenizer, so prompts can't be read; put tokenizer.json into its folder")
    encode = _encode_message if chat else _encode_plain
    limit = max_length if truncate else None
    encoded = []
    for example in examples:
        ready = encode(tokenizer, example, limit)
        _check(ready, example, max_length)
        encoded.append(ready)
    if not encoded:
        raise TaskError("there are no examples to score")
    return encoded


def sequence_beginning(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that the tokenizer begins every sequence with."""
    special = set(getattr(tokenizer, "all_special_ids", ()))
    with others_errors("the model's tokenizer can't read 'a'", _REPAIR, error=TaskError):
        ids = tokenizer("a").input_ids
    plain = next((index for index, token in enumerate(ids) if token not in special), 0)
    return tuple(int(token) for token in ids[:plain])


def _encode_plain(tokenizer: PreTrainedTokenizerBase, example: Example, limit: int | None) -> EncodedExample:
    special = set(getattr(tokenizer, "all_special_ids", ()))
    encoded = _encode(example, example.prompt, example.choices, lambda text: _tokens(tokenizer, text, example), special)
    over = _over(encoded, limit)
    if over == 0:
        return encoded
    first = next((index for index, token in enumerate(encoded.prompt) if token not in special), 0)
    kept = encoded.prompt[:first] + encoded.prompt[first + over :]
    if over >= len(encoded.prompt) - first:
        raise TaskError(f"{_named(example)} can't be shortened to {limit} tokens: its longest choice leaves no room")
    return replace(encoded, prompt=kept)


def _encode_message(tokenizer: PreTrainedTokenizerBase, example: Example, limit: int | None) -> EncodedExample:
    choices = tuple(choice.lstrip() for choice in example.choices)

    def encoded(message: str) -> EncodedExample:
        text = render_chat(tokenizer, [{"role": "user", "content": message}], error=TaskError)
        # The template's text has the special tokens already.
        return _encode(example, text, choices, lambda text: _tokens(tokenizer, text, example, special=False))

    message = example.prompt
    ready = encoded(message)
    while over := _over(ready, limit):
        tokens = _tokens(tokenizer, message, example, special=False)
        if over >= len(tokens):
            raise TaskError(
                f"{_named(example)} can't be shortened to {limit} tokens: chat template and longest choice leave none"
            )
        kept = str(tokenizer.decode(tokens[over:])).lstrip("\ufffd")  # of a letter that was cut in two
        message = kept if len(kept) < len(message) else message[1:]
        ready = encoded(message)
    return ready


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, example: Example, *, special: bool = True) -> list[int]:
    options = {} if special else {"add_special_tokens": False}
    with others_errors(f"the model's tokenizer can't read {_named(example)}", _REPAIR, error=TaskError):
        return list(tokenizer(text, **options).input_ids)


def _encode(
    example: Example,
    text: str,
    choices: tuple[str, ...],
    tokens_of: Callable[[str], list[int]],
    special: Collection[int] = (),
) -> EncodedExample:
    prompt = tuple(tokens_of(text))
    if not prompt:
        raise TaskError(f"{_named(example)} has no tokens")
    encoded: list[tuple[int, ...]] = []
    for choice in choices:
        whole = tuple(tokens_of(text + choice))
        if whole[: len(prompt)] != prompt:
            if prompt[-1] in special and whole[-1] == prompt[-1]:
                raise TaskError(
                    f"the model's tokenizer ends every text with the token {prompt[-1]}, so no choice or answer can "
                    f'follow a prompt; switch that off: "add_eos_token": false in tokenizer_config.json, or the '
                    f"post_processor of tokenizer.json"
                )
            raise TaskError(
                f"the tokens of {_named(example)} change when {choice!r} follows it, so the choice can't be scored "
                f"alone; end the prompt without a space and begin each choice with one"
            )
        encoded.append(whole[len(prompt) :][: 1 if example.first_token else None])
    return EncodedExample(
        prompt, tuple(encoded), example.answer, _short(example.prompt), example.references, example.first_token
    )


def _check(encoded: EncodedExample, example: Example, max_length: int | None) -> None:
    first: dict[tuple[int, ...], int] = {}
    for index, (choice, tokens) in enumerate(zip(example.choices, encoded.choices, strict=True)):
        if not tokens:
            raise TaskError(f"the choice {choice!r} of {_named(example)} has no tokens")
        other = first.setdefault(tokens, index)
        if other < index:
            same = "begin with the same token" if example.first_token else "have the same tokens"
            raise TaskError(
                f"the choices {example.choices[other]!r} and {choice!r} of {_named(example)} {same}; the model can't "
                f"tell them apart{', pass another scoring' if example.first_token else ''}"
            )
        length = len(encoded.prompt) + len(tokens)
        if max_length is not None and length > max_length:
            raise TaskError(f"{_named(example)} with {choice!r} has {length} tokens; the model takes {max_length}")
    if max_length is not None and len(encoded.prompt) > max_length:
        raise TaskError(f"{_named(example)} has {len(encoded.prompt)} tokens; the model takes {max_length}")


def _over(encoded: EncodedExample, limit: int | None) -> int:
    longest = len(encoded.prompt) + max(map(len, encoded.choices), default=0)
    return 0 if limit is None else max(0, longest - limit)


def _named(example: Example) -> str:
    where = f", {example.where}," if example.where else ""
    return f"the prompt {_short(example.prompt)}{where}"


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:28]}...{prompt[-28:]}")
