"""The sink profile on disk: arrays in NAME.safetensors, all else in NAME.json beside it.

The format, tensor by tensor, is described in `act_export/docs/profile.md`; `load_profile` refuses whatever doesn't fit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from act_export.calibration import Calibration, CalibrationError, ModelIdentity
from act_export.files import write_whole
from act_export.profile.profile import (
    ALL,
    GRID,
    MODES,
    POSITION_EDGES,
    RELATIVE_BINS,
    ExamplePrompt,
    LaterSinks,
    ProfileError,
    SinkProfile,
    SinkStatistics,
    SinkTokens,
)

FORMAT = "act-export sink profile"
FORMAT_VERSION = 1
_ROUNDING = 1e-4  # by which a share may lie beyond 0 or 1
_INFINITY = float("inf")


@dataclass(frozen=True)
class _Tensor:
    """What a tensor must be: its axes by name, its type, and the range of its values."""

    axes: tuple[str, ...]
    dtype: str = "float32"
    lowest: float = 0.0
    highest: float = _INFINITY


_HEADS = ("layers", "heads")
_STATISTICS = {
    "initial_score": _Tensor(_HEADS, highest=1),
    "initial_score_std": _Tensor(_HEADS, highest=1),
    "mass_std": _Tensor(_HEADS, highest=1),
    "entropy": _Tensor(_HEADS),
    "mean_map": _Tensor((*_HEADS, "grid", "grid"), highest=1),
    "absolute_exposure": _Tensor(("absolute bins",)),
    "relative_exposure": _Tensor(("relative bins",)),
}
_BY_MODE = {
    "initial_rate": _Tensor(_HEADS, highest=1),
    "rate": _Tensor(_HEADS, highest=1),
    "count": _Tensor(_HEADS),
    "mass": _Tensor(_HEADS, highest=1),
    "absolute_positions": _Tensor((*_HEADS, "absolute bins")),
    "relative_positions": _Tensor((*_HEADS, "relative bins")),
}
_TOKENS = {
    "ids": _Tensor(("tokens",), "int64"),
    "occurrences": _Tensor(("tokens",), "int64"),
    "sinks": _Tensor(("tokens", "layers"), "int64"),
    "mass": _Tensor(("tokens",), highest=1),
}
_EFFECTS = _Tensor(_HEADS, lowest=-_INFINITY)
_EXAMPLE = {"ids": _Tensor(("tokens",), "int64"), "scores": _Tensor((*_HEADS, "tokens"), highest=1)}
_CALIBRATED = _Tensor((*_HEADS, "tokens"), highest=1)


def save_profile(profile: SinkProfile, path: str | os.PathLike[str]) -> None:
    """Writes a profile's two files; see `SinkProfile.save`."""
    path = _checked_name(path)
    tensors = dict(_tensors(profile))
    content = save_tensors({name: np.ascontiguousarray(array) for name, array in tensors.items()})
    statistics = [profile.overall, *profile.sources.values()]
    document = {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "tensors": {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()},
        "model": {"asked_for": profile.model_name, **asdict(profile.model)},
        "grid": GRID,
        "position_edges": list(POSITION_EDGES),
        "relative_bins": RELATIVE_BINS,
        "thresholds": {mode: profile.overall.by[mode].threshold for mode in MODES},
        "sources": [
            {
                "name": source.name,
                **{name: getattr(source, name) for name in _COUNTS},
                "token_texts": {mode: list(source.by[mode].tokens.texts) for mode in MODES},
            }
            for source in statistics
        ],
        "examples": [{"source": example.source, "texts": list(example.texts)} for example in profile.examples],
        "calibration": json.loads(profile.calibration.to_json()) if profile.calibration is not None else None,
        "options": dict(profile.options),
        "versions": dict(profile.versions),
    }
    try:
        write_whole(path, content)
        write_whole(path.with_suffix(".json"), json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise ProfileError(f"can't write {path}: {error.strerror}; pass another place with --out") from error


def load_profile(path: str | os.PathLike[str]) -> SinkProfile:
    """Reads a profile by either of its files' names; see `SinkProfile.load`."""
    path = Path(path)
    if not path.name or path.is_dir():
        raise ProfileError(f"{path} is a folder; pass a profile in it, e.g. {path / 'profile.safetensors'}")
    document_path, tensors_path = path.with_suffix(".json"), path.with_suffix(".safetensors")
    try:
        document = json.loads(document_path.read_text(encoding="utf-8"))
        content = tensors_path.read_bytes()
    except (OSError, ValueError) as error:
        raise ProfileError(
            f"can't read the profile {path}: {error}; a profile has two files, {tensors_path.name} and "
            f"{document_path.name}, which act-export profile writes"
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ProfileError(f"{document_path} is not a sink profile's; act-export profile writes one")
    if document.get("version") != FORMAT_VERSION:
        raise ProfileError(
            f"{document_path} has version {document.get('version')!r}; this act-export reads version {FORMAT_VERSION}. "
            f"Make the profile again"
        )
    try:
        if document["tensors"]["sha256"] != hashlib.sha256(content).hexdigest():
            raise ProfileError(
                f"{tensors_path} and {document_path} aren't of the same run; make the profile again, or put the right "
                f"files side by side"
            )
        for what, own in (("grid", GRID), ("position_edges", list(POSITION_EDGES)), ("relative_bins", RELATIVE_BINS)):
            if document[what] != own:
                raise ProfileError(f"{document_path}: {what} is {document[what]}; this version has {own}")
        return _Reader(load_tensors(content), document).profile()
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from error
    except SafetensorError as error:
        raise ProfileError(f"{tensors_path} is not a safetensors file: {error}") from error
    except (KeyError, TypeError, ValueError, CalibrationError) as error:
        raise ProfileError(f"{document_path}: missing or malformed field: {error!r}; make the profile again") from error


_COUNTS = ("prompts", "tokens", "shortest", "longest", "effect_prompts")


class _Reader:
    """Takes tensors out of a file, one after the other, each as it must be; in the end none is left."""

    def __init__(self, tensors: dict[str, NDArray[Any]], document: Mapping[str, Any]) -> None:
        self.tensors = tensors
        self.document = document
        model = dict(document["model"])
        self.model_name = str(model.pop("asked_for"))
        self.model = ModelIdentity(**model)
        self.sizes = {
            "layers": self.model.num_layers,
            "heads": self.model.num_heads,
            "grid": GRID,
            "absolute bins": len(POSITION_EDGES),
            "relative bins": RELATIVE_BINS,
        }

    def profile(self) -> SinkProfile:
        overall, *sources = [self._statistics(source) for source in self.document["sources"]]
        if overall.name != ALL or not sources:
            raise ProfileError(f"its sources begin with {overall.name!r}; they must be {ALL!r} and at least one more")
        calibration = self.document["calibration"]
        profile = SinkProfile(
            model=self.model,
            model_name=self.model_name,
            overall=overall,
            sources={source.name: source for source in sources},
            examples=tuple(self._example(index, given) for index, given in enumerate(self.document["examples"])),
            calibration=Calibration.from_json(json.dumps(calibration)) if calibration is not None else None,
            options=dict(self.document["options"]),
            versions=dict(self.document["versions"]),
        )
        if self.tensors:
            raise ProfileError(f"there is a tensor {sorted(self.tensors)[0]!r} that doesn't belong to a profile")
        return profile

    def _statistics(self, given: Mapping[str, Any]) -> SinkStatistics:
        name = given["name"]
        place = f"sources/{name}"
        fields: dict[str, Any] = {what: int(given[what]) for what in _COUNTS}
        fields |= {what: self._take(f"{place}/{what}", wanted) for what, wanted in _STATISTICS.items()}
        return SinkStatistics(
            name=name,
            **fields,
            effects=self._take(f"{place}/effects", _EFFECTS) if fields["effect_prompts"] else None,
            by={mode: self._later(place, mode, tuple(given["token_texts"][mode])) for mode in MODES},
        )

    def _later(self, place: str, mode: str, texts: tuple[str, ...]) -> LaterSinks:
        self.sizes["tokens"] = len(texts)
        tokens = {what: self._take(f"{place}/{mode}/tokens/{what}", wanted) for what, wanted in _TOKENS.items()}
        return LaterSinks(
            mode,
            float(self.document["thresholds"][mode]),
            **{what: self._take(f"{place}/{mode}/{what}", wanted) for what, wanted in _BY_MODE.items()},
            tokens=SinkTokens(texts=texts, **tokens),
        )

    def _example(self, index: int, given: Mapping[str, Any]) -> ExamplePrompt:
        self.sizes["tokens"] = len(given["texts"])
        place = f"examples/{index}"
        return ExamplePrompt(
            given["source"],
            texts=tuple(given["texts"]),
            **{what: self._take(f"{place}/{what}", wanted) for what, wanted in _EXAMPLE.items()},
            calibrated_scores=self._take(f"{place}/calibrated_scores", _CALIBRATED)
            if f"{place}/calibrated_scores" in self.tensors
            else None,
        )

    def _take(self, name: str, wanted: _Tensor) -> NDArray[Any]:
        if name not in self.tensors:
            raise ProfileError(f"the tensor {name!r} is missing")
        array = self.tensors.pop(name)
        shape = tuple(self.sizes[axis] for axis in wanted.axes)
        if array.shape != shape or array.dtype.name != wanted.dtype:
            raise ProfileError(
                f"{name} is {array.dtype.name} {array.shape}; it must be {wanted.dtype} {shape} "
                f"({', '.join(wanted.axes)})"
            )
        beyond = ~((array >= wanted.lowest - _ROUNDING) & (array <= wanted.highest + _ROUNDING))
        if not np.isfinite(array).all() or beyond.any():
            value = array[beyond | ~np.isfinite(array)].flat[0]
            raise ProfileError(
                f"{name} has the value {value}; it must lie from {wanted.lowest:g} to {wanted.highest:g}"
            )
        return array


def _tensors(profile: SinkProfile) -> Iterator[tuple[str, NDArray[Any]]]:
    for source in (profile.overall, *profile.sources.values()):
        place = f"sources/{source.name}"
        for name in _STATISTICS:
            yield f"{place}/{name}", getattr(source, name)
        if source.effects is not None:
            yield f"{place}/effects", source.effects
        for mode in MODES:
            for name in _BY_MODE:
                yield f"{place}/{mode}/{name}", getattr(source.by[mode], name)
            for name in _TOKENS:
                yield f"{place}/{mode}/tokens/{name}", getattr(source.by[mode].tokens, name)
    for index, example in enumerate(profile.examples):
        for name in _EXAMPLE:
            yield f"examples/{index}/{name}", getattr(example, name)
        if example.calibrated_scores is not None:
            yield f"examples/{index}/calibrated_scores", example.calibrated_scores


def _checked_name(path: str | os.PathLike[str]) -> Path:
    if Path(path).suffix != ".safetensors":
        example = f"{Path(path).stem or 'profile'}.safetensors"
        raise ProfileError(f"{path} doesn't end with .safetensors; pass e.g. {example}")
    return Path(path)
