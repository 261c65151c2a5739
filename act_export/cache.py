"""The folder of what is expensive to get a second time, and how files come into it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

from act_export.errors import ActExportError

_BLOCK_BYTES = 1 << 20


def cache_folder() -> Path:
    """Where converted checkpoints and fetched task data are kept."""
    return Path(platformdirs.user_cache_dir("act-export"))


def check_writable(folder: Path) -> None:
    """Refuses, before any work, a folder for results, there or to be made, that can't be written to.

    Raises:
        ActExportError: With the folder, and what to do.
    """
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ActExportError(f"can't write to {folder}: {error.strerror}; pass another place with --out") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, whole or not at all, with the folders it is in; of several writers at once the last one wins.

    Raises:
        OSError: If it can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as own:
        whole = Path(own) / path.name
        whole.write_bytes(content.encode() if isinstance(content, str) else content)
        whole.replace(path)


def join_whole(path: Path, parts: Sequence[Path], *, sha256: str) -> str:
    """Writes files one after another into one, whole or not at all, holding little of them in memory.

    Args:
        path: The file to write.
        parts: The files, in their order.
        sha256: What the whole file must have, in hexadecimal; with another nothing is written.

    Returns:
        The SHA-256 that it has.

    Raises:
        OSError: If a part can't be read, or the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as own:
        whole = Path(own) / path.name
        with whole.open("wb") as joined:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(_BLOCK_BYTES):
                        digest.update(block)
                        joined.write(block)
        if digest.hexdigest() == sha256:
            whole.replace(path)
    return digest.hexdigest()
