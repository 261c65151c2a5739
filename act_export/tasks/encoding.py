"""Text to tokens, with care where the prompt ends and the choice begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from act_export.tasks.examples import Example, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens.

    Attributes:
        prompt: Token ids.
        choices: Token ids of each choice, without the prompt's.
        answer: Index of the right choice.
        text: The prompt, shortened, for messages.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int
    text: str = field(default="", compare=False)


def encode_examples(
    tokenizer: PreTrainedTokenizerBase | None, examples: Iterable[Example], *, max_length: int | None = None
) -> list[EncodedExample]:
    """Encodes examples.

    A choice is encoded together with its prompt, because tokens may span the boundary; where they do, the choice has no
    likelihood of its own and the example is refused.

    Args:
        tokenizer: Of the model that will score them.
        examples: At least one.
        max_length: Longest sequence the model takes, in tokens; None for any.

    Raises:
        TaskError: If there is no tokenizer or no example, or naming the example and what is wrong with it.
    """
    if tokenizer is None:
        raise TaskError("the model has no tokenizer, so prompts can't be read; put tokenizer.json into its folder")
    encoded = [_encode(tokenizer, example, max_length) for example in examples]
    if not encoded:
        raise TaskError("there are no examples to score")
    return encoded


def _encode(tokenizer: PreTrainedTokenizerBase, example: Example, max_length: int | None) -> EncodedExample:
    prompt = tuple(tokenizer(example.prompt).input_ids)
    if not prompt:
        raise TaskError(f"the prompt {_short(example.prompt)} has no tokens")
    choices: list[tuple[int, ...]] = []
    for choice in example.choices:
        whole = tuple(tokenizer(example.prompt + choice).input_ids)
        if whole[: len(prompt)] != prompt:
            raise TaskError(
                f"the tokens of the prompt {_short(example.prompt)} change when {choice!r} follows it, so the choice "
                f"can't be scored alone; end the prompt without a space and begin each choice with one"
            )
        tokens = whole[len(prompt) :]
        if not tokens:
            raise TaskError(f"the choice {choice!r} of the prompt {_short(example.prompt)} has no tokens")
        if tokens in choices:
            other = example.choices[choices.index(tokens)]
            raise TaskError(
                f"the choices {other!r} and {choice!r} of the prompt {_short(example.prompt)} have the same tokens; "
                f"the model can't tell them apart"
            )
        if max_length is not None and len(whole) > max_length:
            raise TaskError(
                f"the prompt {_short(example.prompt)} with {choice!r} has {len(whole)} tokens; the model takes "
                f"{max_length}"
            )
        choices.append(tokens)
    return EncodedExample(prompt, tuple(choices), example.answer, _short(example.prompt))


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:28]}...{prompt[-28:]}")
