"""Where the native library with the fast operators is."""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

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
    folders = _folders()
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


def _folders() -> list[Path]:
    """Folders of the package ``act_export.ops``: an editable install keeps sources and what is built from them apart."""
    folders = [Path(__file__).parent]
    try:
        folders.append(Path(str(distribution("act-export").locate_file("act_export/ops"))))
    except PackageNotFoundError:
        pass  # a source tree on the path, not installed
    return list(dict.fromkeys(folders))
