"""Files: where those that others name may lie, and copying, joining and moving them into place, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from act_export.errors import ActExportError, shown
from act_export.staging import staging_folder

_BLOCK_BYTES = 1 << 20
_LONGEST_NAME = 1024  # characters; no file that a model names has a longer one
_KINDS = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def cache_folder() -> Path:
    """Where converted checkpoints and fetched task data are kept."""
    import platformdirs  # only for this: running a file does without

    return Path(platformdirs.user_cache_dir("act-export"))


def path_inside(
    folder: Path,
    name: object,
    what: str,
    *,
    error: type[ActExportError] = ActExportError,
    also: Sequence[Path] = (),
) -> Path:
    """The place of a file that another file names, which must be in the folder it is named in.

    Links are followed: what counts is where they lead. Those of the hub's cache, from a revision's folder to the
    contents beside it, are taken for the files that they stand for.

    Args:
        folder: That the name is relative to.
        name: As it was found, e.g. the external data's location in an ONNX file.
        what: Who names it, for errors: "the weights of model.onnx".
        error: What is raised.
        also: Other folders that links may lead to, such as the one that a model's own link leads to.

    Returns:
        The path, with its links; it need not exist.

    Raises:
        ActExportError: Or `error`, if the name is no string, empty, absolute, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME or "\0" in name:
        raise error(f"{what}: {shown(name)} is no name of a file")
    parts = PurePosixPath(name.replace("\\", "/")).parts
    if name.startswith(("/", "\\")) or ".." in parts:
        raise error(f"{what}: {shown(name)} leads out of {folder}; only files in that folder are used")
    path = folder / name
    try:
        real = path.resolve()
        homes = [folder.resolve(), *(place.resolve() for place in also), *_hub_contents(folder)]
    except (OSError, RuntimeError) as cause:  # links in a circle
        raise error(f"{what}: {shown(name)} can't be followed: {cause}") from cause
    if not any(real.is_relative_to(home) for home in homes):
        raise error(f"{what}: {path} is a link to {real}, out of {folder}; copy the file there instead")
    return path


def _hub_contents(folder: Path) -> list[Path]:
    """Where the hub's cache has the contents of the files of a revision: REPOSITORY/blobs of REPOSITORY/snapshots/X."""
    found = []
    for place in dict.fromkeys((folder.absolute(), folder.resolve())):
        for inner in (place, *place.parents):
            if inner.parent.name == "snapshots" and inner.parent.parent.name.startswith(("models--", "datasets--")):
                found.append((inner.parent.parent / "blobs").resolve())
    return found


def check_replaceable(path: Path, *, error: type[ActExportError] = ActExportError) -> None:
    """Refuses a place for a file where something other than a plain file is: a device, pipe, socket, link or folder.

    Raises:
        ActExportError: Or `error`, with what is there and what to pass instead.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return  # nothing is there, or what is wrong shows when it is written
    kind = next((name for test, name in _KINDS if test(mode)), None)
    if kind is None:
        return
    if kind == "a link":
        raise error(f"{path} is a link to {os.readlink(path)}, which would be replaced; pass the file's own path")
    raise error(f"{path} is {kind}, which isn't replaced; pass the name of a file")


def check_writable(
    folder: Path,
    *,
    error: type[ActExportError] = ActExportError,
    advice: str = "pass another place with --out",
) -> None:
    """Refuses, before any work, a folder for results, there or to be made, that can't be written to.

    Raises:
        ActExportError: Or `error`, with the folder, and what to do.
    """
    folder = folder.absolute()
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise error(f"{folder} is no folder; {advice}")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as cause:
        raise error(f"can't write to {folder}: {cause.strerror}; {advice}") from cause


@contextmanager
def folders_made(folder: Path) -> Iterator[None]:
    """Makes a folder and those that it is in; of what it made, folders in which nothing is go when the block ends.

    Raises:
        OSError: If it can't be made.
    """
    missing = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for place in missing:
            with suppress(OSError):  # something is in it
                place.rmdir()


def move_into_place(made: Path, final: Path, *, error: type[ActExportError] = ActExportError) -> Path:
    """Renames a finished file to its final name, after its content is on the disk; what was there before is replaced.

    Raises:
        ActExportError: Or `error`, as `check_replaceable`.
        OSError: If it can't be moved.
    """
    check_replaceable(final, error=error)
    flush(made)
    made.replace(final)
    flush(final.parent)
    return final


def flush(path: Path) -> None:
    """Has a file's content, or a folder's list of files, on the disk before it returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as cause:
        if cause.errno not in (errno.EINVAL, errno.EROFS):  # some file systems can't for folders
            raise
    finally:
        os.close(handle)


def write_whole(path: Path, content: str | bytes, *, error: type[ActExportError] = ActExportError) -> None:
    """Writes a file, whole or not at all, with the folders it is in; of several writers at once the last one wins.

    Raises:
        ActExportError: Or `error`, as `check_replaceable`.
        OSError: If it can't be written.
    """
    check_replaceable(path, error=error)
    path.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(path.parent, path.name) as own:
        whole = own / path.name
        whole.write_bytes(content.encode() if isinstance(content, str) else content)
        move_into_place(whole, path, error=error)


def copy_content(source: Path, target: Path) -> None:
    """Copies a file's bytes, behind links, into a new file with the permissions of new files; never its mode or owner.

    Raises:
        OSError: If it can't be copied, or is no file but a device or pipe.
    """
    if not source.is_file():
        raise FileNotFoundError(errno.ENOENT, "no such file", str(source))
    shutil.copyfile(source, target)


def copy_folder(
    source: Path,
    target: Path,
    *,
    skip: Callable[[Path], bool] = lambda _: False,
    error: type[ActExportError] = ActExportError,
) -> None:
    """Copies the files of a folder and of those within, as `copy_content` does.

    Args:
        source: The folder. Links to files in it are copied as files.
        target: Made if it isn't there.
        skip: What of the source is left out.
        error: What is raised.

    Raises:
        ActExportError: Or `error`, if there is a link out of the source or to a folder, a device, a pipe or a socket.
        OSError: If it can't be copied.
    """
    for folder, _, _ in os.walk(source, followlinks=False):
        place = Path(folder)
        own = target / place.relative_to(source)
        own.mkdir(parents=True, exist_ok=True)
        for path in (each for each in sorted(place.iterdir()) if each.is_symlink() or not each.is_dir()):
            if not skip(path):
                inside = path_inside(source, str(path.relative_to(source)), f"the copy of {source}", error=error)
                if not inside.is_file():
                    raise error(f"{path} is no file, or a link to none, and can't be copied; remove it from {source}")
                copy_content(path, own / path.name)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        OSError: If it can't be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    with staging_folder(path.parent, path.name) as own:
        whole = own / path.name
        with whole.open("wb") as joined:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(_BLOCK_BYTES):
                        digest.update(block)
                        joined.write(block)
        if digest.hexdigest() == sha256:
            move_into_place(whole, path)
    return digest.hexdigest()
