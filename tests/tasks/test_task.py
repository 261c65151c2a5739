"""Tasks by name, and where their rows come from."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import platformdirs
import pytest
from datasets import Dataset

from act_export.tasks import Questions, TaskError, load_examples, load_task, rows_path, task_names

SST2 = [{"sentence": "good", "label": 1}, {"sentence": "so-so é", "label": 0}]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *_: str(tmp_path / "cache"))
    return tmp_path / "cache"


class Hub:
    """Stands in for `datasets.load_dataset`; records what was asked for."""

    def __init__(self, **splits: list[dict[str, Any]]) -> None:
        self.splits = splits
        self.asked: list[tuple[Any, ...]] = []

    def __call__(self, dataset: str, config: str | None, *, split: str, revision: str | None) -> Dataset:
        self.asked.append((dataset, config, split, revision))
        if split not in self.splits:
            raise ConnectionError("no network")
        return Dataset.from_list(self.splits[split])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    standing_in = Hub()
    monkeypatch.setattr(datasets, "load_dataset", standing_in)
    return standing_in


def keep(name: str, *lines: str) -> None:
    rows_path(name).parent.mkdir(parents=True, exist_ok=True)
    rows_path(name).write_text("\n".join(lines), encoding="utf-8")


def test_an_unknown_task_names_those_that_come_near() -> None:
    with pytest.raises(TaskError, match=r"no task 'sst-2'; did you mean sst2.*\? For data of your own"):
        load_task("sst-2")
    with pytest.raises(TaskError, match=r"did you mean .*sst2"):
        load_task("zzzzzz")
    with pytest.raises(TaskError, match="there is no task"):
        load_examples("../sst2")


def test_rows_come_from_the_cache(cache: Path, hub: Hub) -> None:
    assert rows_path("sst2").is_relative_to(cache)
    keep("sst2", *map(json.dumps, SST2))
    read = load_examples("sst2")
    assert [example.answer for example in read.examples] == [1, 0]
    assert [example.where for example in read.examples] == ["row 1 of sst2", "row 2 of sst2"]
    assert "Sentence: good" in read.examples[0].prompt
    assert (read.name, read.length_normalized, read.generation) == ("sst2", False, None)
    assert hub.asked == []


def test_rows_come_from_the_hub_once(cache: Path, hub: Hub) -> None:
    hub.splits = {"validation": [{**row, "idx": 7} for row in SST2], "train": [{"sentence": "bad", "label": 0}] * 2}
    first, second = load_examples("sst2"), load_examples("sst2")
    assert hub.asked == [("nyu-mll/glue", "sst2", "validation", None), ("nyu-mll/glue", "sst2", "train", None)]
    assert first == second
    assert first.examples == tuple(load_task("sst2").question(row).example for row in SST2)
    few = load_examples("sst2", shots=1)
    assert all("Sentence: bad  \nSentiment: negative\n\nSentence: " in example.prompt for example in few.examples)
    assert len(hub.asked) == 2


def test_answers_of_the_hub_that_are_names_become_indices(cache: Path, hub: Hub) -> None:
    row = {"question": "a?", "choices": {"text": ["b", "c"], "label": ["1", "2"]}, "answerKey": "2"}
    hub.splits = {"validation+test": [row], "train": [row]}
    (example,) = load_examples("arc_easy").examples
    assert example.answer == 1
    hub.splits["validation+test"][0]["answerKey"] = "E"
    rows_path("arc_easy").unlink()
    with pytest.raises(TaskError, match=r"row 1 of arc_easy: answerKey is 'E', which is none of \['1', '2'\]"):
        load_examples("arc_easy")


def test_a_large_training_split_is_sampled(cache: Path, hub: Hub) -> None:
    train = [{"sentence": f"sentence {index}", "label": int(index > 900)} for index in range(1800)]
    hub.splits = {"validation": SST2, "train": train}
    load_examples("sst2")
    kept = [json.loads(line) for line in rows_path("sst2.shots").read_text().splitlines()]
    assert len(kept) == 512
    assert 200 < sum(row["label"] for row in kept) < 312


def test_a_cache_that_cannot_be_written_is_named_with_the_reason(cache: Path, hub: Hub) -> None:
    hub.splits = {"validation": SST2, "train": SST2}
    cache.touch()  # a file where the folder should be
    with pytest.raises(TaskError, match=r"can't write .*cache/tasks/sst2\..*jsonl: .*Not a directory.*XDG_CACHE_HOME"):
        load_examples("sst2")


def test_two_fetches_at_once_do_not_meet(cache: Path, hub: Hub) -> None:
    hub.splits = {"validation": SST2 * 500, "train": SST2}
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(load_examples, ["sst2"] * 16))
    assert all(result == results[0] for result in results)
    assert sorted(path.name for path in rows_path("sst2").parent.iterdir()) == ["sst2.jsonl", "sst2.shots.jsonl"]


def test_without_cache_and_hub_the_error_says_what_to_run(cache: Path, hub: Hub) -> None:
    with pytest.raises(
        TaskError,
        match=r"rows of sst2 are not at .*ConnectionError: no network.* run act-export fetch-data sst2.*--data FILE",
    ):
        load_examples("sst2")
    with pytest.raises(TaskError, match=r"rows of trec are not at .* it has those of arc_challenge, .*sst2; or use"):
        load_examples("trec")
    assert not rows_path("sst2").exists()


def test_without_the_datasets_library_the_error_says_what_to_install(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        TaskError, match=r"pip install 'act-export\[tasks\]'.* Without the hub run act-export fetch-data sst2"
    ):
        load_examples("sst2")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ('{"label": 1}', r"row 1 of sst2, from .*sst2\.jsonl, .* no field 'sentence', .* there is 'label'"),
        ('{"sentence": "a"}', "row 1 of sst2, .*no field 'label'; there is 'sentence'"),
        ('{"sentence": "a", "label": null}', "the answer, label, is None; it must be one of .* its index from 0 to 1"),
        ('{"sentence": "a", "label": -1}', "the answer, label, is -1"),
        ('{"sentence": "a", "label": 2}', "the answer, label, is 2"),
        ("", "has no rows; delete it to fetch it anew"),
    ],
)
def test_damaged_rows_are_named(cache: Path, text: str, wrong: str) -> None:
    keep("sst2", text)
    with pytest.raises(TaskError, match=wrong):
        load_examples("sst2")


@pytest.mark.parametrize("value", [1, True, "1", "B", "positive", " positive "])
def test_an_answer_may_be_index_text_or_letter(value: object) -> None:
    assert load_task("sst2").question({"sentence": "a", "label": value}).example.answer == 1


def test_spaces_around_a_text_do_not_make_another_example() -> None:
    task = load_task("sst2")
    assert task.question({"sentence": "good . ", "label": 1}) == task.question({"sentence": "good .", "label": 1})


def test_options_that_read_the_same_are_one_choice() -> None:
    task = load_task("csqa")
    row = {"question": "a?", "options": ["b", "c", "b", "d"], "answer": 3}
    example = task.question(row, scoring="likelihood").example
    assert (example.choices, example.answer) == ((" b", " c", " d"), 2)
    assert task.question({**row, "answer": 2}, scoring="likelihood").example.answer == 0
    assert task.question(row).example.choices == (" A", " B", " C", " D")


@pytest.mark.parametrize("options", [["one"], ["one", " "], ["x"] * 27, "one", [1, 2]])
def test_options_that_cannot_be_chosen_from_are_refused(options: object) -> None:
    with pytest.raises(ValueError, match="options"):
        load_task("csqa").question({"question": "a?", "options": options, "answer": 0})


def test_how_a_task_is_scored_can_be_chosen(cache: Path) -> None:
    keep("csqa", json.dumps({"question": "a?", "options": ["b", "c"], "answer": 1}))
    letters, options, mean = (
        load_examples("csqa", scoring=scoring) for scoring in (None, "likelihood", "likelihood-per-token")
    )
    assert letters.examples[0].choices == (" A", " B")
    assert options.examples == mean.examples
    assert (letters.length_normalized, options.length_normalized, mean.length_normalized) == (False, False, True)
    with pytest.raises(TaskError, match="csqa can't be scored by 'generation'; it can by letter or likelihood or"):
        load_examples("csqa", scoring="generation")
    with pytest.raises(
        TaskError, match="sst2 can't be scored by 'letter'; it can by likelihood or likelihood-per-token"
    ):
        load_examples("sst2", scoring="letter")


def test_by_the_first_token_options_are_letters_and_labels_themselves(cache: Path) -> None:
    keep("csqa", json.dumps({"question": "a?", "options": ["b", "c"], "answer": 1}))
    keep("sst2", *map(json.dumps, SST2))
    for name, own in (("csqa", "letter"), ("sst2", "likelihood")):
        first, whole = (load_examples(name, scoring=scoring).examples for scoring in ("first-token", own))
        assert all(example.first_token for example in first)
        assert tuple(replace(example, first_token=False) for example in first) == whole
    with pytest.raises(TaskError, match="squad can't be scored by 'first-token'; it can by generation"):
        load_examples("squad", scoring="first-token")


def test_data_is_scored_by_the_first_token(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"prompt": "a", "choices": [" b", " c"], "answer": 0}) + "\n")
    ((first,), (whole,)) = (Questions(data=(path,), scoring=way).load()[0].examples for way in ("first-token", None))
    assert (first.first_token, whole.first_token) == (True, False)
    assert first.choices == whole.choices
    with pytest.raises(TaskError, match="scored as 'letter'; pass likelihood or likelihood-per-token or first-token"):
        Questions(data=(path,), scoring="letter").load()


def test_a_number_of_shots_below_zero_is_refused() -> None:
    with pytest.raises(TaskError, match="the number of few-shot examples is -1"):
        Questions(shots=-1)


def test_every_name_loads() -> None:
    assert [load_task(name).name for name in task_names()] == task_names()
