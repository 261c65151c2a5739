"""act-export triton: a model repository for Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import typer.core

from act_export.commands.options import (
    DeviceOption,
    FileArgument,
    PortableOption,
)


def triton_command(
    file: FileArgument,
    out: Annotated[Path, typer.Option(metavar="REPOSITORY", help="The model repository; other models there stay.")],
    name: Annotated[str | None, typer.Option(help="Of the model in the server; otherwise the file's.")] = None,
    served_from: Annotated[
        str | None, typer.Option(metavar="PATH", help="Where the server sees REPOSITORY, e.g. /models in a container.")
    ] = None,
    portable: PortableOption = False,
    device: DeviceOption = None,
) -> None:
    """Writes FILE into a model repository of Triton Inference Server."""
    from act_export.export.triton import write_repository

    for path in write_repository(
        file, out, name=name, device=device or "cpu", native=not portable, served_from=served_from
    ):
        print(path)
