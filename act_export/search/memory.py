"""Freed memory that a search keeps for its next batch."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Parameters of glibc's mallopt.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_KEEPING = {_TRIM_THRESHOLD: -1, _TOP_PAD: 64 << 20, _MMAP_MAX: 0}
# What glibc comes to by itself in a process that has freed large blocks; once set it no longer adapts.
_AFTERWARDS = {_TRIM_THRESHOLD: 64 << 20, _TOP_PAD: 128 << 10, _MMAP_THRESHOLD: 32 << 20, _MMAP_MAX: 65536}


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Has the C library keep what is freed, for the duration of the block; then it goes back to the system.

    A batch's activations are larger than what the C library keeps by itself, so that the system would give, and clear,
    all of their pages anew for each operation: a fifth of a search's time in bfloat16. Other C libraries than glibc
    are left alone, and settings of its `malloc` in the environment.
    """
    if _is_set() or sys.platform != "linux" or platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    try:
        for parameter, value in _KEEPING.items():
            library.mallopt(parameter, value)
        yield
    finally:
        for parameter, value in _AFTERWARDS.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def _is_set() -> bool:
    """Whether the environment says how `malloc` is to behave, or brings another."""
    said = {name for name in os.environ if name.startswith("MALLOC_")} | {"GLIBC_TUNABLES", "LD_PRELOAD"}
    return any(os.environ.get(name) for name in said)
