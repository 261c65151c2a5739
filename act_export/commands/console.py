"""What all commands share: messages, progress, and errors that become exit codes."""

from __future__ import annotations

import functools
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn, ParamSpec, TypeVar

import typer

from act_export.commands.printing import PlainConsole, printable, readers_ended
from act_export.errors import ActExportError, VerificationError, needs_extras

EXIT_FAILED_PARITY = 1
EXIT_UNUSABLE = 2
EXIT_DEFECT = 3
EXIT_NOBODY_READS = 128 + signal.SIGPIPE
PAUSE_S = 10.0  # between lines of progress where there is no terminal
_P = ParamSpec("_P")
_R = TypeVar("_R")
console = PlainConsole(stderr=True)


class InterruptedByUser(BaseException):
    """Ctrl-C. Not KeyboardInterrupt: Python would end by that signal where it passed through C code, handled or not."""


def interrupt(*_: object) -> NoReturn:
    """Signal handler: see `InterruptedByUser`."""
    raise InterruptedByUser


def terminate(*_: object) -> NoReturn:
    """Signal handler of SIGTERM."""
    sys.exit(128 + signal.SIGTERM)  # an exception, so that partial files are removed


def reports_errors(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Ends a command with a message and an exit code where the user can do something about it."""

    @functools.wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            with needs_extras("this command"):
                return command(*args, **kwargs)
        except VerificationError as error:
            fail(str(error), EXIT_FAILED_PARITY)
        except ActExportError as error:
            fail(str(error), EXIT_UNUSABLE)
        except (InterruptedByUser, KeyboardInterrupt):
            fail(
                "interrupted; no partial output was left. What a search, a profile or a chat has finished is kept: "
                "the same command goes on",
                EXIT_UNUSABLE,
            )
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
                fail(
                    f"out of memory: {error}; a search or a profile takes less with fewer --batch-tokens or --dtype "
                    f"bfloat16, a search also with --gradient-checkpointing",
                    EXIT_UNUSABLE,
                )
            if isinstance(error, BrokenPipeError):
                readers_ended()
                raise typer.Exit(EXIT_NOBODY_READS) from error
            console.say(traceback.format_exc())
            fail(f"this is a defect of act-export, please report it: {type(error).__name__}: {error}", EXIT_DEFECT)

    return wrapped


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """Runs a program of tools/ and ends the process: as a command does, and a file that can't be used is the user's."""

    def program() -> int | None:
        try:
            return main()
        except OSError as error:
            if error.filename is None:
                raise
            raise ActExportError(f"can't use {error.filename}: {error.strerror}; pass another file") from error

    try:
        sys.exit(reports_errors(program)())
    except typer.Exit as ended:
        sys.exit(ended.exit_code)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message and an exit code."""
    console.print("error:", style="bold red", end=" ")
    console.say(message)
    raise typer.Exit(code)


def note(message: str) -> None:
    """Prints a line to standard error."""
    console.say(message)


@contextmanager
def _said_again(line: Callable[[], str]) -> Iterator[None]:
    """Where there is no terminal: a line every ten seconds, with the time since the block began."""
    began, ended = time.monotonic(), threading.Event()

    def say() -> None:
        with suppress(BrokenPipeError):  # the command itself ends by it
            while not ended.wait(PAUSE_S):
                note(f"{line()}, {time.monotonic() - began:.0f} s so far")

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """What is being done and how long it took so far; a line per step and every ten seconds without a terminal."""
    if not console.is_terminal:
        said: set[str] = set()
        latest = ["preparing"]

        def say_once(step: str) -> None:
            latest[0] = step
            stage = step.partition(":")[0]
            if stage not in said:
                said.add(stage)
                note(stage)

        with _said_again(lambda: latest[0]):
            yield say_once
        return
    from rich.progress import Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda step: progress.update(task, description=printable(step, lines=False))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left; a line for each tenth and every ten seconds where there is no terminal."""
    if not console.is_terminal:
        tenths: set[tuple[str, int]] = set()
        latest = [f"{what}: preparing"]

        def report(step: str, done: float) -> None:
            latest[0] = f"{what}: {step}, {done:.0%} of all"
            tenth = (step, int(10 * done))
            if tenth not in tenths:
                tenths.add(tenth)
                note(latest[0])

        with _said_again(lambda: latest[0]):
            yield report
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0, visible=False)

        def update(step: str, done: float) -> None:
            progress.update(task, description=printable(f"{what}: {step}", lines=False), completed=done, visible=True)

        yield update
