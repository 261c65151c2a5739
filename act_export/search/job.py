"""The search command's job: questions by name, where finished work is kept, and the files that come out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from act_export.calibration.file import Calibration
from act_export.calibration.recipes import PUBLISHED, find_recipes
from act_export.errors import ActExportError
from act_export.files import cache_folder, check_replaceable, check_writable, write_whole
from act_export.progress import Progress
from act_export.search.request import SearchOptions, SearchTask, check_goal
from act_export.tasks import Questions, TaskExamples, split_examples
from act_export.tasks.splits import check_sizes

if TYPE_CHECKING:
    from act_export.checkpoint.load import Checkpoint
    from act_export.search.results import SearchResult

JOINT_FILE, REPORT_FILE = "joint.json", "search.json"


@dataclass(frozen=True)
class SearchJob:
    """What to search on, and how.

    Attributes:
        questions: What to ask, and how.
        rank: Questions to rank heads with; None for the usual number.
        choose: Questions to choose the number of heads with; None for the usual number.
        report: Questions to report accuracies on; None for the usual number.
        options: How to search.
        own: Find a set for each task.
        joint: With several tasks, also find one set for all.
        journal: Folder for finished work; None for one of the search's own in the cache folder.
    """

    questions: Questions
    rank: int | None = None
    choose: int | None = None
    report: int | None = None
    options: SearchOptions = field(default_factory=SearchOptions)
    own: bool = True
    joint: bool = True
    journal: Path | None = None

    def __post_init__(self) -> None:
        """Raises TaskError for a split of less than one question."""
        check_sizes(rank=self.rank, choose=self.choose, report=self.report)

    def load(self) -> list[SearchTask]:
        """The questions, drawn into splits.

        Raises:
            ActExportError: If the results of two tasks would have the same file name; as `check_goal`.
            TaskError: If there is no such task or file, its questions can't be had, or there are too few.
        """
        found = self.questions.load()
        if len(found) > 1:
            _calibration_files(task.name for task in found)
        tasks = [self._split(task) for task in found]
        check_goal(self.options.goal, tasks)
        return tasks

    def _split(self, task: TaskExamples) -> SearchTask:
        seed = self.questions.drawing_seed
        splits = split_examples(task.examples, rank=self.rank, choose=self.choose, report=self.report, seed=seed)
        return SearchTask(task.name, splits, task.length_normalized, task.generation, self.questions)


def run_search(
    checkpoint: Checkpoint,
    job: SearchJob,
    *,
    tasks: Sequence[SearchTask] | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Does the job; one that was interrupted goes on where it stopped.

    Args:
        checkpoint: The model.
        job: What to do.
        tasks: What `SearchJob.load` gave, if it was called before.
        progress: Called after every unit of work.

    Raises:
        ActExportError: As `SearchJob.load` and `act_export.search.search_heads`.
    """
    from act_export.search.run import search_heads

    return search_heads(
        checkpoint,
        tasks if tasks is not None else job.load(),
        job.options,
        journal=job.journal,
        journals=cache_folder() / "searches",
        own=job.own,
        joint=job.joint,
        published=published_sets(checkpoint),
        progress=progress,
    )


def published_sets(checkpoint: Checkpoint) -> Mapping[str, Calibration]:
    """Head sets that others published for this model, by the recipe's name."""
    recipes = find_recipes(checkpoint.identity, checkpoint.names)
    return {
        recipe.name: recipe.calibration
        for recipe in recipes
        if recipe.calibration.provenance is not None and recipe.calibration.provenance.method == PUBLISHED
    }


def check_output(out: Path, job: SearchJob) -> None:
    """Refuses, before any work, a place that the result can't be written to.

    Raises:
        ActExportError: With the place, and what to pass instead.
    """
    several = len(job.questions.sources) > 1
    if several and (out.suffix == ".json" or out.is_file()):
        raise ActExportError(
            f"{out} is one file, but a search on several tasks writes one for each; pass a folder, e.g. --out recipes"
        )
    if not several and out.is_dir():
        raise ActExportError(f"{out} is a folder; pass a file, e.g. --out {out / 'calibration.json'}")
    for place in sorted(out.iterdir()) if several and out.is_dir() else [out]:
        if place == out or place.suffix == ".json":
            check_replaceable(place)
    if job.journal is not None and job.journal.resolve() == out.resolve():
        raise ActExportError(f"{out} can't be both the journal and what is written; pass another folder with --journal")
    check_writable(out if several and out.exists() else out.resolve().parent)


def save_result(result: SearchResult, out: Path) -> list[Path]:
    """Writes the calibration of a single task to the file `out`; of several, one each, the joint one and a report.

    The report, `search.json`, has every figure of the search by task.

    Returns:
        The files.

    Raises:
        ActExportError: If they can't be written.
    """
    texts: dict[Path, str] = {}
    if len(result.calibrations) == 1:
        (calibration,) = result.calibrations.values()
        texts[out] = calibration.to_json()
    else:
        for task, name in _calibration_files(result.calibrations).items():
            texts[out / name] = result.calibrations[task].to_json()
        if result.joint is not None:
            texts[out / JOINT_FILE] = result.joint.to_json()
        texts[out / REPORT_FILE] = report_json(result)
    for path, text in texts.items():
        try:
            write_whole(path, text)
        except OSError as error:
            raise ActExportError(
                f"can't write {path}: {error.strerror}; pass another place with --out, the search is kept and won't be "
                f"done again"
            ) from error
    return list(texts)


def _calibration_files(tasks: Iterable[str]) -> dict[str, str]:
    """By task, the name of its file in the folder of a search on several."""
    owners = {JOINT_FILE: "the joint set", REPORT_FILE: "the report"}
    files: dict[str, str] = {}
    for task in tasks:
        files[task] = f"{Path(task).stem}.json"
        if owners.setdefault(files[task], task) != task:
            raise ActExportError(
                f"{owners[files[task]]} and {task} would both be written to {files[task]}; rename the "
                f"file of one of them"
            )
    return files


def report_json(result: SearchResult) -> str:
    """Every figure of a search: gains, intervals, controls and the ranking's cost."""
    document = {
        "tasks": {name: asdict(report) for name, report in result.reports.items()},
        "average": asdict(result.average) if result.average is not None else None,
        "average_beyond": asdict(result.average_beyond) if result.average_beyond is not None else None,
        "joint_average": asdict(result.joint_average) if result.joint_average is not None else None,
        "joint_beyond": asdict(result.joint_beyond) if result.joint_beyond is not None else None,
        "heads": {name: calibration.num_calibrated_heads for name, calibration in result.calibrations.items()},
        "joint_heads": result.joint.num_calibrated_heads if result.joint is not None else None,
    }
    return json.dumps(document, indent=1) + "\n"
