"""Which calibration a request has: by name, by value, none, or one for each sequence of a batch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.calibration_set import CalibrationSet
from act_export.calibration.file import Calibration
from act_export.calibration.strengths import PLAIN
from act_export.errors import SessionError, shown
from act_export.onnx_file.metadata import metadata_of
from act_export.onnx_file.record import FileRecord
from act_export.runtime.adapter import SUFFIX, model_version, read_adapter


class _Default(Enum):
    DEFAULT = "default"


DEFAULT: Final = _Default.DEFAULT
DefaultType = Literal[_Default.DEFAULT]
Choice = str | Calibration | None
"""A name, a calibration, or None for plain."""
Choices = Choice | Sequence[Choice] | DefaultType
"""For all sequences, or one for each; `DEFAULT` is what the file has where a request doesn't say."""


class Requests:
    """What the requests of a session can be calibrated to.

    Attributes:
        path: The model's file.
        record: What it says of itself.
        calibrations: That it has; None where no head can be calibrated.
        default: Of requests that don't say; `DEFAULT` for the file's.
    """

    def __init__(self, path: Path, record: FileRecord) -> None:
        """Takes the file, and what it says of itself."""
        self.path = path
        self.record = record
        self.calibrations: CalibrationSet | None = record.calibrations
        self.default: Choice | DefaultType = DEFAULT
        self._adapters: dict[str, NDArray[np.float32]] = {}

    @property
    def by_name(self) -> Mapping[str, Calibration | None]:
        """Of the file, "plain" among them; None for that."""
        return (
            {PLAIN: None} if self.calibrations is None else {n: self.calibrations[n] for n in self.calibrations.names}
        )

    def add_adapter(self, path: str | os.PathLike[str], name: str | None = None) -> str:
        """Reads an adapter, whose name then stands for it.

        Args:
            path: `NAME.onnx_adapter`.
            name: None for that of the file.

        Returns:
            The name.

        Raises:
            SessionError: If it isn't an adapter of this model, or the name is taken.
            CalibrationError: If a value is out of range.
        """
        name = name if name is not None else Path(path).name.removesuffix(SUFFIX)
        strengths = read_adapter(path, len(self._set().heads), model_version(self.record), self.path)
        if name in self.by_name:
            raise SessionError(f"{self.path} has a calibration {shown(name)} already; give the adapter another name")
        self._adapters[name] = strengths
        return name

    def choose(self, text: str) -> Choice:
        """What a text means: an adapter's or a calibration's file, which is read, or a name.

        Raises:
            SessionError: As `add_adapter`, or if there is no such name.
            CalibrationError: If a calibration's file can't be read, or doesn't fit.
        """
        if text in self.by_name or text in self._adapters:
            return text
        if text.endswith(SUFFIX):
            return self.add_adapter(text)
        choice = Calibration.load(text) if text.endswith(".json") else text
        self._one(choice)
        return choice

    def strengths(self, chosen: Choices, batch: int) -> NDArray[np.float32] | None:
        """What the input `calibration` is given: (1 or batch, heads, 3); None where nothing has to be.

        Raises:
            SessionError: If a list hasn't one for each sequence, a name isn't known, or the file can't be calibrated.
            CalibrationError: If a calibration doesn't fit the file.
        """
        if isinstance(chosen, _Default):
            chosen = self.default
        if isinstance(chosen, _Default):
            return None
        if chosen is None or isinstance(chosen, str | Calibration):
            each: list[Choice] = [chosen]
        elif len(each := list(chosen)) != batch:
            raise SessionError(f"there are {len(each)} calibrations for {batch} sequences; give one for each, or one")
        if self.calibrations is None and all(choice in (None, PLAIN) for choice in each):
            return None
        found = np.concatenate([self._one(choice) for choice in each])
        return found if found.shape[1] else None  # the graph has no such input where there are no heads

    def _one(self, choice: Choice) -> NDArray[np.float32]:
        calibrations = self._set()
        if isinstance(choice, str):
            if choice in self._adapters:
                return self._adapters[choice]
            if choice not in calibrations.names:
                raise SessionError(
                    f"{self.path} has no calibration {shown(choice)}; there are "
                    f"{', '.join((*calibrations.names, *self._adapters))}"
                )
            choice = calibrations[choice]
        if choice is not None and self.record.model is not None:
            choice.check_fits(self.record.model)
        return calibrations.heads.strengths(choice)

    def _set(self) -> CalibrationSet:
        if self.calibrations is None:
            raise SessionError(
                f"no head of {self.path} can be calibrated; export the model with a calibration, or with --switchable"
            )
        return self.calibrations


def check_choice(file: Path, chosen: str | Calibration) -> None:
    """Refuses, before a model is opened, a calibration that isn't for it; a model that can't be read is left alone.

    Args:
        file: The ONNX file.
        chosen: As in `Requests.choose`, or a calibration.

    Raises:
        SessionError: As `Requests.choose`, or if the file's metadata isn't act-export's.
        CalibrationError: The same.
    """
    properties = metadata_of(file)
    if properties is not None:
        requests = Requests(file, FileRecord.read(properties, str(file), error=SessionError))
        requests.strengths(requests.choose(chosen) if isinstance(chosen, str) else chosen, 1)
