from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import huggingface_hub
import platformdirs
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from act_export.tasks import TaskError, load_examples, load_task, rows_path, task_names


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_: str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("name", task_names())
def test_every_shipped_task_is_complete(name: str) -> None:
    task = load_task(name)
    assert task.name == name
    assert task.description
    row = dict.fromkeys(task.hub.fields.values(), "1")
    example = task.example(row)
    assert len(set(example.choices)) == len(task.choices) >= 2
    assert all(choice.startswith(" ") for choice in example.choices)
    assert not example.prompt.endswith(" ")


def test_sst2_asks_what_the_paper_asks() -> None:
    sentence = "a fine {film} . "  # every sentence of GLUE ends with a space
    example = load_task("sst2").example({"sentence": sentence, "label": 1})
    assert example.prompt == (
        "Classify the sentiment of the user's message into one of the following categories:"
        f"'positive' or 'negative'.\n\nSentence: {sentence} \nSentiment:"
    )
    assert example.choices == (" negative", " positive")
    assert example.answer == 1


def test_an_unknown_task_names_those_that_come_near() -> None:
    with pytest.raises(TaskError, match=r"no task 'sst-2'; did you mean sst2\? For data of your own"):
        load_task("sst-2")
    with pytest.raises(TaskError, match=r"did you mean .*sst2"):
        load_task("zzzzzz")
    with pytest.raises(TaskError, match="there is no task"):
        load_examples("../sst2")


def test_rows_come_from_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("asked the hub"))
    assert rows_path("sst2").is_relative_to(cache)
    rows_path("sst2").parent.mkdir(parents=True)
    rows_path("sst2").write_text('{"sentence": "good", "label": 1}\n{"sentence": "bad", "label": 0}\n')
    examples = load_examples("sst2")
    assert [example.answer for example in examples] == [1, 0]
    assert "Sentence: good" in examples[0].prompt


def test_rows_come_from_the_hub_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(repository: str, file: str, *, repo_type: str) -> str:
        calls.append((repository, file, repo_type))
        path = tmp_path / "dev.jsonl"
        path.write_text(json.dumps({"text": "so-so é", "label": 0, "label_text": "negative"}) + "\n", encoding="utf-8")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    first, second = load_examples("sst2"), load_examples("sst2")
    assert calls == [("SetFit/sst2", "dev.jsonl", "dataset")]
    assert first == second == [load_task("sst2").example({"sentence": "so-so é", "label": 0})]


def test_a_cache_that_cannot_be_written_is_named_with_the_reason(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev.jsonl").write_text('{"text": "good", "label": 1}\n')
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "dev.jsonl"))
    cache.touch()  # a file where the folder should be
    with pytest.raises(TaskError, match=r"can't write .*cache/tasks/sst2\.jsonl: .*Not a directory.*XDG_CACHE_HOME"):
        load_examples("sst2")


def test_two_fetches_at_once_do_not_meet(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dev.jsonl").write_text('{"text": "good", "label": 1}\n' * 1000)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "dev.jsonl"))
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(load_examples, ["sst2"] * 16))
    assert all(result == results[0] for result in results)
    assert [path.name for path in rows_path("sst2").parent.iterdir()] == ["sst2.jsonl"]


def test_spaces_around_a_text_do_not_make_another_example() -> None:
    task = load_task("sst2")
    assert task.example({"sentence": "good . ", "label": 1}) == task.example({"sentence": "good .", "label": 1})


def test_without_cache_and_hub_the_error_says_what_to_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(TaskError, match=r"LocalEntryNotFoundError\)\. Run tools/fetch_data"):
        load_examples("sst2")
    assert not rows_path("sst2").exists()


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"label": 1}', "line 1: not a row of sst2: KeyError"),
        ('{"sentence": "a", "label": null}', "line 1: not a row of sst2: TypeError"),
        ("", "has no rows; delete it to fetch it anew"),
    ],
)
def test_damaged_rows_are_named(cache: Path, text: str, wrong: str) -> None:
    rows_path("sst2").parent.mkdir(parents=True)
    rows_path("sst2").write_text(text)
    with pytest.raises(TaskError, match=wrong):
        load_examples("sst2")
