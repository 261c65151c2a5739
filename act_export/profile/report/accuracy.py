"""Accuracy per task, plain and calibrated, from the files that other commands write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from act_export.calibration.file import Calibration
from act_export.errors import ActExportError, first_line, shown
from act_export.json_file import read_object
from act_export.tasks.statistics import accuracy_interval

PYTORCH, ONNX_RUNTIME = "PyTorch", "ONNX Runtime"
_EVALUATION = "act-export evaluation"
_WANTED = (
    "pass what `act-export eval F --against PLAIN --json` prints, the search.json of `act-export search`, "
    "or a calibration file"
)

Interval = tuple[float, float]


@dataclass(frozen=True)
class TaskAccuracy:
    """What calibration does to the accuracy on one task.

    Attributes:
        task: Its name.
        samples: Number of questions.
        plain: Accuracy without calibration, in [0, 1].
        plain_interval: 95% interval of it; None of a mean over tasks, which is no share of questions.
        calibrated: Accuracy with it.
        calibrated_interval: 95% interval of it, or None likewise.
        gain: Calibrated minus plain.
        gain_interval: 95% interval of the gain, paired; None where it isn't known.
        measured_with: "PyTorch" or "ONNX Runtime".
        metric: "accuracy", or what else is counted, e.g. "f1".
    """

    task: str
    samples: int
    plain: float
    plain_interval: Interval | None
    calibrated: float
    calibrated_interval: Interval | None
    gain: float
    gain_interval: Interval | None
    measured_with: str
    metric: str = "accuracy"


def accuracies_of(source: Calibration | str | os.PathLike[str]) -> tuple[TaskAccuracy, ...]:
    """Reads accuracies.

    Args:
        source: A calibration, whose provenance may have accuracies; or the path of a JSON file: an evaluation's, a
            search's `search.json`, or a calibration's.

    Returns:
        One for each task and set of heads; none of a calibration that was never measured.

    Raises:
        ActExportError: If the file can't be read, is something else, or a value in it isn't what it must be.
        CalibrationError: If it is a calibration's but malformed.
    """
    if isinstance(source, Calibration):
        return _of_calibration(source, "the calibration")
    path = Path(source)
    document = read_object(path, advice=_WANTED)
    if document.get("format") == _EVALUATION:
        read = _of_evaluation
    elif isinstance(document.get("tasks"), dict):
        read = _of_search
    elif "heads" in document:
        return _of_calibration(Calibration.load(path), str(path))
    else:
        raise ActExportError(f"{path} has no accuracies; {_WANTED}")
    try:
        return read(document)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"has no {first_line(error)}" if isinstance(error, KeyError) else f"is malformed: {first_line(error)}"
        raise ActExportError(f"{path} {what}; {_WANTED}") from error


def _of_evaluation(document: Mapping[str, Any]) -> tuple[TaskAccuracy, ...]:
    return tuple(_of_evaluated_task(task) for task in document["tasks"])


def _of_evaluated_task(task: Mapping[str, Any]) -> TaskAccuracy:
    name, calibrated, plain = str(task["name"]), task["calibrated"], task["plain"]
    if plain is None:
        raise ValueError(f"task {name!r} was not run with a plain model, --against names one")
    metric = str(calibrated["main_metric"])
    comparison = (task["comparison"] or {})[metric]
    before, after = plain["metrics"][metric], calibrated["metrics"][metric]
    return TaskAccuracy(
        task=name,
        samples=len(task["questions"]),
        plain=_share(before["mean"]),
        plain_interval=_interval(before["interval"]),
        calibrated=_share(after["mean"]),
        calibrated_interval=_interval(after["interval"]),
        gain=_share(comparison["gain"], -1.0),
        gain_interval=_interval(comparison["interval"], -1.0),
        measured_with=ONNX_RUNTIME,
        metric=metric.replace("_", " "),
    )


def _of_search(document: Mapping[str, Any]) -> tuple[TaskAccuracy, ...]:
    found: list[TaskAccuracy] = []
    for task, report in document["tasks"].items():
        samples, plain = _count(report["sizes"]["report"]), report["plain_accuracy"]
        own, joint = report["own"], report["joint"]
        if own is None and joint is None:  # no set helped: calibrated is plain
            found.append(_measured_in_pytorch(task, samples, plain, plain, None))
        if own is not None:
            found.append(_measured_in_pytorch(task, samples, plain, own["accuracy"], own["interval"]))
        if joint is not None:
            name = f"{task}, joint set"
            found.append(_measured_in_pytorch(name, samples, plain, joint["accuracy"], joint["interval"]))
    return tuple(found)


def _of_calibration(calibration: Calibration, name: str) -> tuple[TaskAccuracy, ...]:
    provenance = calibration.provenance
    if provenance is None or provenance.plain_accuracy is None or provenance.calibrated_accuracy is None:
        return ()
    tasks, notes = provenance.tasks, provenance.notes
    title = tasks[0] if len(tasks) == 1 else f"mean of {len(tasks)} tasks"
    try:
        interval = notes.get("gain_interval_95")
        if interval is None and "average_gain" in notes:
            interval = notes["average_gain"]["interval_95"]
        samples = _count(provenance.samples["report"])
        accuracy = _measured_in_pytorch(
            title,
            samples,
            provenance.plain_accuracy,
            provenance.calibrated_accuracy,
            interval,
            one_task=len(tasks) == 1,
        )
    except (KeyError, TypeError, ValueError) as error:
        what = f"has no {error}" if isinstance(error, KeyError) else f"is malformed: {error}"
        raise ActExportError(f"the provenance of {name} {what}; search again, or leave its accuracies out") from error
    return (accuracy,)


def _measured_in_pytorch(
    task: str, samples: int, plain: Any, calibrated: Any, gain_interval: Any, *, one_task: bool = True
) -> TaskAccuracy:
    before, after = _share(plain), _share(calibrated)
    return TaskAccuracy(
        task=task,
        samples=samples,
        plain=before,
        plain_interval=accuracy_interval(round(before * samples), samples) if one_task else None,
        calibrated=after,
        calibrated_interval=accuracy_interval(round(after * samples), samples) if one_task else None,
        gain=after - before,
        gain_interval=_interval(gain_interval, -1.0) if gain_interval is not None else None,
        measured_with=PYTORCH,
    )


def _share(value: Any, least: float = 0.0) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1:
        raise ValueError(f"{shown(value)} is not a number from {least:g} to 1")
    return float(value)


def _interval(value: Any, least: float = 0.0) -> Interval:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{shown(value)} is not an interval, two numbers")
    low, high = (_share(bound, least) for bound in value)
    if low > high:
        raise ValueError(f"an interval goes from {low:g} to {high:g}")
    return low, high


def _count(value: Any) -> int:
    if type(value) is not int or not 1 <= value < 2**31:
        raise ValueError(f"{shown(value)} is not a number of questions")
    return value
