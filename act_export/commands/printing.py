"""What is printed: texts that somebody else chose, fit for a terminal.

Names in files, metadata, tokens and messages of other libraries may hold escape sequences, which clear a screen, set a
window's title or type commands, marks that turn a line's order around, and what rich takes for its markup.
"""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_LINE_ENDS = "\n\t"
_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb]")


def printable(text: object, *, lines: bool = True) -> str:
    r"""A text in which control characters and marks that reorder it are shown as escapes, e.g. ``\x1b``.

    Args:
        text: Anything; its `str` is taken.
        lines: Leave ends of lines and tabs as they are.
    """

    def escaped(found: re.Match[str]) -> str:
        sign = found[0]
        return sign if lines and sign in _LINE_ENDS else ascii(sign)[1:-1]

    return _UNFIT.sub(escaped, str(text))


class PlainTable(Table):
    """A table whose cells are texts as they stand: no markup in them, and `printable`."""

    def add_row(self, *cells: Any, **options: Any) -> None:
        """As rich's own."""
        super().add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells), **options)

    def add_column(self, header: Any = "", *arguments: Any, **options: Any) -> None:
        """As rich's own."""
        super().add_column(Text(printable(header)) if isinstance(header, str) else header, *arguments, **options)


class PlainConsole(Console):
    """A console that takes texts as they stand: no markup, no names of emoji, no colours for numbers."""

    def __init__(self, **options: Any) -> None:
        """Takes what rich's own takes."""
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def say(self, text: object) -> None:
        """Prints a text that is `printable`, its lines as long as they are."""
        self.print(Text(printable(text)), soft_wrap=True)

    def on_broken_pipe(self) -> None:
        """Whoever read the output has ended: an error like any other, rather than rich's own way out."""
        raise BrokenPipeError


def readers_ended() -> bool:
    """Whether something is left to print for a process that has ended; it is dropped."""
    ended = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            ended = True
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())  # or Python would complain when it ends
            os.close(nowhere)
        except (OSError, ValueError):  # closed, or full
            pass
    return ended
