"""The search command's job: questions by name, the journal's place, and the files that come out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from planted import PLANTED, save_planted

from act_export.calibration.file import Calibration, ModelIdentity, Provenance
from act_export.checkpoint.load import Checkpoint, load_checkpoint
from act_export.commands.search_table import print_search_result
from act_export.errors import ActExportError
from act_export.files import cache_folder
from act_export.search import SearchOptions, SearchResult
from act_export.search.job import SearchJob, check_output, published_sets, run_search, save_result
from act_export.search.results import Gain
from act_export.tasks import Questions, TaskError

OPTIONS = SearchOptions(methods=("act",), ranking="gradient+confirm", betas=(0.0,), head_counts=(1, 2))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_planted(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def checkpoint(planted: tuple[Path, Path]) -> Checkpoint:
    return load_checkpoint(str(planted[0]))


@pytest.fixture
def rows(planted: tuple[Path, Path]) -> Path:
    return planted[1]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    return cache_folder()


def job(*data: Path) -> SearchJob:
    return SearchJob(Questions(data=data), rank=40, choose=50, report=40, options=OPTIONS)


def copies(rows: Path, folder: Path, *names: str) -> list[Path]:
    """The rows under other names; in each file after the first one answer is another, so that they differ."""
    paths = []
    for number, name in enumerate(names):
        lines = [json.loads(line) for line in rows.read_text().splitlines()]
        if number:
            lines[number]["answer"] = 1 - lines[number]["answer"]
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        paths.append(path)
    return paths


def task_file(folder: Path, name: str, rows: Path) -> Path:
    """A task whose rows are those of a file, with the answer's index as its label."""
    fields = folder / f"{name}-rows.jsonl"
    fields.write_text(
        "".join(
            json.dumps({"text": row["prompt"], "label": row["answer"]}) + "\n"
            for row in map(json.loads, rows.read_text().splitlines())
        )
    )
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps({"name": name, "path": fields.name, "template": "{text}", "labels": ["x", "y"], "answer": "label"})
    )
    return path


def test_splits_are_of_the_sizes_asked_for(rows: Path) -> None:
    (task,) = job(rows).load()
    assert task.name == "rows.jsonl"
    assert [len(part) for part in (task.splits.rank, task.splits.choose, task.splits.report)] == [40, 50, 40]
    other = replace(job(rows), questions=Questions(data=(rows,), seed=1)).load()[0]
    assert other.splits.rank != task.splits.rank
    assert job(rows).load()[0].splits == task.splits


@pytest.mark.parametrize(
    ("sizes", "asked", "message"),
    [
        ({"rank": 0}, {}, "the rank split has 0 examples; it needs at least 1"),
        ({"report": -3}, {}, "the report split has -3 examples"),
        ({"report": 41}, {}, "there are 130 different prompts; .* make 131"),
        ({}, {"tasks": ("sst22",)}, "there is no task 'sst22'; did you mean sst2 or"),
        ({}, {"tasks": ("missing.json",)}, r"can't read the task file missing\.json"),
        ({}, {"data": (Path("missing.jsonl"),)}, r"missing\.jsonl"),
        ({}, {"shots": -1}, "number of few-shot examples is -1"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    rows: Path, sizes: dict[str, int], asked: dict[str, object], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        replace(job(rows), questions=replace(job(rows).questions, **asked), **sizes).load()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a.jsonl", "a.txt"), r"a\.jsonl and a\.txt would both be written to a\.json; rename"),
        (("b.jsonl", "joint.jsonl"), r"the joint set and joint\.jsonl would both be written to joint\.json"),
        (("b.jsonl", "search.jsonl"), r"the report and search\.jsonl would both be written to search\.json"),
    ],
)
def test_results_that_would_overwrite_each_other_are_refused_before_the_search(
    rows: Path, tmp_path: Path, names: Sequence[str], message: str
) -> None:
    with pytest.raises(ActExportError, match=message):
        job(*copies(rows, tmp_path, *names)).load()
    assert job(copies(rows, tmp_path, "search.jsonl")[0]).load()  # alone it may be called anything


def test_the_same_file_twice_counts_once(rows: Path) -> None:
    assert job(rows, rows) == job(rows)
    assert len(job(rows, rows).load()) == 1


def test_one_task_gives_one_file(checkpoint: Checkpoint, rows: Path, tmp_path: Path) -> None:
    result = run_search(checkpoint, job(rows))
    out = tmp_path / "new" / "found.json"
    assert save_result(result, out) == [out]
    found = Calibration.load(out)
    assert found.heads == PLANTED.heads
    assert found.to_json() == result.calibrations["rows.jsonl"].to_json() == out.read_text()
    found.check_fits(checkpoint.identity)
    assert [path.name for path in out.parent.iterdir()] == ["found.json"]


def test_several_tasks_give_a_file_each_the_joint_set_and_a_report(
    checkpoint: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    data = copies(rows, tmp_path, "one.jsonl", "two.jsonl")
    out = tmp_path / "out"
    result = run_search(checkpoint, job(*data))
    files = save_result(result, out)
    assert files == [out / name for name in ("one.json", "two.json", "joint.json", "search.json")]
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in files)
    for path, tasks in zip(files, (["one.jsonl"], ["two.jsonl"], ["one.jsonl", "two.jsonl"]), strict=False):
        found = Calibration.load(path)
        assert found.heads == PLANTED.heads
        assert list(found.provenance.tasks) == tasks
    report = json.loads(files[-1].read_text())
    assert report["heads"] == {"one.jsonl": 1, "two.jsonl": 1}
    assert report["joint_heads"] == 1
    one, plain = report["tasks"]["one.jsonl"], result.reports["one.jsonl"].plain_accuracy
    assert one["own"]["gain"] == pytest.approx(1 - plain, abs=1e-4)
    assert one["sizes"] == {"rank": 40, "choose": 50, "report": 40}
    assert set(one["choose_accuracy"]) >= {"plain", "act: 1 head"}
    assert report["average"]["interval"][0] <= report["average"]["gain"] <= report["average"]["interval"][1]
    assert report["joint_average"]["accuracy"] == result.joint_average.accuracy

    alone = run_search(checkpoint, replace(job(*data), joint=False))
    assert [path.name for path in save_result(alone, tmp_path / "alone")] == ["one.json", "two.json", "search.json"]
    assert json.loads((tmp_path / "alone" / "search.json").read_text())["joint_heads"] is None


def test_a_task_file(checkpoint: Checkpoint, rows: Path, tmp_path: Path) -> None:
    """Tasks and data together; a task's file is named after the task."""
    path = task_file(tmp_path, "mine", rows)
    searched = SearchJob(Questions((str(path),), (rows,)), 40, 50, 40, OPTIONS)
    result = run_search(checkpoint, searched)
    assert list(result.calibrations) == ["mine", "rows.jsonl"]
    names = [path.name for path in save_result(result, tmp_path / "out")]
    assert names == ["mine.json", "rows.json", "joint.json", "search.json"]


def test_finished_work_is_in_the_cache_folder_or_where_it_is_asked_for(
    checkpoint: Checkpoint, rows: Path, tmp_path: Path, cache: Path
) -> None:
    first = run_search(checkpoint, job(rows))
    assert first.units[0] == first.units[1] > 0
    (folder,) = (cache / "searches").iterdir()
    assert {path.name for path in folder.iterdir()} == {"journal.json", "units-0.jsonl"}
    again = run_search(checkpoint, job(rows))
    assert again == first
    assert again.units[0] == 0
    elsewhere = run_search(checkpoint, replace(job(rows), journal=tmp_path / "journal"))
    assert elsewhere == first
    assert elsewhere.units[0] > 0
    assert (tmp_path / "journal" / "units-0.jsonl").is_file()


def test_published_sets_of_the_model_are_measured(
    checkpoint: Checkpoint, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Those that were published for it, not those that a search found."""
    source = {"paper": "a paper"}
    named = ModelIdentity("llama", 2, 4, name="owner/model")
    for name, model, method in (
        ("theirs", named, "published"),
        ("another's", replace(named, name="owner/other"), "published"),
        ("ours", checkpoint.identity, "gradient"),
    ):
        provenance = Provenance(method, ("rte",), source=source if method == "published" else {})
        Calibration({0: (2,)}, model=model, provenance=provenance).save(tmp_path / f"{name}.json")
    monkeypatch.setattr("act_export.calibration.recipes.recipes_folder", lambda: tmp_path)
    renamed = replace(checkpoint, names=("owner/model",))
    assert list(published_sets(renamed)) == ["theirs"]
    assert published_sets(checkpoint) == {}
    result = run_search(renamed, job(rows))
    (accuracy,) = result.reports["rows.jsonl"].published.values()
    assert 0 < accuracy < 1
    assert result.calibrations["rows.jsonl"].provenance.notes["controls"]["published"] == {"theirs": accuracy}
    print_search_result(result)
    assert f"rows.jsonl: {accuracy:.1%} with the published heads theirs" in capsys.readouterr().out


def places(folder: Path) -> None:
    (folder / "a folder").mkdir()
    (folder / "a file").write_text("text")


@pytest.mark.parametrize(
    ("out", "several", "message"),
    [
        ("a folder", False, r"a folder is a folder; pass a file, e\.g\. --out .*a folder/calibration\.json"),
        ("c.json", True, r"c\.json is one file, but a search on several .* --out recipes"),
        ("a file", True, "a file is one file, but"),
        ("a file/c.json", False, "a file is no folder; pass another place"),
        ("a file/new", True, "a file is no folder"),
        ("/proc/c.json", False, "can't write to /proc"),
        ("/proc/new/c.json", False, "can't write to /proc"),
    ],
)
def test_places_that_cannot_be_written_are_refused(tmp_path: Path, out: str, several: bool, message: str) -> None:
    places(tmp_path)
    tasks = ("sst2", "rte") if several else ("sst2",)
    with pytest.raises(ActExportError, match=message):
        check_output(tmp_path / out, SearchJob(Questions(tasks)))


@pytest.mark.parametrize(
    ("out", "several"),
    [("c.json", False), ("a file", False), ("new/deep/c.json", False), ("a folder", True), ("new", True)],
)
def test_places_that_can_be_written(tmp_path: Path, out: str, several: bool) -> None:
    places(tmp_path)
    before = sorted(tmp_path.iterdir())
    check_output(tmp_path / out, SearchJob(Questions(("sst2", "rte") if several else ("sst2",))))
    assert sorted(tmp_path.iterdir()) == before


def test_a_result_that_cannot_be_written_says_that_the_search_is_kept(
    checkpoint: Checkpoint, rows: Path, tmp_path: Path
) -> None:
    result = run_search(checkpoint, job(rows))
    places(tmp_path)
    with pytest.raises(
        ActExportError, match=r"can't write .*a file/c\.json: .* the search is kept and won't be done again"
    ):
        save_result(result, tmp_path / "a file" / "c.json")


def shown(result: SearchResult, capsys: pytest.CaptureFixture) -> tuple[list[list[str]], str]:
    """Cells of the printed table's rows, both lines of a cell joined; and the lines below the table."""
    print_search_result(result)
    out = capsys.readouterr().out
    rows: list[list[str]] = []
    for line in out.splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            if cells[0]:
                rows.append(cells)
            else:
                rows[-1] = [f"{first} {more}".strip() for first, more in zip(rows[-1], cells, strict=True)]
    return rows, out.rpartition("┘")[2]


def of(gain: Gain) -> str:
    low, high = gain.interval
    return f"{100 * gain.gain:+.1f} {100 * low:+.1f} to {100 * high:+.1f}"


def test_the_table_has_the_figures(
    checkpoint: Checkpoint, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    result = run_search(checkpoint, job(*copies(rows, tmp_path, "one.jsonl", "two.jsonl")))
    (one, two, average, with_one), lines = shown(result, capsys)
    for name, row in (("one.jsonl", one), ("two.jsonl", two)):
        report = result.reports[name]
        accuracies = [report.plain_accuracy, report.controls[report.control], report.own.accuracy]
        assert row == [name, *(f"{accuracy:.1%}" for accuracy in accuracies), of(report.beyond), of(report.own)]
        assert f"{name}: with as many random heads {report.random_heads[0]:.1%}\n" in lines
        assert f"{name}: AUROC {report.measures[0].auroc:.3f} -> {report.measures[1].auroc:.3f}\n" in lines
    assert average[0] == "average"
    assert average[3:] == [f"{result.average.accuracy:.1%}", of(result.average_beyond), of(result.average)]
    joint = f"{result.joint_average.accuracy:.1%}"
    assert with_one[3:] == [joint, of(result.joint_beyond), of(result.joint_average)]


def test_the_table_says_where_there_is_no_set(
    checkpoint: Checkpoint, rows: Path, capsys: pytest.CaptureFixture
) -> None:
    result = run_search(checkpoint, job(rows))
    report = replace(result.reports["rows.jsonl"], own=None, beyond=None, random_heads=())
    without = replace(
        result,
        reports={"rows.jsonl": report},
        calibrations={"rows.jsonl": Calibration({}, model=checkpoint.identity)},
    )
    (row,), _ = shown(without, capsys)
    plain, control = f"{report.plain_accuracy:.1%}", f"{report.controls[report.control]:.1%}"
    assert row == ["rows.jsonl", plain, control, plain, "no set", "no set"]
