"""Where an export goes, and that nothing is left behind when it doesn't get there."""

from __future__ import annotations

import errno

import pytest

from act_export.export.write import COMPANIONS, OutputError, check_output, publish, staged


@pytest.mark.parametrize("name", ["a.onnx", "new_folder", "model-v1.0"])
def test_good_outputs(tmp_path, name):
    check_output(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_missing_parent(tmp_path):
    with pytest.raises(OutputError, match="there is no folder"):
        check_output(tmp_path / "none" / "a.onnx")


def test_folder_with_a_files_name(tmp_path):
    (tmp_path / "a.onnx").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path / "a.onnx")


@pytest.mark.parametrize("exists", [True, False])
def test_file_without_the_suffix(tmp_path, exists):
    if exists:
        (tmp_path / "a.bin").touch()
    with pytest.raises(OutputError, match=r"doesn't end in \.onnx"):
        check_output(tmp_path / "a.bin")


def test_unwritable_folder(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(OutputError, match=r"can't write to .*Permission denied"):
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
    with pytest.raises(OutputError, match="the disk is full; no partial output was left"), staged(tmp_path / "a.onnx"):
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
    with pytest.raises(OutputError, match=r"holds other files, e\.g\. notes\.md"):
        check_output(tmp_path)
