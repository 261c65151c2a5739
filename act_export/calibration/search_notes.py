"""What a search wrote into a calibration's notes, which anyone may have written: what doesn't fit isn't there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True)
class GainBeyond:
    """What calibration gains beyond the plain model's best cheap remedy; shares of questions, not points.

    Attributes:
        gain: Of accuracy.
        interval: 95% interval of it; None where it isn't known.
        control: The remedy; empty where it is the best of each of several tasks.
        accuracy: Of the remedy; None where it isn't known.
    """

    gain: float
    interval: Interval | None = None
    control: str = ""
    accuracy: float | None = None


def gain_beyond_control(notes: Mapping[str, Any]) -> GainBeyond | None:
    """The gain beyond the best control of a task, or in the mean of several."""
    return _gain(notes, "gain_beyond_control", "average_gain_beyond_controls")


def gain_with_remedy(notes: Mapping[str, Any]) -> GainBeyond | None:
    """The same with that control's remedy on the calibrated model too."""
    return _gain(notes, "gain_with_remedy_on_both", "average_gain_with_remedies_on_both")


def without_choice_bias(notes: Mapping[str, Any]) -> tuple[float, float] | None:
    """Accuracies of the plain and the calibrated model, each without its lean to an answer."""
    controls = notes.get("controls")
    found = controls.get("without_choice_bias") if isinstance(controls, Mapping) else None
    if not isinstance(found, Mapping):
        return None
    plain, calibrated = (_number(found.get(side)) for side in ("plain", "calibrated"))
    return None if plain is None or calibrated is None else (plain, calibrated)


def gain_interval(notes: Mapping[str, Any]) -> Interval | None:
    """The 95% interval of the gain over the plain model, of a task or in the mean of several."""
    average = notes.get("average_gain")
    return _interval(notes, "gain_interval_95") or (_interval(average) if isinstance(average, Mapping) else None)


def _gain(notes: Mapping[str, Any], *keys: str) -> GainBeyond | None:
    for key in keys:
        found = notes.get(key)
        if isinstance(found, Mapping) and (gain := _number(found.get("gain"))) is not None:
            named, accuracy = found.get("control"), _number(found.get("accuracy"))
            return GainBeyond(gain, _interval(found), named if isinstance(named, str) else "", accuracy)
    return None


def _interval(notes: Mapping[str, Any], name: str = "interval_95") -> Interval | None:
    found = notes.get(name)
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    low, high = map(_number, found)
    return None if low is None or high is None else (low, high)


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
