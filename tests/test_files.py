"""Where files that others name may lie, and how results come to their place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import time

import pytest
from no_file import KINDS, is_untouched, make

from act_export import staging
from act_export.errors import ActExportError
from act_export.files import check_replaceable, copy_content, copy_folder, flush, path_inside, write_whole
from act_export.staging import locked, staging_file, staging_folder, sweep


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


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_not_replaced(tmp_path, kind):
    place = tmp_path / "out.json"
    before = make(place, kind)
    names = sorted(path.name for path in tmp_path.iterdir())
    for attempt in (check_replaceable, lambda path: write_whole(path, "new")):
        with pytest.raises(ActExportError, match=f"is a {kind.split()[-1]}"):
            attempt(place)
    assert is_untouched(place, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


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


@pytest.mark.parametrize("staging", [staging_folder, staging_file])
def test_a_fork_neither_removes_nor_gives_up_what_is_put_together(tmp_path, staging):
    """Not when it leaves the block itself, and not while it lives on where its parent was killed."""
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        with staging(tmp_path, "a"):
            if not os.fork():
                os.read(reader, 1)
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    os.waitpid(parent, 0)
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    os.write(writer, b"x")
    for _ in range(1000):
        sweep(tmp_path)
        if not list(tmp_path.iterdir()):
            break
        time.sleep(0.01)
    assert not list(tmp_path.iterdir())
    with staging(tmp_path, "a") as place:
        child = os.fork()
        if not child:
            try:
                raise SystemExit
            finally:
                os._exit(0) if place.exists() else os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert place.exists()
    os.close(reader)
    os.close(writer)


def cannot(*_):
    raise OSError(errno.EBADF, "Bad file descriptor")


@pytest.mark.parametrize("case", ["another machine's", "can't be locked"])
def test_what_no_lock_tells_of_goes_when_nothing_in_it_was_modified_for_days(tmp_path, monkeypatch, case):
    if case == "can't be locked":
        monkeypatch.setattr(fcntl, "flock", cannot)
    boot = staging._this_boot() if case == "can't be locked" else "another0"
    names = ("modified", "old", "held")
    for name in names:
        folder = tmp_path / f".{name}.act-export-{boot}-x"
        folder.mkdir()
        (folder / "weights").touch()
    sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    before = time.time() - 3 * 24 * 3600
    for path in tmp_path.rglob("*"):
        if path.parent.name != f".modified.act-export-{boot}-x":
            os.utime(path, (before, before))
    holder = os.open(tmp_path / f".held.act-export-{boot}-x", os.O_RDONLY)
    if case != "can't be locked":
        fcntl.flock(holder, fcntl.LOCK_EX)
    sweep(tmp_path)
    os.close(holder)
    left = {"modified", "held"} if case != "can't be locked" else {"modified"}
    assert {path.name.split(".")[1] for path in tmp_path.iterdir()} == left


def test_where_nothing_can_be_locked_results_are_put_together_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", cannot)
    with locked(tmp_path):
        write_whole(tmp_path / "a", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("holder", ["another program", "this process"])
def test_a_lock_that_stays_held_is_gone_without(tmp_path, monkeypatch, holder):
    monkeypatch.setattr(staging, "_PATIENCE_S", 0.05)
    handle = os.open(tmp_path, os.O_RDONLY)
    with contextlib.ExitStack() as held:
        fcntl.flock(handle, fcntl.LOCK_EX) if holder == "another program" else held.enter_context(locked(tmp_path))
        started = time.monotonic()
        with locked(tmp_path):
            assert 0.05 <= time.monotonic() - started < 5
    os.close(handle)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EROFS])
def test_where_a_folder_cannot_be_flushed_it_is_not(tmp_path, monkeypatch, code):
    def refuse(_):
        raise OSError(code, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    flush(tmp_path)
    write_whole(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_that_the_disk_failed_is_said(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write_whole(tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())


def test_long_names_are_cut_by_bytes(tmp_path):
    name = "模" * 83 + ".json"  # of 254 bytes
    write_whole(tmp_path / name, "x")
    assert (tmp_path / name).read_text() == "x"
    assert staging.beginning(name) == "模" * 33


def test_what_others_own_or_only_looks_alike_is_not_swept(tmp_path):
    mine = tmp_path / ".a.act-export-link"
    (tmp_path / "kept").mkdir()
    mine.symlink_to("kept")
    (tmp_path / "act-export-x").mkdir()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".a.act-export-link", "act-export-x", "kept"]


def test_folders_are_copied_without_their_modes(tmp_path):
    source = tmp_path / "source"
    (source / "inner").mkdir(parents=True, mode=0o700)
    (source / "inner" / "a").write_text("a")
    (source / "inner" / "a").chmod(0o4777)
    (source / "link").symlink_to("inner/a")
    (source / "left out").write_text("")
    copy_folder(source, tmp_path / "copy", skip=lambda path: path.name == "left out")
    copied = {path.name: path for path in (tmp_path / "copy").rglob("*")}
    assert set(copied) == {"inner", "a", "link"}
    assert copied["link"].read_text() == "a"
    assert not copied["link"].is_symlink()
    assert stat.S_IMODE(copied["a"].stat().st_mode) & 0o7111 == 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "folder"])
def test_nothing_but_files_is_copied(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    place = source / "a"
    make(tmp_path / "b" if "link" in kind else place, kind)
    if "link" in kind:
        place.symlink_to("../b")
    with pytest.raises(ActExportError, match=r"is a link to|is no file"):
        copy_folder(source, tmp_path / "copy")
