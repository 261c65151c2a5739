"""Options that several commands have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from act_export.checkpoint.gguf.built_in import BUILT_IN
from act_export.errors import ActExportError

if TYPE_CHECKING:
    from act_export.tasks import Questions

MODELS = f"checkpoint folder, hub id, .gguf file or built-in name ({', '.join(BUILT_IN)})"
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=f"{MODELS[0].upper()}{MODELS[1:]}.")]
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
        metavar="letter|likelihood|likelihood-per-token|first-token|generation",
        help="Instead of the task's own scoring.",
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
CalibrationsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="FILE|NAME|FOLDER",
        help="Calibration file, shipped recipe, or a folder of files; repeatable: requests ask for them by name.",
    ),
]
DefaultOption = Annotated[
    str | None,
    typer.Option("--default", metavar="NAME|plain", help="Calibration of requests that don't ask; the first."),
]
SwitchableOption = Annotated[
    bool, typer.Option("--switchable", help="Every head can be calibrated, so calibrations found later fit too.")
]
RequestOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="NAME|plain|FILE",
        help="One of the file's calibrations, instead of its default; or a calibration file, or an adapter.",
    ),
]
TokenizerOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Where the tokenizer is, if not beside the file.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of the splits.")]
PortableOption = Annotated[
    bool, typer.Option("--portable", help="Run the portable functions instead of the native library.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def questions_of(
    tasks: list[str] | None,
    data: list[Path] | None,
    *,
    scoring: str | None,
    shots: int,
    chat: bool,
    truncate: bool,
    seed: int | None,
    default: bool = True,
) -> Questions:
    """What the options of questions say; where neither a task nor data is named, the default task, unless it's off."""
    from act_export.tasks import DEFAULT_TASK, Questions

    names = names_of(tasks)
    if default and not names and not data:
        names = (DEFAULT_TASK,)
    return Questions(names, tuple(data or ()), scoring, shots, chat, truncate, seed)


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


def methods_of(
    method: str | None, given: Mapping[str, Mapping[str, object]], usual: tuple[str, ...]
) -> tuple[str, ...]:
    """Methods of a search.

    Args:
        method: What --method says; None for the usual ones, of which a given --beta leaves "act" alone.
        given: By method, its options and their values; None for those that weren't given.
        usual: Tried without --method.

    Raises:
        ActExportError: If an option is of a method that isn't tried.
    """
    methods = usual if method is None else tuple(part.strip() for part in method.split(","))
    if method is None and given["act"]["--beta"] is not None:
        methods = ("act",)  # a fit has betas of its own
    for owner, values in given.items():
        named = [name for name, value in values.items() if value is not None]
        if named and owner not in methods and not ("--heads" in named and "gamma" in methods):
            raise ActExportError(
                f"{named[0]} is of the method {owner}, which isn't tried; pass --method {','.join((*methods, owner))}"
            )
    return methods
