"""The calibrations that one file has, by name, and the one that holds where a request doesn't say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from act_export.calibration.file import DEFAULT_THRESHOLD, Calibration, CalibrationError, heads_of
from act_export.calibration.strengths import PLAIN, CalibratedHeads
from act_export.errors import shown
from act_export.json_fields import Fields

UNNAMED = "calibrated"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class CalibrationSet:
    """What one file can be calibrated to.

    Attributes:
        each: By name; "plain", which leaves every head as it is, is none of them.
        default: Name of the one that holds where a request doesn't say, or "plain".
        heads: That the file can calibrate: those of all calibrations, or more.
    """

    each: Mapping[str, Calibration]
    default: str
    heads: CalibratedHeads = field(default_factory=lambda: CalibratedHeads({}))

    def __post_init__(self) -> None:
        """Checks names and heads.

        Raises:
            CalibrationError: Naming the value.
        """
        for name, calibration in self.each.items():
            if not _NAME.fullmatch(name) or name == PLAIN:
                raise CalibrationError(
                    f"a calibration is called {shown(name)}; a name begins with a letter or digit, goes on with these "
                    f"and . _ -, and isn't {PLAIN!r}: rename its file"
                )
            self.heads.check(calibration)
        if self.default not in self.names:
            raise CalibrationError(
                f"the default calibration is {shown(self.default)}; it must be one of {', '.join(self.names)}"
            )

    @classmethod
    def of(
        cls,
        calibrations: Mapping[str, Calibration] | Calibration | None,
        *,
        default: str | None = None,
        every: Mapping[int, tuple[int, ...]] | None = None,
    ) -> Self:
        """A set of one, or of several by name.

        Args:
            calibrations: None for none.
            default: None for the first.
            every: Heads of the model by layer, where all of them can be calibrated; None for those of the calibrations.

        Raises:
            CalibrationError: If names, threshold modes or heads don't fit.
        """
        if calibrations is None:
            calibrations = {}
        if isinstance(calibrations, Calibration):
            calibrations = {UNNAMED: calibrations}
        first = next(iter(calibrations), PLAIN)
        heads = CalibratedHeads.of(calibrations.values())
        if every is not None:
            heads = CalibratedHeads(every, heads.threshold_mode)
        return cls(dict(calibrations), first if default is None else default, heads)

    @property
    def names(self) -> tuple[str, ...]:
        """Of all, "plain" at the end."""
        return (*self.each, PLAIN)

    @property
    def default_calibration(self) -> Calibration | None:
        """None where the default is plain."""
        return self.each.get(self.default)

    def __getitem__(self, name: str) -> Calibration | None:
        """The calibration of this name; None for "plain".

        Raises:
            CalibrationError: If there is none, with the names that there are.
        """
        if name not in self.names:
            raise CalibrationError(f"there is no calibration {shown(name)}; the file has {', '.join(self.names)}")
        return self.each.get(name)

    def to_json(self) -> str:
        """The text that travels in a file's metadata."""
        return json.dumps(
            {
                "default": self.default,
                "threshold_mode": self.heads.threshold_mode,
                "heads": {str(layer): list(heads) for layer, heads in self.heads.heads.items()},
                "each": {name: json.loads(calibration.to_json()) for name, calibration in self.each.items()},
            }
        )

    @classmethod
    def of_fields(cls, fields: Fields) -> Self:
        """What `to_json` wrote.

        Raises:
            CalibrationError: If a value is out of range.
            ActExportError: If it isn't of that form.
        """
        fields.only({"default", "threshold_mode", "heads", "each"})
        each = fields.inner("each")
        heads = heads_of(fields.inner("heads"))
        if not all(heads.values()) or any(len(set(listed)) < len(listed) for listed in heads.values()):
            raise fields.refused("has a layer without heads among its heads, or a head twice")
        mode = fields.text("threshold_mode", 100)
        if mode not in DEFAULT_THRESHOLD:
            raise fields.refused(f"has threshold_mode = {shown(mode)}; it must be {' or '.join(DEFAULT_THRESHOLD)}")
        found = {name: _calibration(each.members[name], f"{fields.what}: {shown(name)}") for name in each.members}
        return cls(found, fields.text("default", 100), CalibratedHeads(dict(sorted(heads.items())), mode))


def _calibration(document: Any, source: str) -> Calibration:
    return Calibration.from_json(json.dumps(document), source=source)
