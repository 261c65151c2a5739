"""Freed memory stays with a search, and goes back to the system after it."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import pytest

from act_export.search.memory import freed_memory_kept

SIZE = 1 << 27  # bytes


def resident() -> int:
    """Bytes that the process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def use_and_free(library: ctypes.CDLL) -> None:
    library.malloc.restype = ctypes.c_void_p
    place = ctypes.c_void_p(library.malloc(ctypes.c_size_t(SIZE)))
    library.memset(place, 1, ctypes.c_size_t(SIZE))
    library.free(place)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left alone")
def test_freed_memory_is_kept_for_the_block_and_given_back_after_it() -> None:
    library = ctypes.CDLL(None)
    before = resident()
    use_and_free(library)
    assert resident() - before < SIZE / 2
    with freed_memory_kept():
        use_and_free(library)
        kept = resident() - before
    assert kept > SIZE / 2 > resident() - before
    use_and_free(library)
    assert resident() - before < SIZE / 2
