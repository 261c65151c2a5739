"""Places for results where something other than a file is."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

KINDS = ["link", "dangling link", "device", "pipe", "socket", "folder"]


def make(place: Path, kind: str) -> os.stat_result:
    """Makes it, and says what it is."""
    if kind == "link":
        (place.parent / "real").write_text("kept")
        place.symlink_to("real")
    elif kind == "dangling link":
        place.symlink_to("nowhere")
    elif kind == "device":
        try:
            os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root may make a device file")
    elif kind == "pipe":
        os.mkfifo(place)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(place.parent)  # the address of a socket is short
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(place.name)
        finally:
            os.chdir(here)
    else:
        place.mkdir()
    return place.lstat()


def is_untouched(place: Path, before: os.stat_result) -> bool:
    """Whether it is what `make` made."""
    after = place.lstat()
    real = place.parent / "real"
    return (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode) and (
        not real.exists() or real.read_text() == "kept"
    )
