"""What all commands share: options, messages, progress, and errors that become exit codes."""

from __future__ import annotations

import functools
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec, TypeVar

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from act_export.checkpoint.hub import is_on_hub
from act_export.errors import ActExportError, VerificationError
from act_export.printing import PlainConsole, printable, readers_ended

if TYPE_CHECKING:
    from act_export.checkpoint.fetch import Fetched
    from act_export.checkpoint.load import Checkpoint

EXIT_FAILED_PARITY = 1
EXIT_UNUSABLE = 2
EXIT_DEFECT = 3
EXIT_NOBODY_READS = 128 + signal.SIGPIPE
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
            return command(*args, **kwargs)
        except VerificationError as error:
            fail(str(error), EXIT_FAILED_PARITY)
        except ActExportError as error:
            fail(str(error), EXIT_UNUSABLE)
        except (InterruptedByUser, KeyboardInterrupt):
            fail(
                "interrupted; no partial output was left. What a search or a profile has finished is kept: the same "
                "command goes on",
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


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a message and an exit code."""
    console.print("error:", style="bold red", end=" ")
    console.say(message)
    raise typer.Exit(code)


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint folder, hub id, .gguf file or smollm2-135m.")
]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", metavar="REVISION", help="Of a hub id: branch, tag or commit; or owner/name@REVISION."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint, if it needs any.")
]
FileArgument = Annotated[Path, typer.Argument(metavar="FILE", help="An exported .onnx file, or the folder with it.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", metavar="NAME", help="Search heads on this task, or the task of a file *.json.")
]
DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="FILE.jsonl", help="Or on your own rows: prompt, choices, answer.")
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME,...", help="A task, or several by comma, or a task file; repeatable."),
]
DataFilesOption = Annotated[
    list[Path] | None, typer.Option("--data", metavar="FILE.jsonl", help="Your own rows; repeatable.")
]
ScoringOption = Annotated[
    str | None,
    typer.Option(
        metavar="letter|likelihood|likelihood-per-token|generation", help="Instead of the task's own scoring."
    ),
]
ShotsOption = Annotated[int, typer.Option(min=0, help="Examples before each question.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")]
TruncateOption = Annotated[bool, typer.Option("--truncate", help="Cut prompts that are too long, on the left.")]
BatchTokensOption = Annotated[int | None, typer.Option(help="Positions that run together: bounds memory.")]
DtypeOption = Annotated[str, typer.Option(metavar="float32|bfloat16|float16|auto", help="Of the model.")]
AccuracyLevelOption = Annotated[
    int | None,
    typer.Option(metavar="0..4", help="Of int8 and int4: 4 (default) rounds activations to int8, 1 doesn't: slower."),
]
BlockSizeOption = Annotated[int | None, typer.Option(help="Of int8 and int4: weights that share a scale, 32.")]
WeightsOption = Annotated[
    Path | None, typer.Option("--weights", metavar="F.onnx", help="Search on this int4 or int8 file's weights.")
]
DeviceOption = Annotated[str | None, typer.Option(metavar="cpu|cuda|cuda:N", help="Where the model runs.")]
DeviceMapOption = Annotated[str | None, typer.Option(metavar="auto", help="Spread the model over GPUs.")]
BetaOption = Annotated[float | None, typer.Option(help="Scale of later sinks, 0 to 2.")]
ThresholdOption = Annotated[float | None, typer.Option(help="Sink score above which a token is a later sink.")]
ModeOption = Annotated[
    str | None, typer.Option(metavar="absolute|relative", help="Relative: threshold / number of tokens.")
]
TokenizerOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Where the tokenizer is, if not beside the file.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the splits.")]
PortableOption = Annotated[
    bool, typer.Option("--portable", help="Run the portable functions instead of the native library.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def load_model(
    model: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    device_map: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    stream: bool | None = False,
) -> Checkpoint:
    """Loads MODEL, saying so; see `act_export.checkpoint.load_checkpoint`."""
    fetched = None
    if is_on_hub(model):
        from act_export.checkpoint.placement import Placement

        Placement(dtype, device, device_map)  # refused before a download
        fetched = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code)
    with status() as step:
        step(f"loading {model}")
        from act_export.checkpoint.load import load_checkpoint, load_fetched

        if fetched is not None:
            return load_fetched(fetched, dtype=dtype, device=device, device_map=device_map, stream=stream)
        loaded = load_checkpoint(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
            stream=stream,
        )
    from act_export.checkpoint.gguf.convert import remarks_of

    for remark in remarks_of(Path(loaded.model.name_or_path or model)):
        note(f"note: {remark}")
    return loaded


def fetch_model(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Fetched:
    """Gets MODEL's files, while the hub client shows its own bars; see `act_export.checkpoint.fetch_checkpoint`."""
    if is_on_hub(model):
        note(f"looking for {model} on the hub, or in its cache")
    from act_export.checkpoint.fetch import fetch_checkpoint

    return fetch_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)


def names_of(given: list[str] | None) -> tuple[str, ...]:
    """Names that come by comma, by repeating the option, or both."""
    return tuple(name.strip() for names in given or () for name in names.split(",") if name.strip())


def numbers_of(option: str, given: str | None, *, whole: bool = False) -> tuple[float, ...]:
    """Numbers that come by comma; none where the option isn't given."""
    try:
        return tuple(int(number) if whole else float(number) for number in given.split(",")) if given else ()
    except ValueError as error:
        kind = "whole numbers" if whole else "numbers"
        raise ActExportError(f"{option} is {given!r}; it must be {kind}, by comma") from error


def note(message: str) -> None:
    """Prints a line to standard error."""
    console.say(message)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """What is being done and how long it took so far; a line per step where there is no terminal."""
    if not console.is_terminal:
        said: set[str] = set()

        def say_once(step: str) -> None:
            stage = step.partition(":")[0]
            if stage not in said:
                said.add(stage)
                note(stage)

        yield say_once
        return
    columns = (TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda step: progress.update(task, description=printable(step, lines=False))


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, float], None]]:
    """A bar with the time left; a line for each tenth where there is no terminal."""
    if not console.is_terminal:
        tenths: set[tuple[str, int]] = set()

        def report(step: str, done: float) -> None:
            tenth = (step, int(10 * done))
            if tenth not in tenths:
                tenths.add(tenth)
                note(f"{what}: {step}, {done:.0%} of all")

        yield report
        return
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
