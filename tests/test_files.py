"""Where files that others name may lie, and how results come to their place."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from act_export.errors import ActExportError
from act_export.files import check_replaceable, copy_content, path_inside, staging_folder, sweep, write_whole


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "a/../../x", "\\\\server\\x", "..\\x", "a\0b", "a" * 100_000, None, 1, ["a"]]
)
def test_a_name_that_leads_out_is_refused(tmp_path, name):
    with pytest.raises(ActExportError, match=r"leads out|no name of a file"):
        path_inside(tmp_path, name, "the weights of model.onnx")


@pytest.mark.parametrize("kind", ["file", "folder", "nested"])
def test_a_link_that_leads_out_is_refused(tmp_path, kind):
    folder, outside = tmp_path / "model", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("")
    if kind == "file":
        (folder / "a").symlink_to(outside / "secret")
    elif kind == "folder":
        (folder / "b").symlink_to(outside)
    else:
        (folder / "c").symlink_to(outside / "d")
        (outside / "d").symlink_to(outside / "secret")
    name = {"file": "a", "folder": "b/secret", "nested": "c"}[kind]
    with pytest.raises(ActExportError, match="is a link to"):
        path_inside(folder, name, "the weights")


def test_links_in_a_circle_lead_nowhere(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with contextlib.suppress(ActExportError):  # by the version of Python
        assert not path_inside(tmp_path, "a", "the weights").is_file()


def test_names_and_links_that_stay_inside_are_taken(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "x..y.data").write_text("")
    (tmp_path / "link").symlink_to("weights/x..y.data")
    for name in ("weights/x..y.data", "link", "./link", "not-there-yet"):
        assert path_inside(tmp_path, name, "the weights") == tmp_path / name


def test_links_of_the_hubs_cache_are_taken(tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0" / "onnx"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("")
    (snapshot / "model.onnx.data").symlink_to("../../../blobs/abc")
    assert path_inside(snapshot, "model.onnx.data", "the weights").is_file()
    (snapshot / "out").symlink_to("../../../../secret")
    with pytest.raises(ActExportError, match="is a link to"):
        path_inside(snapshot, "out", "the weights")


@pytest.mark.parametrize("kind", ["link", "dangling link", "device", "pipe", "socket", "folder"])
def test_what_is_no_plain_file_is_not_replaced(tmp_path, kind):
    place = tmp_path / "out.json"
    if kind == "link":
        (tmp_path / "real").write_text("kept")
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
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(place))
    else:
        place.mkdir()
    before = place.lstat()
    for attempt in (check_replaceable, lambda path: write_whole(path, "new")):
        with pytest.raises(ActExportError, match=f"is a {kind.split()[-1]}"):
            attempt(place)
    after = place.lstat()
    assert (before.st_ino, before.st_mode) == (after.st_ino, after.st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        {"out.json"} | ({"real"} if kind == "link" else set())
    )


def test_permissions_are_those_of_new_files(tmp_path):
    source = tmp_path / "source"
    source.write_text("content")
    source.chmod(0o4755)
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "written", "x")
        copy_content(source, tmp_path / "copied")
        with staging_folder(tmp_path, "a") as folder:
            assert stat.S_IMODE(folder.stat().st_mode) == 0o750
    finally:
        os.umask(before)
    for name in ("written", "copied"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from act_export.files import staging_folder\n"
        "with staging_folder(Path(sys.argv[1]), 'model.onnx') as folder:\n"
        "    (folder / 'weights').write_bytes(b'x'); print(folder, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    folder = child.stdout.readline().strip()
    sweep(tmp_path)
    assert os.path.isdir(folder)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with staging_folder(tmp_path, "other"):
        assert not os.path.isdir(folder)
    assert not list(tmp_path.iterdir())
