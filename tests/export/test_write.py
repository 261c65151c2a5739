"""Where an export goes, and that nothing is left behind when it doesn't get there."""

from __future__ import annotations

import errno

import pytest

from act_export.export.write import OutputError, check_output, publish, staged


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
    with pytest.raises(OutputError, match="is full; nothing was written"), staged(tmp_path / "a.onnx"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())
