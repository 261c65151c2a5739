"""Freed memory stays with a search, and goes back to the system after it."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest

from act_export.search.memory import freed_memory_kept

# In a process of its own: how glibc allocates is the whole process's.
MEASURE = """
import ctypes, json, os, resource
from act_export.search.memory import freed_memory_kept

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def faults(size, rounds=8):
    # page faults of using and freeing a block of so many bytes again and again, but for the first time
    for round in range(rounds):
        if round == 1:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        place = ctypes.c_void_p(library.malloc(ctypes.c_size_t(size)))
        library.memset(place, 1, ctypes.c_size_t(size))
        library.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

LARGE, SMALL = 1 << 27, 1 << 20
found = {"start": resident(), "large before": faults(LARGE), "small before": faults(SMALL)}
with freed_memory_kept():
    found |= {"large": faults(LARGE), "small": faults(SMALL), "kept": resident()}
found |= {"end": resident(), "large after": faults(LARGE), "small after": faults(SMALL)}
print(json.dumps(found))
"""


def measured(**settings: str) -> dict[str, int]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | settings
    done = subprocess.run([sys.executable, "-c", MEASURE], env=environment, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's; that others are left alone is the next test"
)
def test_freed_memory_is_kept_for_the_block_and_given_back_after_it() -> None:
    found = measured(GLIBC_TUNABLES="", LD_PRELOAD="")
    assert found["large"] < found["large before"] / 10
    assert found["kept"] - found["start"] > 1 << 26 > found["end"] - found["start"]
    assert found["large after"] > found["large"]
    assert found["small after"] <= found["small before"] + 8  # no slower than before


@pytest.mark.parametrize("setting", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES", "LD_PRELOAD", None])
def test_other_c_libraries_and_settings_of_the_environment_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, setting: str | None
) -> None:
    def called(_: None) -> ctypes.CDLL:
        raise AssertionError("the C library is called")

    monkeypatch.setattr(ctypes, "CDLL", called)
    if setting is not None:
        monkeypatch.setenv(setting, "2")
    else:
        monkeypatch.setattr(platform, "libc_ver", lambda: ("musl", ""))
    with freed_memory_kept():
        pass
