"""Folders and files in which results are put together, beside their final place, to be moved there by a rename.

Each is locked while its owner lives; what a killed process left is removed by the next one that writes there.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STAGING = ".act-export-"  # in the names of folders in which results are put together
_LONGEST_PART = 100  # bytes of a result's name in those names; a file system takes 255 in all
_PATIENCE_S = 10.0  # a lock of ours is held for less
_ABANDONED_S = 2 * 24 * 3600.0


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
        folder.chmod(0o777 & ~umask())  # mkdtemp's own is for secrets
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


def umask() -> int:
    """The process's umask, read without changing it for other threads."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("Umask:")).split()[1], 8)
    except (OSError, StopIteration, ValueError):
        return 0o077
