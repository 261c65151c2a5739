"""Where the native library with the fast operators is."""

from pathlib import Path

import act_export.ops

_NAMES = ("libact_ops.so", "libact_ops.dylib", "libact_ops.dll")


class LibraryNotFoundError(FileNotFoundError):
    """The native library is not part of this installation."""


def library_path() -> Path:
    """Path of the native library, to give to ONNX Runtime's ``register_custom_ops_library``.

    Returns:
        Absolute path of ``libact_ops`` of this installation, wheel or editable.

    Raises:
        LibraryNotFoundError: This installation has none, as when it runs from a source tree that was never built.
    """
    # An editable install has two folders: the sources, and what was built from them.
    folders = [Path(folder) for folder in act_export.ops.__path__]
    for folder in folders:
        for name in _NAMES:
            path = folder / name
            if path.is_file():
                return path.resolve()
    searched = ", ".join(str(folder) for folder in folders)
    raise LibraryNotFoundError(
        f"libact_ops is not in {searched}. Install the package, which builds it with a C++17 compiler: "
        "`pip install act-export`, or `pip install -e .` in a source tree."
    )
