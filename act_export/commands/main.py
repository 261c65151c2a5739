"""The command line: which commands there are, and what holds for all of them."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from act_export.commands.adapter import adapter_command
from act_export.commands.bench import bench_command
from act_export.commands.console import (
    EXIT_NOBODY_READS,
    EXIT_UNUSABLE,
    fail,
    interrupt,
    reports_errors,
    terminate,
)
from act_export.commands.evaluate import eval_command, lm_eval_command
from act_export.commands.export import export_command
from act_export.commands.fetch_data import fetch_data_command
from act_export.commands.generate import generate_command
from act_export.commands.graft import graft_command
from act_export.commands.inspect import inspect_command
from act_export.commands.library import library_command
from act_export.commands.options import MODELS
from act_export.commands.printing import readers_ended
from act_export.commands.profile import profile_command, report_command
from act_export.commands.search import search_command
from act_export.commands.trial import try_command
from act_export.commands.triton import triton_command
from act_export.commands.verify import verify_command
from act_export.limits import allow_process_limits
from act_export.version import __version__

DEFAULT_COMMAND = "export"


class _DefaultToExport(typer.core.TyperGroup):
    """`act-export MODEL --out F` is `act-export export MODEL --out F`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own_options = {"--help", "--version", "--install-completion", "--show-completion"}
        if args and args[0] not in self.commands and args[0] not in own_options:
            _refuse_mistyped_command(args[0], [name for name in self.commands if name != DEFAULT_COMMAND])
            args = [DEFAULT_COMMAND, *args]
        return super().parse_args(ctx, args)


def _refuse_mistyped_command(word: str, commands: list[str]) -> None:
    near = difflib.get_close_matches(word, commands, n=1, cutoff=0.7)
    if near and not Path(word).exists():
        fail(f"there is no command {word!r} and no model of that name; did you mean {near[0]}?", EXIT_UNUSABLE)


app = typer.Typer(
    cls=_DefaultToExport,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Attention sink calibration baked into ONNX models.\n\n"
    "[bold]act-export MODEL --out calibrated.onnx[/bold] is the whole job: MODEL is a "
    f"{MODELS}.",
)


def main() -> None:
    """Entry point of the `act-export` command."""
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    allow_process_limits()
    try:
        app()
    finally:
        if readers_ended():
            sys.exit(EXIT_NOBODY_READS)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(__version__)
        raise typer.Exit


_OTHERS_ARGUMENTS = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
_COMMANDS: dict[str, Callable[..., None]] = {
    DEFAULT_COMMAND: export_command,
    "try": try_command,
    "search": search_command,
    "graft": graft_command,
    "adapter": adapter_command,
    "profile": profile_command,
    "report": report_command,
    "verify": verify_command,
    "generate": generate_command,
    "eval": eval_command,
    "lm-eval": lm_eval_command,
    "fetch-data": fetch_data_command,
    "bench": bench_command,
    "inspect": inspect_command,
    "triton": triton_command,
    "library": library_command,
}
for _name, _command in _COMMANDS.items():
    _settings = _OTHERS_ARGUMENTS if _command is lm_eval_command else None
    app.command(_name, context_settings=_settings)(reports_errors(_command))
