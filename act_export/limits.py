"""Limits on what a file's own patterns and templates may make this process do: time, and memory.

A regular expression of a task, or the chat template of a tokenizer, is a small program that somebody else wrote. It may
run without end, or multiply a text until no memory is left; what goes over a limit is refused with the limit.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from act_export.errors import ActExportError

_AGAIN_SECONDS = 0.5  # until the alarm rings again, where something swallowed the exception


class _TimeIsUp(BaseException):
    """Raised by the alarm. No Exception, which a template engine or a library would catch."""


@contextmanager
def time_limit(
    seconds: float, what: str, advice: str = "", *, error: type[ActExportError] = ActExportError
) -> Iterator[None]:
    """Ends the block with an error after some time.

    Python's own code, `re` and jinja2 can be ended so; a call into another library ends first. In another thread than
    the main one, where Python handles no signals, there is no limit. Within another time limit the shorter one counts.

    Args:
        seconds: That the block may take.
        what: Took too long, in errors: "the chat template of smollm2".
        advice: What to do, at the end.
        error: What is raised.

    Raises:
        ActExportError: Or `error`, if the time is over.
    """
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    if threading.current_thread() is not threading.main_thread() or 0 < left <= seconds:
        yield
        return
    within, begun = True, time.monotonic()

    def ring(*_: object) -> None:
        if within:
            raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_SECONDS)
    try:
        try:
            yield
        finally:
            within = False
    except _TimeIsUp as cause:
        raise error(f"{what} takes longer than {seconds:g} seconds" + (f"; {advice}" if advice else "")) from cause
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3))


@contextmanager
def memory_limit(
    more_bytes: int, what: str, advice: str = "", *, error: type[ActExportError] = ActExportError
) -> Iterator[None]:
    """Ends the block with an error when the process wants much more memory than it has.

    For Python's own code alone: other libraries end the process where they get no memory. No limit in another thread
    than the main one, because it would be all threads', nor where the system doesn't say what a process has.

    Args:
        more_bytes: That the block may take.
        what: Took too much, in errors.
        advice: What to do, at the end.
        error: What is raised.

    Raises:
        ActExportError: Or `error`, if the memory isn't enough.
    """
    has = _address_space_bytes()
    if threading.current_thread() is not threading.main_thread() or has is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY and soft <= has + more_bytes:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (has + more_bytes, hard))
    try:
        yield
    except MemoryError as cause:
        raise error(f"{what} takes more than {more_bytes >> 20} MB" + (f"; {advice}" if advice else "")) from cause
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int | None:
    """What this process has mapped; None where the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
