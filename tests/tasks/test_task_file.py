"""A user's own task files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict

from act_export.tasks import Generation, TaskError, load_examples, load_task

ROWS = [{"text": f"text {index}", "mood": ("bad", "good")[index % 2], "id": index} for index in range(30)]
TASK: dict[str, Any] = {
    "template": "{text}\nMood:",
    "labels": [" bad", " good"],
    "answer": "mood",
    "path": "rows.jsonl",
}
OPTIONS: dict[str, Any] = {
    "options": ["right", "wrong"],
    "answer": "answer",
    "formats": {"likelihood": {"template": "{question}"}},
    "path": "rows.jsonl",
}
WRITTEN: dict[str, Any] = {"template": "{question}", "references": "answers", "generation": {}, "path": "rows.jsonl"}


def task_file(folder: Path, document: object) -> str:
    path = folder / "mood.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return str(path)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_the_shortest_task_file(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    read = load_examples(task_file(tmp_path, TASK))
    assert (read.name, len(read.examples)) == ("mood", 30)
    example = read.examples[3]
    assert (example.prompt, example.choices, example.answer) == ("text 3\nMood:", (" bad", " good"), 1)
    assert (example.where, example.content_free) == ("line 4 of rows.jsonl", "N/A\nMood:")


def test_options_and_a_task_that_the_model_writes(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", [{"question": "q", "right": "a", "wrong": "b", "answer": 0, "answers": ["a"]}])
    example = load_examples(task_file(tmp_path, OPTIONS)).examples[0]
    assert (example.prompt, example.choices, example.answer) == ("q", (" a", " b"), 0)
    read = load_examples(task_file(tmp_path, WRITTEN))
    assert read.generation == Generation(50, ("\n",), "f1")
    assert read.examples[0].references == ("a",)


def test_the_documentations_task_file(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "act_export" / "docs" / "tasks.md").read_text(encoding="utf-8")
    (shown,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    rows = [{"body": "Fire!", "meta": {"urgent": True}}, {"body": "Hello", "meta": {"urgent": False}}]
    Dataset.from_list(rows).to_parquet(tmp_path / "tickets.parquet")
    examples = load_examples(task_file(tmp_path, shown)).examples
    assert [example.answer for example in examples] == [1, 0]
    assert examples[0].prompt == "Is the ticket urgent?\n\nTicket: Fire!\nUrgent:"


def save_parquet(path: Path) -> None:
    Dataset.from_list(ROWS).to_parquet(path)


def save_csv(path: Path) -> None:
    Dataset.from_list(ROWS).to_csv(path)


def save_arrow(path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(path.parent / "saved")
    (path.parent / "saved" / "data-00000-of-00001.arrow").rename(path)


def save_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def save_folder(path: Path) -> None:
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(path)


def save_plain_folder(path: Path) -> None:
    path.mkdir()
    jsonl(path / "train.jsonl", ROWS)


@pytest.fixture(autouse=True)
def cache_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("file", "save"),
    [
        ("rows.jsonl", lambda path: jsonl(path, ROWS)),
        ("lines.json", lambda path: jsonl(path, ROWS)),
        ("rows.json", save_array),
        ("rows.parquet", save_parquet),
        ("rows.csv", save_csv),
        ("rows.arrow", save_arrow),
        ("saved_to_disk", save_folder),
        ("folder", save_plain_folder),
    ],
)
def test_rows_come_from_files_and_folders(tmp_path: Path, file: str, save: Any) -> None:
    save(tmp_path / file)
    examples = load_examples(task_file(tmp_path, {**TASK, "path": file})).examples
    assert [example.prompt for example in examples] == [f"text {index}\nMood:" for index in range(30)]
    assert [example.answer for example in examples] == [0, 1] * 15
    assert examples[1].where in (f"row 2 of {file}", f"line 2 of {file}")


def test_fields_are_renamed_and_splits_chosen(tmp_path: Path) -> None:
    rows = [{"a": {"b": row["text"]}, "names": ["x", "y"], "label": "y"} for row in ROWS]
    DatasetDict({"one": Dataset.from_list(rows), "two": Dataset.from_list(rows[:5])}).save_to_disk(tmp_path / "saved")
    source = {
        "file": "saved",
        "split": "one",
        "shots": "two",
        "fields": {"text": "a.b", "mood": "label"},
        "labels": "names",
    }
    path = task_file(tmp_path, {**TASK, "path": source})
    assert [example.answer for example in load_examples(path).examples] == [1] * 30
    del source["split"]
    with pytest.raises(TaskError, match='more than one split; "split" must be one or two'):
        load_examples(task_file(tmp_path, {**TASK, "path": source}))
    with pytest.raises(TaskError, match="no split 'three'"):
        load_examples(task_file(tmp_path, {**TASK, "path": {**source, "split": "three"}}))


def test_shots_have_a_file_of_their_own(tmp_path: Path) -> None:
    jsonl(tmp_path / "rows.jsonl", ROWS)
    jsonl(tmp_path / "train.jsonl", [{"text": "seen before", "mood": 1}])
    path = task_file(tmp_path, {**TASK, "path": {"file": "rows.jsonl", "shots": "train.jsonl"}})
    examples = load_examples(path, shots=1).examples
    assert len(examples) == 30
    assert examples[0].prompt == "seen before\nMood: good\n\ntext 0\nMood:"


def test_rows_come_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: object, **named: object) -> Dataset:
        asked.append((*arguments, *named.values()))
        return Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"dataset": "somebody/moods", "split": "test"}
    task = {key: value for key, value in TASK.items() if key != "path"}
    assert len(load_examples(task_file(tmp_path, {**task, "hub": hub})).examples) == 30
    assert asked == [("somebody/moods", None, "test", None)]


def without(document: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name not in names}


@pytest.mark.parametrize(
    ("document", "wrong"),
    [
        ("{", "JSON"),
        ([], "a list"),
        (without(TASK, "labels"), "it has none of labels, options, references"),
        ({**TASK, "options": "x"}, "it has labels and options of labels, options, references"),
        ({**TASK, "lables": []}, "a task with labels has no 'lables'; it may have answer, derived, description"),
        ({**TASK, "formats": {}}, "a task with labels has no 'formats'"),
        (without(TASK, "answer"), "it lacks 'answer'"),
        (without(TASK, "template"), "it lacks 'template'"),
        ({**TASK, "template": 5}, "template is 5; it must be a text"),
        ({**TASK, "template": "{text.x}"}, "isn't the name of a field"),
        ({**TASK, "template": "{text}:\n"}, "doesn't end with a space"),
        ({**TASK, "labels": [" a"]}, "2 to 1000, all different"),
        ({**TASK, "labels": [" a", " a"]}, "2 to 1000, all different"),
        ({**TASK, "labels": "ab"}, "labels is 'ab'; it must be a list"),
        ({**TASK, "scoring": "letter"}, "scoring is 'letter'; it must be one of likelihood, likelihood-per-token"),
        ({**TASK, "shot": "{prompt}"}, "must have a place for each"),
        ({**TASK, "hub": {}}, '"hub" or "path", one of them'),
        (without(TASK, "path"), '"hub" or "path", one of them'),
        ({**without(TASK, "path"), "hub": {"dataset": "a"}}, "it lacks 'split'"),
        ({**TASK, "path": {"file": "a", "splt": "b"}}, "path has no 'splt'"),
        ({**TASK, "path": {"file": "a", "labels": "b"}}, '"labels" needs "fields"'),
        ({**TASK, "path": {"file": "a", "fields": {"text": "b"}, "labels": "c"}}, "how 'mood' is named"),
        ({**TASK, "path": {"file": "a", "fields": {"text": 1}}}, "it must have the name of a field for each"),
        (
            {**TASK, "path": {"file": "a", "fields": {"text": "b"}, "pattern": {"field": "b", "regex": "("}}},
            "the regex '\\('",
        ),
        ({**TASK, "derived": {"x": {"field": "a", "values": {"b": 1}}}}, "they must be texts"),
        ({**OPTIONS, "formats": {}}, "formats is empty"),
        ({**OPTIONS, "scoring": "first-token"}, "is 'first-token'; it must be one of likelihood, likelihood-per-token"),
        ({**OPTIONS, "formats": {"letters": {}}}, "formats has 'letters'; it may have 'letter' and 'likelihood'"),
        ({**OPTIONS, "formats": {"letter": {"template": "{question}"}}}, "has no place for {options}"),
        ({**OPTIONS, "formats": {"likelihood": {"template": "a", "choice": " x"}}}, "must have a place for {option}"),
        (
            {**OPTIONS, "formats": {"letter": {"template": "{options}:"}, "likelihood": {"template": "a"}}},
            'it lacks "key"',
        ),
        ({**WRITTEN, "generation": {"max_new_tokens": 0}}, "max_new_tokens is 0"),
        ({**WRITTEN, "generation": {"metric": "bleu"}}, "metric is 'bleu'; it must be exact or f1"),
        ({**WRITTEN, "generation": {"stop": "x"}}, "stop is 'x'; it must be a list"),
        (without(WRITTEN, "generation"), "it lacks 'generation'"),
    ],
)
def test_what_is_no_task_is_named(tmp_path: Path, document: object, wrong: str) -> None:
    with pytest.raises(TaskError, match=rf"mood\.json.*{wrong}"):
        load_task(task_file(tmp_path, document))


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        (
            {"text": "a"},
            "line 2 of rows.jsonl, from .*, doesn't fit the task mood: there is no field 'mood'; there is 'text'",
        ),
        ({"mood": 1}, "there is no field 'text', which the template .* uses; there is 'mood'"),
        ({"text": "a", "mood": "odd"}, r"the answer, mood, is 'odd'; it must be one of \[' bad', ' good'\]"),
        ({"text": "a", "mood": 1.0}, "the answer, mood, is 1.0"),
    ],
)
def test_a_row_that_does_not_fit_is_named(tmp_path: Path, row: dict[str, Any], wrong: str) -> None:
    jsonl(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(TaskError, match=wrong):
        load_examples(task_file(tmp_path, TASK))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"can't read the task file .*absent\.json"):
        load_task(str(tmp_path / "absent.json"))
    with pytest.raises(TaskError, match=r"can't read .*rows\.jsonl"):
        load_examples(task_file(tmp_path, TASK))
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(TaskError, match=r"can't read .*bad\.parquet"):
        load_examples(task_file(tmp_path, {**TASK, "path": "bad.parquet"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaskError, match=r"can't read .*empty"):
        load_examples(task_file(tmp_path, {**TASK, "path": "empty"}))
    jsonl(tmp_path / "rows.jsonl", [])
    with pytest.raises(TaskError, match=r"rows\.jsonl has no rows"):
        load_examples(task_file(tmp_path, TASK))
