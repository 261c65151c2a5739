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


_alarms: list[object] = []  # handlers of the time limits in force, the innermost last
_one_process = False


def allow_process_limits() -> None:
    """Says that this process runs one command and nothing else, so that limits may be the whole process's."""
    global _one_process
    _one_process = True


class _TimeIsUp(BaseException):
    """Raised by the alarm. No Exception, which a template engine or a library would catch."""


@contextmanager
def time_limit(
    seconds: float, what: str, advice: str = "", *, error: type[ActExportError] = ActExportError
) -> Iterator[None]:
    """Ends the block with an error after some time.

    Python's own code, `re` and jinja2 can be ended so; a call into another library ends first. In another thread than
    the main one, where Python handles no signals, there is no limit. Within another time limit the shorter one counts.
    An application's own timer of this kind waits for the block, and goes on after it.

    Args:
        seconds: That the block may take.
        what: Took too long, in errors: "the chat template of smollm2".
        advice: What to do, at the end.
        error: What is raised.

    Raises:
        ActExportError: Or `error`, if the time is over.
    """
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    nested = bool(_alarms) and signal.getsignal(signal.SIGALRM) is _alarms[-1]
    if threading.current_thread() is not threading.main_thread() or (nested and 0 < left <= seconds):
        yield
        return
    within, begun = True, time.monotonic()

    def ring(*_: object) -> None:
        if within:
            raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, ring)
    _alarms.append(ring)
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
        _alarms.pop()
        signal.signal(signal.SIGALRM, before if before is not None else signal.SIG_DFL)
        if left > 0:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3), interval)


@contextmanager
def memory_limit(
    more_bytes: int, what: str, advice: str = "", *, error: type[ActExportError] = ActExportError
) -> Iterator[None]:
    """Ends the block with an error when the process wants much more memory than it has.

    The limit is the whole process's, whose other threads and libraries wouldn't bear it: so there is one only in the
    main thread of a command, see `allow_process_limits`, and where the system says what a process has. Elsewhere the
    block ends where there is no memory at all, with such an error.

    Args:
        more_bytes: That the block may take.
        what: Took too much, in errors.
        advice: What to do, at the end.
        error: What is raised.

    Raises:
        ActExportError: Or `error`, if the memory isn't enough.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    has = _address_space_bytes() if _one_process and threading.current_thread() is threading.main_thread() else None
    highest = has + more_bytes if has is not None else resource.RLIM_INFINITY
    limited = has is not None and (soft == resource.RLIM_INFINITY or soft > highest)
    most = f"than {more_bytes >> 20} MB" if limited else "memory than there is"
    try:
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (highest, hard))
        yield
    except MemoryError as cause:
        raise error(f"{what} takes more {most}" + (f"; {advice}" if advice else "")) from cause
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int | None:
    """What this process has mapped; None where the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
