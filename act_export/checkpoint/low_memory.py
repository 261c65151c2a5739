"""Memory that doesn't suffice: how other libraries say so, one error with what to do, and giving back what is free."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from act_export.errors import ActExportError, first_line

_SAID = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad allocation")


def is_low_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it was raised from, is about memory: Python's, PyTorch's or the system's."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        seen.append(cause)
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return True
        if isinstance(cause, OSError) and cause.errno == errno.ENOMEM:
            return True
        if isinstance(cause, RuntimeError) and any(said in str(cause).lower() for said in _SAID):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def return_freed() -> None:
    """Has the C library give freed memory back to the system: of many small blocks, glibc keeps it by itself."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def low_memory_told(doing: str, advice: str) -> Iterator[None]:
    """Turns an exception about memory into a ActExportError; others pass.

    Args:
        doing: What there was too little memory for, e.g. "load smollm2".
        advice: What to do.

    Raises:
        ActExportError: With what the library said.
    """
    try:
        yield
    except ActExportError:
        raise
    except Exception as error:
        if not is_low_memory(error):
            raise
        raise ActExportError(f"there isn't enough memory to {doing}: {first_line(error)}; {advice}") from error
