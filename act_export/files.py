"""Files: where those that others name may lie, and how results come to their place, whole or not at all.

A result is put together in a folder of its own beside its final place, and moved there by a rename. The folder is
locked while its owner lives; what a killed process left is removed by the next one that writes there, see `sweep`.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

import platformdirs

from act_export.errors import ActExportError, shown

_BLOCK_BYTES = 1 << 20
_LONGEST_NAME = 1024  # characters; no file that a model names has a longer one
_STAGING = ".act-export-"  # in the names of folders in which results are put together
_LONGEST_PART = 100  # bytes of a result's name in those names; a file system takes 255 in all
_PATIENCE_S = 10.0  # a lock of ours is held for less
_ABANDONED_S = 2 * 24 * 3600.0
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
def staging_folder(place: Path, name: str) -> Iterator[Path]:
    """A folder in `place` to put a result together in, gone when the block ends, however it does.

    What killed processes left in `place` is removed first. The folder is locked (flock) until the block ends, also
    in processes that were forked in it.

    Args:
        place: An existing folder, on the result's own disk, so that `move_into_place` is instant.
        name: Of the result.

    Raises:
        OSError: If it can't be made.
    """
    with _staged(place, lambda prefix: tempfile.mkdtemp(prefix=prefix, dir=place), name) as folder:
        folder.chmod(0o777 & ~_umask())  # mkdtemp's own is for secrets
        yield folder


@contextmanager
def staging_file(place: Path, name: str) -> Iterator[Path]:
    """An empty file in `place`, for what must lie beside others there; else as `staging_folder`."""

    def make(prefix: str) -> str:
        handle, path = tempfile.mkstemp(prefix=prefix, dir=place)
        os.close(handle)
        return path

    with _staged(place, make, name) as file:
        yield file


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files that nobody else can read; else as `staging_folder`."""
    place = Path(tempfile.gettempdir())
    with _staged(place, lambda prefix: tempfile.mkdtemp(prefix=prefix, dir=place), "scratch") as folder:
        yield folder


@contextmanager
def _staged(place: Path, make: Callable[[str], str], name: str) -> Iterator[Path]:
    sweep(place)
    while True:
        path = Path(make(f".{beginning(name)}{_STAGING}{_this_boot()}-"))
        handle = _open(path)
        if handle is not None:
            try_lock(handle, _PATIENCE_S)  # a sweep may hold it
        if path.exists():  # else another process swept it before it was locked
            break
        if handle is not None:
            os.close(handle)
    owner = os.getpid()
    try:
        yield path
    finally:
        if os.getpid() == owner:  # else this is a fork, and the other still works in it
            _remove(path)
        if handle is not None:
            os.close(handle)


def beginning(name: str) -> str:
    """As much of a file's name as fits into another's, by bytes, without what isn't text."""
    return os.fsencode(name)[:_LONGEST_PART].decode(errors="ignore")


def is_staging(path: Path) -> bool:
    """Whether a result is or was put together there, by the name."""
    return path.name.startswith(".") and _STAGING in path.name


def sweep(place: Path) -> None:
    """Removes the staging folders and files in `place` whose owners don't live any more; others are left alone.

    Those that this machine made since it was started are told by their locks. Other machines may write to the same
    place, whose locks aren't seen on every network file system: what they made goes when nothing in it was modified
    for two days. So does all where nothing can be locked, as on NFS, which wants a handle for writing (EBADF).
    """
    with suppress(OSError):
        for path in place.glob(f".*{_STAGING}*"):
            handle = _open(path)
            if handle is None:
                continue
            try:
                if os.fstat(handle).st_uid == os.getuid() and _is_abandoned(path, handle):
                    _remove(path)
            finally:
                os.close(handle)


def _is_abandoned(path: Path, handle: int) -> bool:
    """Whether nobody works in a staging folder or file any more; then it is locked, where it can be."""
    free = try_lock(handle)
    if free is False:
        return False
    made_here = path.name.rpartition(_STAGING)[2].startswith(f"{_this_boot()}-")
    return bool(free and made_here) or time.time() - _last_change(path) > _ABANDONED_S


def _last_change(path: Path) -> float:
    """When a file, or a folder or anything in it, was last modified; now where that can't be told."""
    try:
        inner = [*path.rglob("*")] if path.is_dir() else []
        return max(each.lstat().st_mtime for each in (path, *inner))
    except OSError:
        return time.time()


@functools.cache
def _this_boot() -> str:
    """Names this machine, since it was last started; a lock is seen by all that have the same."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return hashlib.sha256(f"{os.uname().nodename} {boot}".encode()).hexdigest()[:8]


def _remove(path: Path) -> None:
    with suppress(OSError):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder, so that of several processes one at a time moves results there.

    Any other program may hold it too, for as long as it likes, and not every file system has locks: after 10 seconds,
    or where the folder can't be locked, the block is run without.
    """
    handle = _open(folder)
    try:
        if handle is not None:
            try_lock(handle, _PATIENCE_S)
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _open(path: Path) -> int | None:
    """A handle of a file or folder, to lock it; None where it is a link, gone, or can't be read."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None


def try_lock(handle: int, patience_s: float = 0.0) -> bool | None:
    """Whether an open file or folder is locked now: False where another holds it, None where it can't be locked.

    The lock is the open file's: it is held until the last process that inherited the handle has closed it or ended.

    Args:
        handle: The open file's.
        patience_s: How long to wait for another to give it up.
    """
    end = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.005)
        except OSError:
            return None
        else:
            return True


def _umask() -> int:
    """The process's umask, read without changing it for other threads."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration, ValueError):
        return 0o077


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
