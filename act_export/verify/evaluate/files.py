"""The files of an evaluation: read, and refused where they can't be compared, before anything runs."""

from __future__ import annotations

from act_export.calibration.file import Calibration
from act_export.calibration.strengths import PLAIN as PLAIN_NAME
from act_export.errors import ActExportError
from act_export.onnx_file.language_model import ModelFile, read_model_file
from act_export.runtime.adapter import SUFFIX
from act_export.runtime.request import check_choice
from act_export.verify.evaluate.request import CALIBRATED, PLAIN, EvaluationRequest


def read_files(request: EvaluationRequest) -> tuple[dict[str, ModelFile], dict[str, Calibration | None]]:
    """The file, and what it is compared with, each with its calibration: by side, the file's own first.

    Raises:
        ActExportError: If a file can't be read, or the two are of different models.
        CalibrationError: If the calibration that was asked for can't be read, or isn't for the file.
    """
    files = {CALIBRATED: read_model_file(request.file)}
    if request.against is not None:
        files[PLAIN] = read_model_file(request.against)
    mine, other = files[CALIBRATED], files.get(PLAIN)
    if not mine.ours:
        raise ActExportError(
            f"{mine.path} has no act-export metadata; it wasn't written by act-export. A model that somebody else "
            f"exported can be what a graft of it is measured against: --against {mine.path}"
        )
    if other is not None and other.cache_shape != mine.cache_shape:
        raise ActExportError(
            f"{other.path} isn't the model of {mine.path}: layers, heads or head sizes of the cache differ; compare "
            f"exports of the same model"
        )
    if other is not None and mine.identity is not None and other.identity is not None:
        differences = mine.identity.differences(other.identity)
        if differences:
            what, first, second = differences[0]
            raise ActExportError(
                f"{other.path} isn't the model of {mine.path}: its {what} is {second}, not {first}; compare exports of "
                f"the same model"
            )
    calibrations = {name: file.record.calibration for name, file in files.items()}
    if request.calibration is not None:
        calibrations[CALIBRATED] = _named(mine, request.calibration)
    if other is None and not is_plain(calibrations[CALIBRATED]):
        files[PLAIN], calibrations[PLAIN] = mine, None
    return files, calibrations


def _named(file: ModelFile, name: str) -> Calibration | None:
    own = file.record.calibrations
    if own is not None and name in own.names:
        return own[name]
    if name.endswith(SUFFIX):
        raise ActExportError(
            f"{name} doesn't say which questions its heads were found on; pass the calibration file that it was made of"
        )
    if name.endswith(".json"):
        check_choice(file.path, name)
        return Calibration.load(name)
    raise ActExportError(
        f"{file.path} has no calibration {name!r}; there are {', '.join(own.names) if own is not None else PLAIN_NAME}"
    )


def is_plain(calibration: Calibration | None) -> bool:
    """Whether no head is calibrated."""
    return calibration is None or not calibration.num_calibrated_heads
