"""Text of tokens as they come: pieces that joined are what the tokenizer makes of all tokens together.

Decoding is no token's own affair. A letter may need several tokens, tokens of single bytes are read as a run, and some
tokenizers take the space before a comma away afterwards. So the whole is decoded in every step, and what a later token
may still change is held back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from act_export.errors import ActExportError, others_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HALF_A_LETTER = "\ufffd"
_NEXT = [
    before + after
    for before in ("", " ", "'", "' ", " '", " ' ")
    for after in ("x", ".", "t", "'t", "n't", "m", "s", "ve", "e", "re")
]
"""What may follow a text: enough to show all that `clean_up_tokenization` may still change in it."""
_BY_TOKEN = {"ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Sequence", "Strip", "WordPiece"}
"""Decoders of the tokenizers package that turn every token into text by itself, or as `TextStream` knows."""


class TextStream:
    """Decodes tokens one by one.

    Text comes as soon as no later token can change it: with most tokenizers at once, but for half letters. Where it
    isn't known what the tokenizer's decoder looks at, all text comes at the end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Takes the tokenizer."""
        self._tokenizer = tokenizer
        decoders = _decoders(tokenizer)
        self._known = decoders is not None
        self._joins_bytes = "ByteFallback" in (decoders or ())
        self._cleans = _cleans(tokenizer)
        self._special = set(tokenizer.all_special_ids)
        self._tokens: list[int] = []
        self._shown = ""

    def put(self, token: int) -> str:
        """The text that is certain with this token; it may be empty.

        Raises:
            ActExportError: If the tokenizer can't decode the token.
        """
        self._tokens.append(token)
        if not self._known or (self._joins_bytes and self._ends_with_a_byte()):
            return ""
        certain = self._certain()
        return self._new(certain) if certain.startswith(self._shown) else ""

    def end(self) -> str:
        """What is left of the text.

        Raises:
            ActExportError: If the tokenizer changed what was certain.
        """
        text = self._decoded()
        if not text.startswith(self._shown):
            raise ActExportError(
                f"the tokenizer, a {type(self._tokenizer).__name__}, changed text that had been shown already; "
                f"the whole text is {text!r}"
            )
        return self._new(text)

    def _new(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], max(self._shown, text, key=len)
        return piece

    def _certain(self) -> str:
        """The text that no later token changes."""
        text = self._decoded(clean=False if self._cleans else None).rstrip(_HALF_A_LETTER)
        if not self._cleans:
            return text
        cleaned = [self._tokenizer.clean_up_tokenization(text + after) for after in _NEXT]
        alike = (len(set(letters)) == 1 for letters in zip(*cleaned, strict=False))
        return cleaned[0][: sum(takewhile(bool, alike))]

    def _ends_with_a_byte(self) -> bool:
        """Whether a run of bytes goes on; one that is no letter makes none of the run's bytes one."""
        for token in reversed(self._tokens):
            name = self._tokenizer.convert_ids_to_tokens(token) if token not in self._special else None
            if isinstance(name, str) and name:  # others are left out
                return len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        return False

    def _decoded(self, *, clean: bool | None = None) -> str:
        with others_errors("the tokenizer can't decode what the model says", "pass the model's own with --tokenizer"):
            return str(
                self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=clean)
            )


def _cleans(tokenizer: Any) -> bool:
    """Whether a tokenizer takes spaces away; transformers doesn't let those of pairs of bytes do so."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    paired = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)).__name__ == "BPE"
    return not paired or getattr(
        tokenizer, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", True
    )


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str] | None:
    """Kinds of the decoders that a tokenizer runs; None where it may look at more than a token."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    own = type(tokenizer)
    if not (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and own._decode is PreTrainedTokenizerFast._decode
        and own.decode is PreTrainedTokenizerBase.decode
        and own.clean_up_tokenization is PreTrainedTokenizerBase.clean_up_tokenization
    ):
        return None
    found: set[str] = set()
    fused = False
    for decoder in _flat(json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")):
        found.add(str(decoder.get("type")))
        fused = fused or decoder.get("type") == "Fuse"
        if fused and decoder.get("type") == "Replace" and len(decoder.get("pattern", {}).get("String", "")) != 1:
            return None  # may be text of several tokens
    return found if found <= _BY_TOKEN else None


def _flat(decoder: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    if decoder is not None:
        yield decoder
        for inner in decoder.get("decoders", ()):
            yield from _flat(inner)
