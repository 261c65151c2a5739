"""Where the native library with the fast operators is, and what it was built with."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import act_export.ops

NAMES = ("libact_ops.so", "libact_ops.dylib", "libact_ops.dll")


class LibraryNotFoundError(FileNotFoundError):
    """The native library is not part of this installation."""


@dataclass(frozen=True)
class LibraryInfo:
    """What a native library was built with.

    Attributes:
        path: The library.
        cuda: What it has kernels for: "sm_80", "sm_90", ..., and "ptx" for other GPUs; empty for none.
    """

    path: Path
    cuda: tuple[str, ...]


@dataclass(frozen=True)
class LoadedKernels:
    """Which images of its CUDA kernels the native library gave the driver in this process.

    Attributes:
        targets: By the kernel's name: "sm_80", "sm_90", ..., or "ptx", which the driver compiled.
        refused: Why the driver took no better image of one of them; empty where it took the best of each.
    """

    targets: Mapping[str, str]
    refused: str

    def describe(self) -> str:
        """In one line; empty where there are none."""
        counts = Counter(self.targets.values())
        text = ", ".join(f"{count} as {target}" for target, count in sorted(counts.items()))
        if any(name.startswith("hopper.") for name in self.targets):
            others = any(name.startswith("forward.") for name in self.targets)
            text += f", {'some ' * others}prompts by the kernel for Hopper"
        return text + (f" ({self.refused})" if self.refused else "")


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
        for name in NAMES:
            path = folder / name
            if path.is_file():
                return path.resolve()
    searched = ", ".join(str(folder) for folder in folders)
    raise LibraryNotFoundError(
        f"libact_ops is not in {searched}. Install the package, which builds it with a C++17 compiler: "
        "`pip install act-export`, or `pip install -e .` in a source tree."
    )


def library_info(path: Path | None = None) -> LibraryInfo:
    """What the native library was built with; loads it into this process.

    Args:
        path: The library; None is that of this installation.

    Raises:
        LibraryNotFoundError: No path is given, and this installation has none.
        OSError: The file can't be loaded as a library.
        ValueError: It is damaged.
    """
    path = library_path() if path is None else path
    library = ctypes.CDLL(str(path))
    try:
        build_info = library.ActOpsBuildInfo
    except AttributeError:  # built before there were kernels for GPUs
        return LibraryInfo(path, cuda=())
    build_info.restype = ctypes.c_char_p
    text = build_info()
    if text is None:
        raise ValueError(f"{path} is damaged: its CUDA kernels can't be read. Install it again")
    return LibraryInfo(path, cuda=tuple(json.loads(text)["cuda"]))


def loaded_kernels(path: Path | None = None) -> LoadedKernels:
    """What became of the kernels that sessions of this process have looked for so far.

    Args:
        path: The library; None is that of this installation, where it has one.

    Raises:
        OSError: The file can't be loaded as a library.
    """
    try:
        loaded = ctypes.CDLL(str(library_path() if path is None else path)).ActOpsLoadedKernels
    except (LibraryNotFoundError, AttributeError):  # or one that was built before it told
        return LoadedKernels({}, "")
    loaded.restype = ctypes.c_char_p
    found = json.loads(loaded())
    return LoadedKernels(found["kernels"], found["refused"])
