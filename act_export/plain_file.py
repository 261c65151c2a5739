"""Opening a file that somebody else put there: a plain one, since a pipe in its place would be waited for forever."""

from __future__ import annotations

import errno
import io
import os
import stat
from pathlib import Path


def open_plain(path: Path) -> io.BufferedReader:
    """Opens a file to read its bytes.

    Raises:
        OSError: If it can't be opened, or is a folder, a pipe, a socket or a device.
        ValueError: If the name has a zero in it.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device and no plain file", str(path))
    except OSError:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")
