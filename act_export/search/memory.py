"""Freed memory that a search keeps for its next batch."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # parameters of glibc's mallopt, and what they are by default
_USUAL = {_TRIM_THRESHOLD: 128 * 1024, _TOP_PAD: 128 * 1024, _MMAP_MAX: 65536}
_KEEPING = {_TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 * 1024 * 1024, _MMAP_MAX: 0}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Has the C library keep what is freed, for the duration of the block; then it goes back to the system.

    A batch's activations are larger than what the C library keeps by itself, so that the system would give, and clear,
    all of their pages anew for each operation: a fifth of a search's time in bfloat16. Other C libraries than glibc are
    left alone. Whether it is glibc's `malloc` that serves the process isn't looked at: the calls do no harm elsewhere.
    """
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallopt") and hasattr(library, "malloc_trim")):
        yield
        return
    try:
        for parameter, value in _KEEPING.items():
            library.mallopt(parameter, value)
        yield
    finally:
        for parameter, value in _USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
