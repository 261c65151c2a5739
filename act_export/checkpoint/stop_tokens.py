"""Tokens that end a generation: of an export, of a search's answers, and as somebody wrote them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from act_export.errors import ActExportError, shown

if TYPE_CHECKING:
    from act_export.checkpoint.load import Checkpoint

_log = logging.getLogger(__name__)


def end_tokens(value: Any, what: str, vocabulary: int | None) -> tuple[int, ...]:
    """Token ids of an `eos_token_id`: a number, a list of numbers, or none.

    Args:
        value: As it was found.
        what: It is called so in errors, e.g. "eos_token_id of config.json".
        vocabulary: Number of token ids of the model; None if it isn't known.

    Raises:
        ActExportError: If it is anything else, or a number is no token of the model's.
    """
    if value is None:
        return ()
    tokens = value if isinstance(value, list | tuple) else [value]
    for token in tokens:
        if type(token) is not int or token < 0:
            raise ActExportError(
                f"{what} is {shown(value)}; it must be a token's number, or a list of such numbers: correct it"
            )
        if vocabulary is not None and token >= vocabulary:
            raise ActExportError(
                f"{what} is {shown(value)}, and the model's vocabulary has {vocabulary} tokens, 0 to {vocabulary - 1}: "
                f"correct it"
            )
    return tuple(tokens)


def stop_tokens(checkpoint: Checkpoint) -> list[int]:
    """Tokens after which generation ends, by tokenizer, generation configuration and configuration.

    Raises:
        ActExportError: If one of them names something that is no number of a token. What is one, but beyond the
            model's vocabulary, never comes and is left out, as a default of transformers that nobody set.
    """
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    vocabulary = model.config.vocab_size
    given = {
        "the tokenizer": tokenizer.eos_token_id if tokenizer is not None else None,
        "generation_config.json": model.generation_config.eos_token_id if model.generation_config is not None else None,
        "config.json": model.config.eos_token_id,
    }
    found: set[int] = set()
    for place, tokens in given.items():
        what = f"eos_token_id of {place} of {checkpoint.name}"
        named = set(end_tokens(tokens, what, None))
        if beyond := sorted(token for token in named if token >= vocabulary):
            _log.warning(
                "%s names %s, which the model's vocabulary of %d tokens doesn't have: not taken as a stop token",
                what,
                ", ".join(map(shown, beyond[:5])),
                vocabulary,
            )
        found |= named - {*beyond}
    return sorted(found)
