"""Text of tokens as they come: pieces that joined are what the tokenizer makes of all tokens together.

Decoding is no token's own affair. A letter may need several tokens, tokens of single bytes are read as a run, and some
tokenizers take the space before a comma away afterwards. So every step decodes a window of the last tokens, begun where
no letter is half and kept only if its text goes on as the whole does, and what a later token may still change is held
back. The end decodes the whole.
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
_WINDOW = 32  # tokens, or letters, until the window is begun anew
_OVERLAP = 8  # tokens, at least, that are decoded again with what follows them
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
        self._in_bytes = False  # whether a run of bytes goes on
        self._ends: list[int] = []  # numbers of tokens after which no letter is half
        self._start = 0  # the window's first token
        self._next_move = _WINDOW
        self._overlap = ""  # the window's text when it was begun, and the whole text then
        self._before = ""
        self._cleaned, self._cleaned_to = "", 0  # the text of so many letters, cleaned

    def put(self, token: int) -> str:
        """The text that is certain with this token; it may be empty.

        Raises:
            ActExportError: If the tokenizer can't decode the token.
        """
        self._tokens.append(token)
        if not self._known or (self._joins_bytes and self._goes_on_in_bytes(token)):
            return ""
        text = self._text()
        if text is None:
            return ""
        certain = self._certain(text)
        if not certain.startswith(self._shown):
            return ""
        if not text.endswith(_HALF_A_LETTER):
            self._move(text)
        return self._new(certain)

    def end(self) -> str:
        """What is left of the text.

        Raises:
            ActExportError: If the tokenizer changed what was certain.
        """
        text = self._decoded(0)
        if not text.startswith(self._shown):
            raise ActExportError(
                f"the tokenizer, a {type(self._tokenizer).__name__}, changed text that had been shown already; "
                f"the whole text is {text!r}"
            )
        return self._new(text)

    def _new(self, text: str) -> str:
        piece, self._shown = text[len(self._shown) :], max(self._shown, text, key=len)
        return piece

    def _text(self) -> str | None:
        """The text of all tokens, not cleaned yet; None where the window doesn't go on as it was begun."""
        text = self._decoded(self._start, clean=False if self._cleans else None)
        return self._before + text[len(self._overlap) :] if text.startswith(self._overlap) else None

    def _certain(self, text: str) -> str:
        """What no later token changes of a text that isn't cleaned yet."""
        text = text.rstrip(_HALF_A_LETTER)
        if not self._cleans:
            return text
        rest = text[self._cleaned_to :]
        cleaned = [self._tokenizer.clean_up_tokenization(rest + after) for after in _NEXT]
        alike = (len(set(letters)) == 1 for letters in zip(*cleaned, strict=False))
        return self._cleaned + cleaned[0][: sum(takewhile(bool, alike))]

    def _move(self, text: str) -> None:
        """Begins the window later, if it can; no letter is half at the end of the text."""
        count = len(self._tokens)
        if self._cleans and len(text) - self._cleaned_to > _WINDOW:
            place = next((at for at in range(len(text) - 1, self._cleaned_to, -1) if _apart(text, at)), None)
            if place is not None:
                self._cleaned += self._tokenizer.clean_up_tokenization(text[self._cleaned_to : place])
                self._cleaned_to = place
        self._ends.append(count)
        if count < self._next_move:
            return
        self._next_move = count + _WINDOW
        start = max((end for end in self._ends if end <= count - _OVERLAP), default=0)
        if start <= self._start:
            return
        overlap = self._decoded(start, clean=False if self._cleans else None)
        # A text's first token may be read in another way: without its space, for one. The others may not.
        if overlap and text.endswith(overlap[len(overlap) // 2 :]):
            self._start, self._overlap, self._before = start, overlap, text
            self._ends = [end for end in self._ends if end > start]

    def _goes_on_in_bytes(self, token: int) -> bool:
        """Whether a run of bytes goes on; one that is no letter makes none of the run's bytes one."""
        name = self._tokenizer.convert_ids_to_tokens(token) if token not in self._special else None
        if isinstance(name, str) and name:  # others are left out
            self._in_bytes = len(name) == 6 and name.startswith("<0x") and name.endswith(">")
        return self._in_bytes

    def _decoded(self, start: int, *, clean: bool | None = None) -> str:
        tokens = self._tokens[start:]
        with others_errors("the tokenizer can't decode what the model says", "pass the model's own with --tokenizer"):
            return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=clean))


def _apart(text: str, place: int) -> bool:
    """Whether what is before a place and after it is cleaned by itself: all that is looked for begins with a space."""
    pair = text[place - 1 : place + 1]
    return pair not in ("ve", "re") and not any(letter.isspace() or letter == "'" for letter in pair)


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
