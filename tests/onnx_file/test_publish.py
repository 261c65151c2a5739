"""Where an export goes, and that nothing is left behind when it doesn't get there."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from pathlib import Path

import onnx
import pytest
from no_file import KINDS, is_untouched, make

import act_export.staging
from act_export import __version__
from act_export.errors import ActExportError
from act_export.onnx_file.publish import COMPANIONS, check_output, publish, staged
from act_export.onnx_file.record import FileRecord


def written(out, names, **options):
    """Stages and publishes files of these names."""
    with staged(out) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("new")
        return publish(folder, out.parent if out.suffix == ".onnx" else out, **options)


def write_graph(path, version=__version__):
    """A model without nodes, act-export's own where it has a version."""
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.helper.set_model_props(model, FileRecord(version=version).write() if version else {})
    onnx.save(model, path)


@pytest.mark.parametrize("name", ["a.onnx", "new_folder", "model-v1.0"])
def test_good_outputs(tmp_path, name):
    check_output(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.onnx", "folder"])
def test_missing_parents_are_made_with_what_is_written(tmp_path, name):
    out = tmp_path / "none" / "yet" / name
    check_output(out)
    with pytest.raises(ZeroDivisionError), staged(out):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    with staged(out) as folder:
        (folder / "a.onnx").write_text("graph")
        publish(folder, out.parent if name == "a.onnx" else out)
    assert [path.name for path in tmp_path.rglob("a.onnx")] == ["a.onnx"]
    assert not list(tmp_path.rglob(".*"))


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ActExportError, match="file is no folder"):
        check_output(tmp_path / "file" / "in" / "a.onnx")


def test_folder_with_a_files_name(tmp_path):
    (tmp_path / "a.onnx").mkdir()
    with pytest.raises(ActExportError, match="is a folder"):
        check_output(tmp_path / "a.onnx")


@pytest.mark.parametrize("exists", [True, False])
def test_file_without_the_suffix(tmp_path, exists):
    if exists:
        (tmp_path / "a.bin").touch()
    with pytest.raises(ActExportError, match=r"doesn't end in \.onnx"):
        check_output(tmp_path / "a.bin")


def test_unwritable_folder(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(ActExportError, match=r"can't write to .*Permission denied"):
        check_output(tmp_path / "a.onnx")


def test_publish_moves_everything(tmp_path):
    with staged(tmp_path / "a.onnx") as folder:
        (folder / "a.onnx").write_text("graph")
        (folder / "a.onnx.data").write_text("weights")
        files = publish(folder, tmp_path)
    assert [file.name for file in files] == ["a.onnx.data", "a.onnx"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_nothing_stays_after_an_interruption(tmp_path, error):
    (tmp_path / "a.onnx").write_text("an older export")

    def export():
        with staged(tmp_path / "a.onnx") as folder:
            (folder / "a.onnx").write_text("half")
            raise error

    with pytest.raises(error):
        export()
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]
    assert (tmp_path / "a.onnx").read_text() == "an older export"


def test_a_disk_that_runs_full_is_an_error_of_ours(tmp_path):
    with (
        pytest.raises(ActExportError, match="the disk is full; no partial output was left"),
        staged(tmp_path / "a.onnx"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_an_older_exports_companions_go(tmp_path):
    out = tmp_path / "out"
    for written in (
        ["model.onnx", "model.onnx.data", "calibration.json", "tokenizer.json"],
        ["model.onnx", "config.json"],
    ):
        with staged(out) as folder:
            for name in [*written, "model.onnx.data"]:
                (folder / name).write_text(name)
            publish(folder, out, stale=COMPANIONS)
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.onnx", "model.onnx.data"]


def test_a_single_file_leaves_its_neighbours_alone(tmp_path):
    (tmp_path / "calibration.json").write_text("mine")
    with staged(tmp_path / "a.onnx") as folder:
        (folder / "a.onnx").write_text("graph")
        (folder / "a.onnx.data").write_text("weights")
        publish(folder, tmp_path)
    assert (tmp_path / "calibration.json").read_text() == "mine"


def test_an_existing_folder_is_written_in_itself(tmp_path):
    """So that a mounted folder works, whose parent can't be written to."""
    out = tmp_path / "out"
    out.mkdir()
    with staged(out) as folder:
        assert folder.parent == out
        (folder / "model.onnx").write_text("graph")
        publish(folder, out)
    assert [path.name for path in out.iterdir()] == ["model.onnx"]


def test_a_folder_with_other_files(tmp_path):
    (tmp_path / "notes.md").touch()
    with pytest.raises(ActExportError, match=r"holds other files, e\.g\. notes\.md"):
        check_output(tmp_path)


def test_a_folder_with_an_export_is_one_for_another(tmp_path):
    write_graph(tmp_path / "model.onnx")
    (tmp_path / "config.json").touch()
    check_output(tmp_path)


@pytest.mark.parametrize("content", ["another program's", "no model"])
def test_a_folder_with_another_programs_model(tmp_path, content):
    write_graph(tmp_path / "model.onnx", version="")
    if content == "no model":
        (tmp_path / "model.onnx").write_text("an essay")
    (tmp_path / "config.json").touch()
    with pytest.raises(ActExportError, match=r"holds a model\.onnx that act-export didn't write"):
        check_output(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["a.onnx", "a.onnx.data", "folder"])
def test_what_is_no_file_is_not_replaced(tmp_path, kind, name):
    out = tmp_path / name.removesuffix(".data")
    before = make(tmp_path / name, kind)
    if (kind, name) == ("folder", "folder"):
        check_output(out)
        return
    with pytest.raises(ActExportError, match=f"is a {kind.split()[-1]}"):
        check_output(out)
    if name == "folder":
        return
    with pytest.raises(ActExportError, match=f"is a {kind.split()[-1]}"):
        written(out, [name])
    assert is_untouched(tmp_path / name, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_in_an_output_folder_is_neither_followed_nor_replaced(tmp_path, kind):
    out = tmp_path / "out"
    out.mkdir()
    write_graph(out / "model.onnx")
    graph = (out / "model.onnx").read_bytes()
    before = make(out / "tokenizer.json", kind)
    for names in (["model.onnx", "tokenizer.json"], ["model.onnx"]):
        with pytest.raises(ActExportError, match=f"is a {kind.split()[-1]}"):
            written(out, names, stale=COMPANIONS)
    with pytest.raises(ActExportError, match=f"is a {kind.split()[-1]}"):
        check_output(out)
    assert is_untouched(out / "tokenizer.json", before)
    assert (out / "model.onnx").read_bytes() == graph


def test_a_link_to_a_folder_is_that_folder(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    check_output(tmp_path / "out")
    written(tmp_path / "out", ["model.onnx"])
    assert (tmp_path / "out").is_symlink()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["model.onnx"]


def test_a_folder_within_an_output_that_leads_out_is_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "weights").symlink_to("../elsewhere")
    with pytest.raises(ActExportError, match="is a link to"):
        written(tmp_path / "out", ["weights/all.bin"])
    assert not list((tmp_path / "elsewhere").iterdir())


def test_an_output_that_was_being_published_when_its_process_was_killed_is_taken_again(tmp_path):
    """The old graph is gone then, and the new one isn't there."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(ActExportError, match="holds other files"):
        check_output(out)
    child = os.fork()
    if not child:
        with staged(out):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    check_output(out)
    written(out, ["model.onnx"])
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.onnx"]


MOVES = 6  # of what `over_an_older_output` does


def over_an_older_output(out):
    written(out, ["model.onnx", "model.onnx.data", "config.json"], stale=COMPANIONS)


@pytest.fixture
def older(tmp_path):
    """An output, its files with their contents."""
    contents = dict.fromkeys(("model.onnx", "model.onnx.data", "tokenizer.json"), "older")
    (tmp_path / "out").mkdir()
    for name, text in contents.items():
        (tmp_path / "out" / name).write_text(text)
    return contents


def read(out):
    return {path.name: path.read_text() for path in out.iterdir() if path.is_file()}


def nth_rename(monkeypatch, number, instead):
    rename, count = Path.rename, []

    def counted(path, target):
        count.append(path)
        return instead(path, target) if len(count) == number else rename(path, target)

    monkeypatch.setattr(Path, "rename", counted)
    return count


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("number", range(1, MOVES + 1))
def test_an_older_output_is_put_back_where_one_of_the_moves_fails(tmp_path, monkeypatch, older, number, error):
    def refuse(*_):
        raise error(errno.EIO, "Input/output error")

    nth_rename(monkeypatch, number, refuse)
    with pytest.raises(ActExportError if error is OSError else error, match="Input/output error"):
        over_an_older_output(tmp_path / "out")
    assert read(tmp_path / "out") == older
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_that_an_older_output_could_not_be_put_back_is_said(tmp_path, monkeypatch, older):
    def refuse(*_):
        monkeypatch.setattr(Path, "rename", refuse)
        raise OSError(errno.EIO, "Input/output error")

    nth_rename(monkeypatch, 3, refuse)
    with pytest.raises(ActExportError, match="what was there before can't be put back"):
        over_an_older_output(tmp_path / "out")
    assert "model.onnx" not in read(tmp_path / "out")


def test_a_kill_at_any_move_leaves_the_older_output_the_new_one_or_no_graph(tmp_path, monkeypatch, older):
    seen = []

    def look():
        found = read(tmp_path / "out")
        seen.append(found.get("model.onnx"))
        if found.get("model.onnx") is not None:
            assert set(found.values()) == {found["model.onnx"]}
            assert found == older or set(found) == {"model.onnx", "model.onnx.data", "config.json"}

    rename = Path.rename

    def watched(path, target):
        look()
        rename(path, target)
        look()

    monkeypatch.setattr(Path, "rename", watched)
    over_an_older_output(tmp_path / "out")
    assert len(seen) == 2 * MOVES
    assert (seen[0], seen[-1]) == ("older", "new")


@pytest.mark.parametrize("case", ["held", "can't be locked"])
def test_a_folder_that_cannot_be_locked_is_written_to(tmp_path, monkeypatch, older, case):
    def refuse(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(act_export.staging, "_PATIENCE_S", 0.05)
    handle = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX) if case == "held" else monkeypatch.setattr(fcntl, "flock", refuse)
    over_an_older_output(tmp_path / "out")
    os.close(handle)
    assert set(read(tmp_path / "out").values()) == {"new"}


def test_all_of_a_new_folder_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr("act_export.onnx_file.publish.flush", lambda path: flushed.append(path.name))
    written(tmp_path / "out", ["model.onnx", "1/weights"])
    assert {"model.onnx", "1", "weights"} < set(flushed)
    assert flushed[-1] == tmp_path.name


@pytest.mark.parametrize("name", ["a.onnx", "folder"])
def test_of_exports_at_the_same_time_the_last_one_wins_with_all_of_its_files(tmp_path, name):
    out = tmp_path / name
    graph = "a.onnx" if name == "a.onnx" else "model.onnx"
    children = []
    for number in range(4):
        child = os.fork()
        if not child:
            for turn in range(15):
                with staged(out) as folder:
                    for file in (graph, f"{graph}.data"):
                        (folder / file).write_text(f"{number} {turn}")
                    publish(folder, tmp_path if name == "a.onnx" else out, stale=COMPANIONS if name == "folder" else ())
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    folder = tmp_path if name == "a.onnx" else out
    assert sorted(path.name for path in folder.iterdir()) == [graph, f"{graph}.data"]
    assert (folder / graph).read_text() == (folder / f"{graph}.data").read_text()
