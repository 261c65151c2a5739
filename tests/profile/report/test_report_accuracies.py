"""Accuracies are read from what the other commands write, and from nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from act_export.calibration.file import Calibration, Provenance
from act_export.commands.evaluate_table import report_json as evaluation_json
from act_export.errors import ActExportError
from act_export.profile.report import TaskAccuracy, accuracies_of
from act_export.profile.report.figure_data import accuracy_names
from act_export.search.job import report_json as search_json
from act_export.search.results import Gain, SearchResult, TaskReport
from act_export.tasks import Questions
from act_export.tasks.statistics import accuracy_interval
from act_export.verify.evaluate.answers import Evaluation, compare
from act_export.verify.evaluate.request import EvaluationRequest
from act_export.verify.evaluate.results import EvaluationReport, TaskResult, average_over

PLAIN = Evaluation(((0.0, -1.0),) * 4, (0, 0, 0, 0), (0, 1, 1, 0))
CALIBRATED = Evaluation(((0.0, -1.0),) * 4, (0, 1, 0, 0), (0, 1, 1, 0))
MEASURED = Provenance(
    "gates",
    ("boolq",),
    {"report": 240},
    plain_accuracy=0.3958,
    calibrated_accuracy=0.5667,
    notes={"gain_interval_95": [0.0833, 0.2542]},
)


def write(folder: Path, document: Any) -> Path:
    path = folder / "found.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def evaluation(plain: Evaluation | None = PLAIN) -> str:
    results = (TaskResult("sst2", ("q",) * 4, CALIBRATED, plain),)
    request = EvaluationRequest(Path("calibrated.onnx"), Path("plain.onnx") if plain else None, Questions(("sst2",)))
    return evaluation_json(EvaluationReport(request, results, average_over(results)))


def search(**reports: tuple[Gain | None, Gain | None]) -> str:
    made = {
        task: TaskReport(
            task=task,
            plain_accuracy=0.5,
            own=own,
            joint=joint,
            random_heads=(),
            controls={"plain": 0.5},
            control="plain",
            beyond=own,
            with_remedy=own,
            joint_beyond=joint,
            joint_with_remedy=joint,
            measures=None,
            invalid=None,
            choice_bias=None,
            published={},
            predicted_shares=None,
            p=0.01,
            choose_accuracy={},
            forward_passes=1.0,
            sizes={"rank": 9, "report": 200},
            duplicates=0,
        )
        for task, (own, joint) in reports.items()
    }
    return search_json(SearchResult({task: Calibration({0: (0,)}) for task in made}, None, made))


def test_of_an_evaluation(tmp_path: Path) -> None:
    assert accuracies_of(write(tmp_path, evaluation())) == (
        TaskAccuracy(
            "sst2",
            4,
            0.5,
            accuracy_interval(2, 4),
            0.75,
            accuracy_interval(3, 4),
            0.25,
            compare(PLAIN, CALIBRATED).interval,
            "ONNX Runtime",
        ),
    )


def test_of_a_search(tmp_path: Path) -> None:
    own, joint = Gain(0.6, 0.1, (0.02, 0.18), 0.01), Gain(0.58, 0.08, (0.0, 0.16), None)
    found = accuracies_of(write(tmp_path, search(sst2=(own, joint), mr=(None, None), cb=(None, joint))))
    assert [(each.task, each.calibrated, each.gain_interval) for each in found] == [
        ("sst2", 0.6, (0.02, 0.18)),
        ("sst2, joint set", 0.58, (0.0, 0.16)),
        ("mr", 0.5, None),
        ("cb, joint set", 0.58, (0.0, 0.16)),
    ]
    assert {(each.plain, each.samples, each.measured_with) for each in found} == {(0.5, 200, "PyTorch")}
    assert found[0].gain == pytest.approx(0.1)
    assert found[0].calibrated_interval == accuracy_interval(120, 200)


@pytest.mark.parametrize("as_file", [False, True])
def test_of_a_calibration(tmp_path: Path, as_file: bool) -> None:
    calibration = Calibration({2: (5,)}, provenance=MEASURED)
    (found,) = accuracies_of(write(tmp_path, calibration.to_json()) if as_file else calibration)
    assert (found.task, found.samples, found.plain, found.calibrated) == ("boolq", 240, 0.3958, 0.5667)
    assert found.gain_interval == (0.0833, 0.2542)
    assert found.plain_interval == accuracy_interval(95, 240)


def test_of_a_calibration_for_several_tasks() -> None:
    notes = {"average_gain": {"gain": 0.1, "interval_95": [0.05, 0.15]}}
    provenance = replace(MEASURED, tasks=("sst2", "mr"), notes=notes)
    (found,) = accuracies_of(Calibration({2: (5,)}, provenance=provenance))
    assert (found.task, found.gain_interval) == ("mean of 2 tasks", (0.05, 0.15))
    assert (found.plain_interval, found.calibrated_interval) == (None, None)  # a mean is no share of questions


@pytest.mark.parametrize("provenance", [None, replace(MEASURED, plain_accuracy=None)])
def test_a_calibration_that_was_never_measured_has_none(provenance: Provenance | None) -> None:
    assert accuracies_of(Calibration({2: (5,)}, provenance=provenance)) == ()


def changed(document: str, *path: str | int, to: Any) -> Any:
    found = json.loads(document)
    inner = found
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = to
    return found


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "isn't JSON"),
        ("[1]", "is no JSON object but a list"),
        ({"tasks": [1]}, "has no accuracies"),
        (evaluation(plain=None), "was not run with a plain model"),
        (changed(evaluation(), "tasks", 0, "comparison", to=None), "has no 'accuracy'"),
        (changed(evaluation(), "tasks", 0, "plain", "metrics", "accuracy", "mean", to=1.5), "1.5 is not a number"),
        (changed(evaluation(), "tasks", 0, "plain", "metrics", "accuracy", "interval", to=[0.9, 0.1]), "goes from 0.9"),
        (changed(evaluation(), "tasks", to=None), "is malformed"),
        (changed(search(sst2=(None, None)), "tasks", "sst2", "sizes", to={}), "has no 'report'"),
        (
            changed(search(sst2=(None, None)), "tasks", "sst2", "sizes", "report", to=0),
            "0 is not a number of questions",
        ),
        (changed(search(sst2=(None, None)), "tasks", "sst2", "plain_accuracy", to="much"), "'much' is not a number"),
        (changed(search(sst2=(None, None)), "tasks", "sst2", to=3), "is malformed"),
        (Calibration({0: (0,)}, provenance=replace(MEASURED, samples={})).to_json(), "has no 'report'"),
        (
            Calibration({0: (0,)}, provenance=replace(MEASURED, plain_accuracy=3.0)).to_json(),
            "plain_accuracy = 3.0; it must",
        ),
        ({"heads": {"0": ["x"]}}, "found.json"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, document: Any, message: str) -> None:
    with pytest.raises(ActExportError) as refused:
        accuracies_of(write(tmp_path, document))
    assert message in str(refused.value)
    assert "found.json" in str(refused.value)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ActExportError, match=r"can't read .*nothing\.json: No such file"):
        accuracies_of(tmp_path / "nothing.json")


def test_names_differ() -> None:
    one = TaskAccuracy("sst2", 4, 0.5, (0.1, 0.9), 0.5, (0.1, 0.9), 0.0, None, "PyTorch")
    assert accuracy_names([one, replace(one, task="mr")]) == ["sst2", "mr"]
    assert accuracy_names([one, replace(one, measured_with="ONNX Runtime")]) == [
        "sst2 (PyTorch)",
        "sst2 (ONNX Runtime)",
    ]
    assert accuracy_names([one, one, replace(one, task="mr")]) == ["sst2, 1", "sst2, 2", "mr"]
