"""Tests of the limits on what a file may make the process do."""

from __future__ import annotations

import re
import resource
import signal
import threading
import time
from contextlib import suppress

import pytest

from act_export.errors import ActExportError, SessionError
from act_export.limits import memory_limit, time_limit


def test_time_limit_ends_a_regular_expression() -> None:
    begun = time.monotonic()
    limit = time_limit(0.2, "the pattern", "pass another", error=SessionError)
    with pytest.raises(SessionError, match=r"the pattern takes longer than 0\.2 seconds; pass another"), limit:
        re.search(r"(a+)+$", "a" * 60 + "b")
    assert time.monotonic() - begun < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_time_limit_ends_what_catches_every_exception() -> None:
    def work() -> None:
        while True:
            with suppress(Exception):
                time.sleep(0.01)

    with pytest.raises(ActExportError, match="longer than"), time_limit(0.1, "the loop"):
        work()


def test_time_limit_lets_through_what_is_fast_and_its_errors() -> None:
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(30, "this"):
        pass
    with pytest.raises(KeyError), time_limit(30, "this"):
        raise KeyError
    assert signal.getsignal(signal.SIGALRM) is before


def test_of_two_time_limits_the_shorter_one_counts() -> None:
    with pytest.raises(ActExportError, match=r"^outer"), time_limit(0.2, "outer"), time_limit(30, "inner"):
        time.sleep(10)
    with time_limit(30, "outer"):
        with pytest.raises(ActExportError, match=r"^inner"), time_limit(0.1, "inner"):
            time.sleep(10)
        assert 25 < signal.getitimer(signal.ITIMER_REAL)[0] <= 30


def test_no_time_limit_in_other_threads() -> None:
    done = []

    def work() -> None:
        with time_limit(0.01, "this"):
            time.sleep(0.1)
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


def ring(*_: object) -> None:
    """Of an application's timer."""


def test_an_applications_timer_goes_on() -> None:
    """It neither is a limit of the block, nor ends with it."""
    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.3, 5)
    try:
        with pytest.raises(ActExportError, match=r"^this"), time_limit(0.5, "this"):
            time.sleep(10)
        assert signal.getsignal(signal.SIGALRM) is ring
        time.sleep(0.05)
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 4 < left <= 5 == interval
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_no_memory_limit_but_in_a_command() -> None:
    size, before = 15, resource.getrlimit(resource.RLIMIT_AS)
    with memory_limit(64 << 20, "this"):
        assert resource.getrlimit(resource.RLIMIT_AS) == before
    limit = memory_limit(64 << 20, "this", "x", error=SessionError)
    with pytest.raises(SessionError, match="takes more memory than there is; x"), limit:
        "a" * 10**size


def test_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("act_export.limits._one_process", True)
    size = 12
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = memory_limit(64 << 20, "the template", "pass another", error=SessionError)
    with pytest.raises(SessionError, match="the template takes more than 64 MB; pass another"), limit:
        "a" * 10**size
    with memory_limit(1 << 30, "this"):
        "a" * (10**6)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
