"""act-export library: where the native library is."""

from __future__ import annotations

from act_export.errors import ActExportError


def library_command() -> None:
    """Prints the path of the native library, for C++, C#, Triton and other hosts."""
    from act_export.ops.library import LibraryNotFoundError, library_path

    try:
        print(library_path())
    except LibraryNotFoundError as error:
        raise ActExportError(str(error)) from error
