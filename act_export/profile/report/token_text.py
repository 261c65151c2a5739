"""Token texts as a reader can see them: white space, control and direction characters become visible."""

from __future__ import annotations

import unicodedata

_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"}
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs")
_COMBINING = ("Mn", "Mc", "Me")


def visible_text(text: str) -> str:
    """The text with a sign for each character that leaves no ink, "⟨U+202E⟩" where there is no usual one.

    A combining mark that begins the text stands on a dotted circle, not on the text before it.
    """
    shown = "".join(_visible(character) for character in text)
    return f"◌{shown}" if shown and unicodedata.category(shown[0]) in _COMBINING else shown


def running_text(text: str) -> str:
    """The same of a text to be read: spaces, tabs and line ends stay as they are."""
    return "".join(character if character in " \n\t" else _visible(character) for character in text)


def _visible(character: str) -> str:
    if character in _SIGNS:
        return _SIGNS[character]
    if unicodedata.category(character) in _UNSEEN:
        return f"⟨U+{ord(character):04X}⟩"
    return character
