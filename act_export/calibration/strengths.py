"""Which heads a file can calibrate, and what a calibration is to it: a small tensor, given with each request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from act_export.calibration.file import STRENGTHS, Calibration, CalibrationError

PLAIN = "plain"  # name of the calibration that leaves every head as it is
KNOBS = (*STRENGTHS, "threshold")  # of a head, in the order of the tensor's last dimension
_PLAIN_HEAD = (1.0, 1.0, 0.0)
_MOST_SHOWN = 8


@dataclass(frozen=True)
class CalibratedHeads:
    """Heads that can be calibrated, in the order of the tensor: by layer, then by head.

    Attributes:
        heads: Query heads by layer, ascending; layers without any are left out.
        threshold_mode: "absolute" or "relative", of every calibration.
    """

    heads: Mapping[int, tuple[int, ...]]
    threshold_mode: str = "absolute"

    @classmethod
    def of(cls, calibrations: Iterable[Calibration]) -> Self:
        """All heads of these.

        Raises:
            CalibrationError: If their threshold modes differ.
        """
        given = list(calibrations)
        modes = {calibration.threshold_mode for calibration in given}
        if len(modes) > 1:
            raise CalibrationError(
                "calibrations of one file need the same threshold_mode; some are absolute, some relative: leave one "
                "kind out, or search again with the other's --threshold-mode"
            )
        layers = sorted({layer for calibration in given for layer in calibration.heads})
        return cls(
            {layer: tuple(sorted({h for each in given for h in each.heads.get(layer, ())})) for layer in layers},
            *modes,
        )

    def __len__(self) -> int:
        """Number of heads."""
        return sum(map(len, self.heads.values()))

    def part(self, layer: int) -> slice:
        """Where a layer's heads are in the tensor's second dimension."""
        begin = sum(len(heads) for each, heads in self.heads.items() if each < layer)
        return slice(begin, begin + len(self.heads.get(layer, ())))

    def check(self, calibration: Calibration) -> None:
        """Refuses a calibration of heads that aren't among these, or of another threshold mode.

        Raises:
            CalibrationError: Naming the heads.
        """
        missing = [
            f"{layer}.{head}"
            for layer, heads in calibration.heads.items()
            for head in heads
            if head not in self.heads.get(layer, ())
        ]
        if missing:
            shown = ", ".join(missing[:_MOST_SHOWN]) + (", ..." if len(missing) > _MOST_SHOWN else "")
            raise CalibrationError(
                f"the calibration needs {len(missing)} heads that the file can't calibrate (layer.head): {shown}; "
                f"export the model with this calibration too, or with --switchable"
            )
        if calibration.heads and calibration.threshold_mode != self.threshold_mode:
            raise CalibrationError(
                f"the calibration's threshold_mode is {calibration.threshold_mode!r}; the file's is "
                f"{self.threshold_mode!r}"
            )

    def strengths(self, *calibrations: Calibration | None) -> NDArray[np.float32]:
        """The tensor: beta, gamma and threshold of each head, (calibrations, heads, 3); None leaves all as they are.

        Raises:
            CalibrationError: If one doesn't fit, see `check`.
        """
        found = np.tile(np.array(_PLAIN_HEAD, np.float32), (len(calibrations), len(self), 1))
        for row, calibration in zip(found, calibrations, strict=True):
            if calibration is None:
                continue
            self.check(calibration)
            for index, heads in calibration.heads.items():
                layer, own = calibration.layer(index), self.heads[index]
                assert layer is not None  # it has heads
                places = [self.part(index).start + own.index(head) for head in heads]
                row[places] = layer.strengths
        return found


def check_strengths(strengths: NDArray[np.float32]) -> None:
    """Refuses strengths that no operator takes: (calibrations, heads, 3).

    Raises:
        CalibrationError: If a value is out of range, with the value.
    """
    for knob, (lowest, highest) in (STRENGTHS | {"threshold": (0.0, np.finfo(np.float32).max)}).items():
        values = strengths[..., KNOBS.index(knob)]
        wrong = values[~((values >= lowest) & (values <= highest))]
        if len(wrong):
            allowed = "0 or more" if knob == "threshold" else f"{lowest:g} to {highest:g}"
            raise CalibrationError(f"calibration has {knob} = {wrong[0]:g}; it must be {allowed}")
