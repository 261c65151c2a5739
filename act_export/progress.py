"""How long work says how far it is."""

from __future__ import annotations

from collections.abc import Callable

Notice = Callable[[str], None]
"""Takes a line: what was decided, or what is being done now."""

Progress = Callable[[str, float], None]
"""Takes what is being done, and the share of all that is done, 0 to 1."""

BytesWritten = Callable[[int, int], None]
"""Takes the bytes that are written, and those of all."""
